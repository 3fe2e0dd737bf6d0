import itertools
import json
import math
import os

import pytest
import torch
from helpers_tokenizer import DUAL, TRIPLE, count_decodes, make, photographs, photographs_with_detail, start

from graincode.core import density
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.core.losses import weighted_sum
from graincode.core.rng import SampleRng
from graincode.tokenizer import (
    CodingDensity,
    EntropyDensity,
    FixedDensity,
    Probe,
    QuantileRouter,
    RandomDensity,
    ReconstructionObjective,
)


def look(images):
    """A probe of images that must not be coded."""
    return Probe(images, lambda: pytest.fail("encoded"), lambda features, grain: pytest.fail("decoded"))


def test_ties_stay_coarse_and_calibration_says_so(caplog):
    router = QuantileRouter(DUAL, EntropyDensity(), [0.2, 0.8])
    images = torch.full((4, 3, 32, 32), -1.0)
    images[..., 16:] = torch.rand(4, 3, 32, 16) * 2 - 1
    report = router.calibrate([look(images)])
    assert report["achieved_0"] == pytest.approx(0.5)
    assert report["asked_0"] == 0.2
    assert "stay coarse" in caplog.text
    assert router(look(images)).grains[..., :2].sum() == 0


def test_thresholds_travel_with_the_weights():
    router = QuantileRouter(DUAL, EntropyDensity(sigma=0.02), [0.5, 0.5])
    router.calibrate([look(photographs(8))])
    twin = QuantileRouter(DUAL, EntropyDensity(sigma=0.02), [0.5, 0.5])
    twin.load_state_dict(router.state_dict())
    assert torch.equal(twin(look(photographs(8))).grains, router(look(photographs(8))).grains)


def test_random_routing_is_a_function_of_the_image_and_meets_the_ratio():
    router = QuantileRouter(DUAL, RandomDensity(), [0.5, 0.5])
    images = torch.cat([photographs(32, seed=s) for s in range(8)])
    router.calibrate([look(images)])
    grains = router(look(images)).grains
    assert float(grains.float().mean()) == pytest.approx(0.5, abs=0.01)
    assert torch.equal(router(look(images[5:7])).grains, grains[5:7])
    assert float(grains[..., :2].float().mean()) == pytest.approx(0.5, abs=0.06)  # not where the image is smooth
    assert len({tuple(map(tuple, g)) for g in grains.tolist()}) > 250


def test_an_uncalibrated_router_refuses_to_route():
    with pytest.raises(GraincodeError, match="calibrate"):
        QuantileRouter(DUAL, EntropyDensity(), [0.5, 0.5])(look(photographs(1)))


@pytest.mark.parametrize("ratios", [[0.5], [0.6, 0.6], [1.5, -0.5], [math.nan, math.nan]])
def test_impossible_ratios_are_refused(ratios):
    with pytest.raises(GraincodeError, match=r"^ratios="):
        QuantileRouter(DUAL, EntropyDensity(), ratios)


def test_ratios_of_each_image_are_checked_like_those_of_all():
    tokenizer, images = make(DUAL).eval(), photographs_with_detail(3)
    start(tokenizer, images)
    shares = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    found = tokenizer.tokenize(images, shares).grains
    for index, own in enumerate(shares):
        assert torch.equal(tokenizer.tokenize(images, own).grains[index], found[index])
        assert torch.equal(tokenizer.tokenize(images, own.tolist()).grains[index], found[index])
    for wrong in (torch.tensor([0.9, 0.9]), torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.5, -0.5]]), shares * torch.nan):
        with pytest.raises(GraincodeError, match="add up to 1"):
            tokenizer.tokenize(images, wrong)
    for wrong in (shares[:2], torch.tensor([1.0, 0.0, 0.0]), torch.tensor(0.5)):
        with pytest.raises(GraincodeError, match=r"expected \(2,\) or \(3, 2\)"):
            tokenizer.tokenize(images, wrong)


def test_one_grain_leaves_no_ratios_to_ask_for():
    tokenizer, images = make(CodeLayout((32, 32), ((8, 8),), 32)).eval(), photographs_with_detail(2)
    start(tokenizer, images)
    assert torch.equal(tokenizer.tokenize(images, [1]).indices, tokenizer.tokenize(images).indices)
    for wrong in ([0.5, 0.5], torch.tensor([0.5, 0.5])):
        with pytest.raises(GraincodeError, match=r"expected .*1"):
            tokenizer.tokenize(images, wrong)


@pytest.mark.parametrize("layout", [DUAL, TRIPLE], ids=["dual", "triple"])
@pytest.mark.parametrize("of", ["error", "gain"])
def test_coding_errors_are_those_of_whole_images_at_one_grain(layout, of):
    tokenizer, images = make(layout, density=EntropyDensity()), photographs_with_detail(5, layout.image_size)
    start(tokenizer, images)
    tokenizer.eval()
    errors, last = [], layout.num_grains - 1
    for g in range(layout.num_grains):
        ratios = [float(g == k) for k in range(layout.num_grains)]
        codes = tokenizer.tokenize(images, ratios)
        assert (codes.grains == g).all()
        error = (tokenizer.detokenize(codes) - images).square().mean(dim=1)
        errors.append(torch.stack([e.mean() for e in error.unfold(1, *[layout.grains[0][0]] * 2).unfold(
            2, *[layout.grains[0][1]] * 2).flatten(0, 2)]).view(5, *layout.grids[0]))  # fmt: skip
    found = CodingDensity(of).eval()(tokenizer.probe(images), layout)
    if of == "error":
        torch.testing.assert_close(found, errors[0], atol=1e-6, rtol=1e-4)
    else:
        first = (errors[0] - errors[last]) / (layout.codes_per_region[-1] - 1)
        found = found if layout.num_grains == 2 else found @ torch.tensor([3 / 15, 12 / 15])
        torch.testing.assert_close(found, first, atol=1e-6, rtol=1e-3)


def test_gains_choose_the_least_error_for_the_length():
    torch.manual_seed(0)
    errors, costs = torch.rand(7, 3).double().sort(dim=1, descending=True).values, (1, 4, 16)
    gains = density.coding_gains(errors, costs)
    assert (gains[:, 0] >= gains[:, 1]).all()
    best = {}
    for grains in itertools.product(range(3), repeat=7):
        length = sum(costs[g] for g in grains)
        error = float(sum(errors[i, g] for i, g in enumerate(grains)))
        best[length] = min(error, best.get(length, torch.inf))
    for price in [*gains.flatten().tolist(), 0.0, 1.0]:
        grains = (gains > price).sum(dim=1)
        length, error = sum(costs[g] for g in grains.tolist()), float(errors.gather(1, grains[:, None]).sum())
        assert error == pytest.approx(min(e for n, e in best.items() if n <= length))


def test_gains_spend_the_length_that_ratios_stand_for():
    tokenizer, images = make(TRIPLE, density=CodingDensity("gain")), photographs_with_detail(40, (64, 64))
    tokenizer.eval()
    start(tokenizer, images)
    for ratios in ([1.0, 0.0, 0.0], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]):
        wanted = 16 * sum(ratio * cost for ratio, cost in zip(ratios, (1, 4, 16), strict=True))
        lengths = tokenizer.tokenize(images, ratios).lengths.float()
        assert float(lengths.mean()) == pytest.approx(wanted, rel=0.02)
        assert ratios[0] in (0, 1) or lengths.std() > 0


@pytest.mark.parametrize("measure", [EntropyDensity(), RandomDensity(), FixedDensity(), CodingDensity("gain")], ids=str)
@pytest.mark.parametrize("layout", [DUAL, TRIPLE], ids=["dual", "triple"])
def test_images_compared_with_themselves_have_one_length(layout, measure):
    tokenizer = make(layout, density=measure, scope="image")
    images = photographs_with_detail(12, layout.image_size)
    tokenizer.eval()
    start(tokenizer, images)
    for ratios in ([0.75, 0.25], [0.5, 0.5]) if layout is DUAL else ([0.5, 0.25, 0.25],):
        lengths = tokenizer.tokenize(images, ratios).lengths
        wanted = layout.num_regions * sum(r * c for r, c in zip(ratios, layout.codes_per_region, strict=True))
        if layout is DUAL or not tokenizer.router.density.has_gains:
            assert (lengths == wanted).all()
        else:  # less than the dearest refinement below it
            assert ((lengths <= wanted) & (lengths > wanted - 12)).all()


def test_the_fixed_router_takes_the_middle_of_every_image():
    router = QuantileRouter(DUAL, FixedDensity(), [0.75, 0.25], scope="image")
    router.calibrate([look(photographs(2))])
    grains = router(look(photographs(3))).grains
    assert (grains[:, 1:3, 1:3] == 1).all()
    assert int(grains.sum()) == 12


@pytest.mark.parametrize("layout", [DUAL, TRIPLE], ids=["dual", "triple"])
def test_elastic_training_draws_every_image_its_own_length(layout):
    tokenizer = make(layout, elastic=True)
    images = photographs_with_detail(64, layout.image_size)
    start(tokenizer, images)
    rng = SampleRng(3, torch.arange(64))
    grains = tokenizer.router(tokenizer.probe(images, rng)).grains
    lengths = layout.lengths(grains)
    assert len(set(lengths.tolist())) > 10
    parts = [tokenizer.router(tokenizer.probe(images[i : i + 16], SampleRng(3, torch.arange(i, i + 16)))).grains
             for i in range(0, 64, 16)]  # fmt: skip
    assert torch.equal(torch.cat(parts), grains)  # whatever the batch
    tokenizer.eval()
    assert not torch.equal(tokenizer.router(tokenizer.probe(images, rng)).grains, grains)


def test_the_family_of_mixtures_goes_from_all_coarse_to_all_fine():
    mixtures = density.ratios_at(torch.tensor([0.0, 0.25, 1.0]), 3)
    torch.testing.assert_close(mixtures.sum(dim=1), torch.ones(3).double())
    assert mixtures[0].tolist() == [1, 0, 0]
    assert mixtures[2].tolist() == [0, 0, 1]
    assert density.ratios_at(torch.tensor(0.25), 2).tolist() == [0.75, 0.25]


def test_thresholds_follow_a_density_that_follows_the_weights():
    tokenizer, images = make(DUAL, density=CodingDensity("gain", "error")), photographs_with_detail(64)
    start(tokenizer, images)
    before = tokenizer.router.quantiles.clone()
    for parameter in tokenizer.decoder.last.parameters():
        parameter.data.mul_(3)
    found = [tokenizer(part) for part in images.split(16)]
    parts = [part.routing for part in found]
    tokenizer.update([part.quantized for part in found], parts)
    whole = density.quantile_table(torch.cat([routing.density for routing in parts]))
    torch.testing.assert_close(tokenizer.router.quantiles, before.lerp(whole, 0.05))
    for _ in range(150):
        tokenizer.router.update(parts)
    share = tokenizer.router(tokenizer.probe(images)).grains.float().mean()
    assert float(share) == pytest.approx(0.5, abs=0.02)
    tokenizer.eval()  # another measure decides
    tokenizer.calibrate([images])
    assert float(tokenizer.route(images).grains.float().mean()) == pytest.approx(0.5, abs=0.02)
    gains = CodingDensity("gain").eval()(tokenizer.probe(images), DUAL)
    assert torch.equal(tokenizer.route(images).density, gains)
    still = make(DUAL, density=EntropyDensity())
    start(still, images)
    before = still.router.quantiles.clone()
    found = still(images)
    still.update([found.quantized], [found.routing])
    assert torch.equal(still.router.quantiles, before)


def test_a_router_can_learn_from_the_loss_and_keeps_its_budget():
    tokenizer = make(DUAL, ratios=[0.7, 0.3], density="feature").train()
    images = photographs_with_detail(32)
    start(tokenizer, images)
    optimizer, shares = torch.optim.Adam(tokenizer.router.parameters(), lr=0.02), []
    for step in range(50):
        optimizer.zero_grad()
        found = tokenizer(images, rng=SampleRng(0, torch.arange(32) + 32 * step))
        terms = ReconstructionObjective()(images, found, tokenizer.router)
        assert found.routing.gates.detach().unique().tolist() == [1]
        weighted_sum(terms).backward()
        assert all(float(p.grad.abs().sum()) > 0 for p in tokenizer.router.choose.parameters())
        optimizer.step()
        tokenizer.update([found.quantized], [found.routing])
        shares.append(float(tokenizer.router.shares[1]))
    assert sum(shares[-20:]) / 20 == pytest.approx(0.3, abs=0.1)
    tokenizer.eval()
    with pytest.raises(GraincodeError, match="obeys no other"):
        tokenizer.tokenize(images, ratios=[0.5, 0.5])
    with pytest.raises(GraincodeError, match="leave ratios and psnr out"):
        tokenizer.tokenize(images, psnr=20.0)


def test_the_budget_pulls_the_share_towards_its_ratio_and_its_gradient_is_that_of_the_square():
    tokenizer, images = make(DUAL, ratios=[0.7, 0.3], density="feature", budget=10.0), photographs_with_detail(8)
    start(tokenizer, images)
    router, rng = tokenizer.router.train(), SampleRng(0, torch.arange(8))
    for share in (0.1, 0.9):
        router.shares.copy_(torch.tensor([1 - share, share]))
        term = router(tokenizer.probe(images, rng)).terms["budget"]
        bias = router.choose[-1].bias
        (gradient,) = torch.autograd.grad(term.mean, bias)
        assert (float(gradient[1]) > 0) == (share > 0.3)
        found = router(tokenizer.probe(images, rng))
        soft = found.gates.detach() * 0 + (found.grains == 1)
        assert float(term.mean.detach()) == pytest.approx(2 * 10 * (share - 0.3) * float(soft.mean()), rel=1e-5)
    halves = [router(tokenizer.probe(part, SampleRng(0, torch.arange(i, i + 4)))).terms["budget"]
              for i, part in ((0, images[:4]), (4, images[4:]))]  # fmt: skip
    assert float(sum(half.total for half in halves) / 8) == pytest.approx(float(term.mean), rel=1e-5)


def test_one_grain_has_nothing_to_choose():
    layout = CodeLayout((32, 32), ((4, 8),), 16)
    with pytest.raises(GraincodeError, match=r"^grains=.*two or more"):
        make(layout, density="feature")
    tokenizer, images = make(layout, density=CodingDensity("gain")), photographs(4)
    start(tokenizer, images)
    assert not tokenizer.router.is_learned
    decodes = count_decodes(tokenizer)
    tokenizer.calibrate(pytest.fail("read") for _ in range(1))
    assert (tokenizer.eval().tokenize(images).lengths == 32).all()
    assert not decodes
    tokenizer.train()(images)
    assert len(decodes) == 1
    images[2, 1, 5, 5] = torch.nan
    with pytest.raises(GraincodeError, match="from nan to nan"):
        tokenizer.eval().tokenize(images)


def test_thresholds_may_come_from_a_file_of_percentiles(tmp_path):
    file = tmp_path / "thresholds.json"
    rows = {str(row): 3 * row / 100 for row in range(1, 100)}
    file.write_text(json.dumps({"definition": {"bins": 32, "span": [0.0, 1.0]}} | rows))
    density = EntropyDensity(span=[0.0, 1.0])
    router = QuantileRouter(DUAL, density, [0.45, 0.55], thresholds=str(file))
    images = photographs(4)
    report = router.calibrate([look(images)])
    # between rows, where the public code takes a lower one: of 55 %, int(100 - 100 * 0.55) = 44
    limit = router.quantiles[round(0.45 * 4096)]
    assert float(limit) == pytest.approx(3 * 0.45, abs=2e-3)
    grains = router(look(images)).grains
    assert torch.equal(grains, (density(look(images), DUAL) > limit).long())
    assert report["achieved_1"] == pytest.approx(float(grains.double().mean()))


@pytest.mark.when("a file of thresholds is damaged, or belongs to another density", "one line says what it should hold")
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "no percentiles.*expected"),
        ("{", "no percentiles"),
        ("[1, 2]", "no percentiles"),
        ('{"1": 0.5}', "no percentiles"),
        ('{"1": 0.5, "2": "x"}', "no percentiles"),
        ('{"1": 0.5, "2": 0.1}', "no percentiles"),
        ('{"1": 0.5, "2": NaN}', "no percentiles"),
        ('{"1": 0.5, "200": 0.6}', "no percentiles"),
        ('{"definition": {"span": [0, 1]}, "1": 0.5, "99": 0.6}', r"span=\[0, 1\], but the density has \[-1.0, 1.0\]"),
    ],
)
def test_files_that_hold_no_thresholds_are_refused(tmp_path, content, match):
    file = tmp_path / "thresholds.json"
    if content is not None:
        file.write_text(content)
    router = QuantileRouter(DUAL, EntropyDensity(), [0.5, 0.5], thresholds=str(file))
    with pytest.raises(GraincodeError, match=f"^{file}: .*{match}"):
        router.calibrate([look(photographs(1))])


@pytest.mark.when("a pipe is given as a file of thresholds", "it is refused by name, and not waited for")
def test_a_pipe_holds_no_thresholds(tmp_path):
    os.mkfifo(file := tmp_path / "thresholds.json")
    router = QuantileRouter(DUAL, EntropyDensity(), [0.5, 0.5], thresholds=str(file))
    with pytest.raises(GraincodeError, match=f"^{file}: no percentiles"):
        router.calibrate([look(photographs(1))])


def test_thresholds_of_a_density_that_changes_with_the_weights_are_refused():
    with pytest.raises(GraincodeError, match=r"^thresholds=file: expected null"):
        QuantileRouter(DUAL, CodingDensity(), [0.5, 0.5], thresholds="file")
