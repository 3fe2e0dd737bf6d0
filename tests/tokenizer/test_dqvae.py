import gc
import math
import weakref

import pytest
import torch
from helpers_tokenizer import DUAL, count_decodes, make, photographs, photographs_with_detail, start

from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.tokenizer import CodingDensity, EntropyDensity, ReconstructionObjective


@pytest.mark.parametrize(
    ("layout", "patch"),
    [
        (CodeLayout((32, 32), ((8, 8),), 16), 2),
        (CodeLayout((32, 32), ((4, 8),), 16), 1),
        (DUAL, 4),
        (DUAL, 1),
        (CodeLayout((32, 64), ((16, 16), (8, 8), (4, 4)), 16), 2),
        (CodeLayout((64, 32), ((16, 8), (4, 8)), 16), 1),
        (CodeLayout((16, 24), ((4, 4), (2, 2)), 16), 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("forms", [{}, {"expand": False}, {"published": True}], ids=str)
def test_tokenize_and_detokenize_agree_with_the_trained_path(layout, patch, forms):
    tokenizer, images = make(layout, patch=patch, **forms), photographs(3, layout.image_size)
    start(tokenizer, images)
    for parameter in tokenizer.decoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    tokenizer.eval()
    codes = tokenizer.tokenize(images)
    pixels = tokenizer.detokenize(codes)
    assert pixels.shape == images.shape
    reconstruction = tokenizer(images)
    assert torch.equal(reconstruction.routing.grains, codes.grains)
    torch.testing.assert_close(reconstruction.images.clamp(-1, 1), pixels, atol=1e-5, rtol=0)
    assert len(reconstruction.codes) == int(codes.lengths.sum())


@pytest.mark.parametrize("published", [False, True])
def test_every_part_gets_a_gradient_whatever_the_grains(published):
    tokenizer, images = make(DUAL, published=published), photographs(2)
    start(tokenizer, images)
    for ratios in ([1.0, 0.0], [0.5, 0.5], [0.0, 1.0]):
        tokenizer.zero_grad()
        objective = ReconstructionObjective()
        terms = objective(images, tokenizer(images, ratios), tokenizer.router)
        sum(term.mean * term.weight for term in terms.values()).backward()
        assert all(parameter.grad is not None for parameter in tokenizer.parameters())


def test_all_coarse_and_all_fine_hold_for_images_denser_than_any_in_the_training_data():
    tokenizer = make(DUAL).eval()
    tokenizer.calibrate([torch.full((4, 3, 32, 32), -1.0)])
    busy = torch.rand(2, 3, 32, 32) * 2 - 1
    assert (tokenizer.tokenize(busy, [1.0, 0.0]).lengths == 16).all()
    assert (tokenizer.tokenize(busy, [0.0, 1.0]).lengths == 64).all()


def test_images_of_another_type_or_range_are_refused():
    tokenizer = make(DUAL).eval()
    tokenizer.calibrate([photographs(2)])
    for images in (photographs(1) * 100, torch.zeros(1, 3, 32, 32).long(), photographs(1) * math.nan):
        with pytest.raises(GraincodeError, match=r"^images=.*: expected floating point in \[-1, 1\]"):
            tokenizer.tokenize(images)


def test_any_ratio_can_be_asked_for():
    tokenizer = make(DUAL).eval()
    images = torch.cat([photographs(8, seed=s) for s in range(8)])
    tokenizer.calibrate([images])
    lengths = [
        float(tokenizer.tokenize(images, [1 - fine, fine]).lengths.float().mean())
        for fine in (0.0, 0.1, 0.25, 0.4, 1.0)
    ]
    assert lengths[0] == 16
    assert lengths[-1] == 64
    assert lengths == sorted(lengths)
    assert lengths[2] == pytest.approx(16 * (1 + 3 * 0.25), abs=1)


def test_codes_of_one_image_do_not_depend_on_the_others():
    tokenizer = make(DUAL)
    images = photographs(6)
    start(tokenizer, images)
    tokenizer.eval()
    together = tokenizer.tokenize(images)
    for row in range(6):
        assert torch.equal(tokenizer.tokenize(images[[row]]).grains, together[[row]].grains)


def test_tokenizing_never_changes_the_codebook():
    tokenizer, images = make(DUAL), photographs(3)
    start(tokenizer, images)
    before = tokenizer.quantizers[0].codebook.clone()
    tokenizer.eval().tokenize(images)
    assert torch.equal(tokenizer.quantizers[0].codebook, before)


def test_images_of_another_size_and_codes_of_another_layout_are_refused():
    tokenizer = make(DUAL).eval()
    tokenizer.calibrate([photographs(2)])
    with pytest.raises(GraincodeError, match=r"expected \(batch, 3, 32, 32\)"):
        tokenizer.tokenize(torch.zeros(1, 3, 16, 16))
    other = make(CodeLayout((32, 32), ((8, 8), (4, 4)), 17)).eval()
    with pytest.raises(GraincodeError, match="codebook_size 16 instead of 17"):
        other.detokenize(tokenizer.tokenize(photographs(1)))


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("measure", [EntropyDensity(), CodingDensity("gain")], ids=str)
def test_a_psnr_can_be_asked_for(measure, published):
    tokenizer, images = make(DUAL, density=measure, published=published), photographs_with_detail(24)
    tokenizer.eval()
    start(tokenizer, images)

    def psnr(codes):
        return -10 * ((tokenizer.detokenize(codes) - images) / 2).square().flatten(1).mean(dim=1).log10()

    coarse, fine = (psnr(tokenizer.tokenize(images, [1 - r, r])) for r in (0.0, 1.0))
    one = int((fine - coarse).argmax())
    wanted = float(coarse[one] + fine[one]) / 2
    codes = tokenizer.tokenize(images, psnr=wanted)
    reached = psnr(codes)
    assert ((reached >= wanted - 1e-4) | (codes.lengths == 64)).all()
    assert (codes.lengths[coarse >= wanted] == 16).all()
    assert 16 < int(codes.lengths[one]) < 64
    for one in range(4):  # and nothing depends on the other images
        assert torch.equal(tokenizer.tokenize(images[[one]], psnr=wanted).grains, codes.grains[[one]])
    with pytest.raises(GraincodeError, match=r"^psnr=.*ratios are given"):
        tokenizer.tokenize(images, [0.5, 0.5], psnr=wanted)
    with pytest.raises(GraincodeError, match=r"^psnr=nan: expected"):
        tokenizer.tokenize(images, psnr=math.nan)


def test_errors_are_measured_once_whatever_is_searched_for():
    tokenizer, images = make(DUAL, density=CodingDensity("gain")).eval(), photographs_with_detail(4)
    start(tokenizer, images)
    decodes = count_decodes(tokenizer)
    tokenizer.tokenize(images)
    assert len(decodes) == 2
    tokenizer.tokenize(images, psnr=20.0)
    assert len(decodes) == 2 + 2 + 7


def test_results_of_a_probe_are_freed_with_it():
    tokenizer, images = make(DUAL, density=CodingDensity("gain")).eval(), photographs_with_detail(4)
    start(tokenizer, images)
    gc.disable()
    try:
        probe = tokenizer.probe(images)
        tokenizer.router(probe)
        feature = weakref.ref(probe.features[0])
        del probe
        assert feature() is None
    finally:
        gc.enable()


@pytest.mark.when("a tokenizer in training mode is asked for codes", "it is refused: they would be other codes")
@pytest.mark.parametrize("density", ["feature", CodingDensity()], ids=str)
def test_codes_are_of_a_tokenizer_in_evaluation_mode(density):
    tokenizer, images = make(DUAL, density=density), photographs(2)
    start(tokenizer, images)
    for call in (tokenizer.tokenize, tokenizer.route):
        with pytest.raises(GraincodeError, match=r"training mode .* call tokenizer\.eval\(\)"):
            call(images)


@pytest.mark.when("psnr or ratios are no numbers, or none that images can have", "they are named with what is expected")
@pytest.mark.parametrize("psnr", [-1e9, -1, 101, math.inf, math.nan, "x", "25", True, [25]])
def test_a_psnr_is_a_number_of_decibels(psnr):
    tokenizer = make(DUAL)
    tokenizer.eval().calibrate([photographs(2)])
    with pytest.raises(GraincodeError, match=r"^psnr=.*: expected a number of dB from 0 to 100"):
        tokenizer.tokenize(photographs(1), psnr=psnr)
    for most in (0, 100):
        assert tokenizer.tokenize(photographs(1), psnr=most).lengths.item() in (16, 64)


@pytest.mark.parametrize(
    "ratios", [0.5, "a", "10", [math.nan, 1], [0.5, 0.6], [1], [-1, 2], [], {}, [[0.5, 0.5]] * 2, [None, 1], ["x", 1]]
)
def test_ratios_are_shares(ratios):
    tokenizer = make(DUAL)
    tokenizer.eval().calibrate([photographs(2)])
    with pytest.raises(GraincodeError, match=r"^ratios=.*: expected 2 shares"):
        tokenizer.tokenize(photographs(1), ratios)
