"""The laws of every quantiser, by moving averages or by gradients."""

import sys
from copy import deepcopy
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from graincode.config.job import build, with_layout
from graincode.config.validate import check
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.core.precision import products
from graincode.distributed import collectives
from graincode.export import build_node
from graincode.tokenizer import CosineQuantizer, EMAQuantizer, FSQuantizer, LFQuantizer, SimVQuantizer

SIZE, DIM = 64, 6
QUANTIZERS = {
    "ema": partial(EMAQuantizer, SIZE, DIM, restart_below=0.5),
    "simvq": partial(SimVQuantizer, SIZE, DIM),
    "cosine": partial(CosineQuantizer, SIZE, DIM, projected_dim=3),
    "cosine without projections": partial(CosineQuantizer, SIZE, DIM, projected_dim=DIM),
    "fsq": partial(FSQuantizer, SIZE, DIM, [4, 4, 4]),
    "fsq without projections": partial(FSQuantizer, 4**DIM, DIM, [4] * DIM),
    "lfq": partial(LFQuantizer, SIZE, DIM + 1, temperature=0.5),
    "lfq without projections": partial(LFQuantizer, SIZE, DIM, temperature=0.5),
}


def vectors_for(quantizer, count, seed=0):
    """In a few clusters."""
    generator = torch.Generator().manual_seed(seed)
    dim = quantizer.lookup(torch.zeros(1, dtype=torch.long)).shape[-1]
    centers = torch.randn(12, dim, generator=torch.Generator().manual_seed(1))
    chosen = torch.randint(12, (count,), generator=generator)
    return (centers[chosen] + 0.1 * torch.randn(count, dim, generator=generator)).to(quantizer.dtype)


@pytest.fixture(params=QUANTIZERS)
def quantizer(request):
    learner = QUANTIZERS[request.param]().double()
    learner.initialize(vectors_for(learner, 200))
    return learner


def test_forward_nearest_and_lookup_agree(quantizer):
    vectors = vectors_for(quantizer, 90)
    for training in (True, False):
        found = quantizer.train(training)(vectors)
        assert found.indices.dtype == torch.long
        assert found.indices.min() >= 0
        assert found.indices.max() < quantizer.codebook_size
        assert found.error.shape == (90,)
        assert torch.equal(quantizer.nearest(vectors), found.indices)
        torch.testing.assert_close(quantizer.lookup(found.indices), found.vectors, rtol=0, atol=1e-12)
    grids = found.indices.view(2, 5, 9)  # a map of codes is looked up as it is
    torch.testing.assert_close(quantizer.lookup(grids), found.vectors.view(2, 5, 9, -1), rtol=0, atol=1e-12)


def test_all_entries_can_be_looked_up_and_differ(quantizer):
    every = quantizer.lookup(torch.arange(quantizer.codebook_size))
    assert len(every.unique(dim=0)) == quantizer.codebook_size


@pytest.mark.when("the dimension of a quantizer differs from that of its vectors", "one line names code_dim")
@pytest.mark.parametrize("autocast", [False, True])
def test_the_dimension_of_vectors_is_known(quantizer, autocast):
    dim = quantizer.lookup(torch.zeros(1, dtype=torch.long)).shape[-1]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for part in (quantizer, deepcopy(quantizer).to("meta")):
            part.check_dimension(dim)
            with pytest.raises(GraincodeError, match=f"^code_dim={dim}: expected {dim + 1}, "):
                part.check_dimension(dim + 1)


@pytest.mark.parametrize("typed", [
    "tokenizer.model.projected_dim=7", "tokenizer.quantizer.code_dim=7", "tokenizer.model.encoder.code_dim=${seed}",
])  # fmt: skip
def test_a_tokenizer_of_parts_that_do_not_fit_is_refused(typed):
    cfg = check("train_tokenizer", ["seed=5", typed, "tokenizer.size.channels=8"])
    with_layout(cfg.tokenizer.model, CodeLayout((32, 32), ((8, 8), (4, 4)), 16))
    with pytest.raises(GraincodeError, match=r"^tokenizer\.(quantizer\.)?code_dim=\d+: expected \d+, "):
        build(cfg.tokenizer.model)


def test_gradients_reach_the_input_and_all_weights(quantizer):
    vectors = vectors_for(quantizer, 90).requires_grad_()
    found = quantizer(vectors)
    (found.vectors.square().sum() + found.error.sum()).backward()
    assert vectors.grad.abs().sum(dim=1).min() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())


def test_no_vectors_are_no_codes(quantizer):
    before = deepcopy(quantizer.state_dict())
    vectors = vectors_for(quantizer, 0).requires_grad_()
    found = quantizer(vectors)
    assert found.vectors.shape == vectors.shape
    assert (len(found.indices), len(found.error)) == (0, 0)
    assert len(quantizer.nearest(vectors)) == 0
    (found.vectors.sum() + found.error.sum()).backward()  # a process without codes takes part in the exchange
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in quantizer.parameters())
    quantizer.update([found.seen])
    for name, tensor in quantizer.state_dict().items():
        if not isinstance(quantizer, EMAQuantizer):  # whose counts decay
            assert torch.equal(tensor, before[name])


def test_copies_are_independent_and_states_give_the_same_codes(quantizer):
    vectors = vectors_for(quantizer, 90)
    twin, codes = deepcopy(quantizer), quantizer.nearest(vectors)
    assert torch.equal(twin.nearest(vectors), codes)
    for tensor in [*twin.parameters(), *twin.buffers()]:
        if tensor.is_floating_point():
            tensor.data.mul_(-0.3)
    assert torch.equal(quantizer.nearest(vectors), codes)
    twin.load_state_dict(quantizer.state_dict())
    twin = twin.double()
    assert torch.equal(twin.nearest(vectors), codes)


def gradients(quantizer, vectors, sizes, keys, count):
    """Of a loss divided by the count of all, from a batch in parts, for input and weights; and what was seen."""
    vectors, seen = vectors.clone().requires_grad_(), []
    quantizer.zero_grad()
    for part, key in zip(vectors.split(sizes), keys.split(sizes), strict=True):
        found = quantizer(part, key)
        ((found.vectors.sin().sum() + found.error.sum()) / count).backward()
        seen.append(found.seen)
    return [vectors.grad, *(parameter.grad.clone() for parameter in quantizer.parameters())], seen


def test_a_divided_batch_has_the_gradients_and_updates_of_the_whole(quantizer):
    halves = deepcopy(quantizer)
    for step in range(3):
        vectors, keys = vectors_for(quantizer, 90, step), torch.rand(90).double()
        whole, seen_whole = gradients(quantizer, vectors, [90], keys, 90)
        parts, seen_parts = gradients(halves, vectors, [30, 0, 59, 1], keys, 90)
        for one, other in zip(whole, parts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        before = deepcopy(quantizer.state_dict())
        quantizer.update(seen_whole)
        halves.update(seen_parts)
        if list(quantizer.parameters()):  # nothing but gradients moves what gradients learn
            assert all(torch.equal(before[name], value) for name, value in quantizer.named_parameters())
    states = [learner.state_dict() for learner in (quantizer, halves)]
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["fsq", "lfq"])
def test_scalar_codes_start_from_centred_projections_of_the_data(name):
    learner = QUANTIZERS[name]()
    vectors = 3 + 0.1 * vectors_for(learner, 400)  # all on one side
    assert len(learner.nearest(vectors).unique()) < 8
    learner.initialize(vectors)
    std, mean = torch.std_mean(learner.library.project_in(vectors), dim=0)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-3, atol=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-4)
    assert len(learner.nearest(vectors).unique()) > 8
    learner.initialize(vectors[:1])  # of which nothing can be learned


def test_the_average_choice_is_that_of_all_processes(monkeypatch):
    whole = LFQuantizer(SIZE, DIM, decay=0.5, temperature=0.5).double()
    parts = [deepcopy(whole), deepcopy(whole)]
    vectors = vectors_for(whole, 90)
    whole.update([whole(vectors).seen])
    seen = [learner(part).seen for learner, part in zip(parts, vectors.split([20, 70]), strict=True)]
    total = seen[0][0] + seen[1][0]
    monkeypatch.setattr(collectives, "sum_", lambda tensor: tensor.copy_(total))
    for learner, own in zip(parts, seen, strict=True):
        learner.update([own])
        torch.testing.assert_close(learner.average, whole.average, rtol=1e-12, atol=0)
    assert float(whole.average.sum()) == pytest.approx(1)


def test_entropies_are_those_of_the_library_when_the_average_is_the_batch_s():
    from vector_quantize_pytorch import LFQ

    ours, vectors = LFQuantizer(SIZE, DIM, entropy_weight=0.4, temperature=0.5, decay=0.0), torch.randn(90, DIM)
    ours.update([ours(vectors).seen])
    assert ours.average.min() > 1e-5  # where the library cuts its logarithms
    theirs = LFQ(dim=DIM, codebook_size=SIZE, entropy_loss_weight=0.1, commitment_loss_weight=0.25)
    found = []
    for loss in (lambda x: 0.25 * ours(x).error.mean(), lambda x: theirs(x[None], inv_temperature=2.0)[2]):
        inputs = vectors.clone().requires_grad_()
        value = loss(inputs)
        value.backward()
        found.append((value.detach(), inputs.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-2, atol=1e-5)


def test_learning_reduces_the_error(quantizer):
    torch.manual_seed(0)
    learner = quantizer.float()
    encoder = nn.Linear(8, vectors_for(learner, 1).shape[1])
    decoder = nn.Linear(vectors_for(learner, 1).shape[1], 8)
    data = torch.randn(12, 8)[torch.randint(12, (256,))] + 0.1 * torch.randn(256, 8)
    learner.initialize(encoder(data).detach())
    optimizer = torch.optim.Adam([*learner.parameters(), *encoder.parameters(), *decoder.parameters()], lr=2e-2)
    errors = []
    for _ in range(80):
        found = learner(encoder(data))
        error = (decoder(found.vectors) - data).square().mean()
        optimizer.zero_grad()
        (error + 0.25 * found.error.mean()).backward()
        optimizer.step()
        learner.update([found.seen])
        errors.append(float(error.detach()))
    assert errors[-1] < 0.3 * errors[0]
    assert len(learner.nearest(encoder(data)).unique()) >= 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FSQuantizer(256, 8, [8, 8]), r"levels=\[8, 8\]: expected the product 256, not 64"),
        (lambda: FSQuantizer(4, 8, [2, 2]), r"levels=\[2, 2\]: expected"),
        (lambda: FSQuantizer(1, 8, []), r"levels=\[\]: expected"),
        (lambda: LFQuantizer(1000, 8), "codebook_size=1000: expected a power of two"),
        (lambda: LFQuantizer(1, 8), "codebook_size=1: expected"),
        (lambda: LFQuantizer(16, 8, temperature=0.0), r"temperature=0\.0: expected"),
        (lambda: LFQuantizer(16, 8, decay=1.0), r"decay=1\.0: expected"),
        (lambda: CosineQuantizer(16, 8, projected_dim=1), "projected_dim=1: expected"),
        (lambda: SimVQuantizer(16, 8, codebook_weight=0.0), r"codebook_weight=0\.0: expected"),
    ],
)
def test_sizes_and_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(GraincodeError, match=f"^{message}"):
        make()


def test_without_the_library_the_extra_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    for name in ("simvq", "cosine", "fsq", "lfq"):
        with pytest.raises(GraincodeError, match=r"pip install graincode\[vq\]"):
            QUANTIZERS[name]()


@pytest.mark.parametrize("name", ["ema", "simvq", "cosine", "fsq", "lfq"])
def test_configurations_build_what_they_name_and_exports_rebuild_it(name):
    cfg = check("train_tokenizer", ["data=fashion_mnist", f"tokenizer/quantizer={name}"])
    learner = build(cfg.tokenizer.quantizer)
    assert learner.codebook_size == cfg.tokenizer.codebook_size
    vectors = torch.randn(90, cfg.tokenizer.code_dim)
    learner.initialize(vectors)
    learner.update([learner(vectors).seen])
    again = build_node(OmegaConf.to_container(cfg.tokenizer.quantizer, resolve=True)).eval()
    again.load_state_dict(learner.state_dict())
    assert torch.equal(again.nearest(vectors), learner.nearest(vectors))
    assert again.lookup(again.nearest(vectors)).shape == vectors.shape


class Products(TorchDispatchMode):
    """Notes the precision of each product of matrices."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.split("::")[1] in ("mm", "addmm", "bmm", "linear"):
            dtypes = {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
            self.found |= {(dtype, torch.get_float32_matmul_precision()) for dtype in dtypes}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_entries_are_searched_in_full_precision_under_autocast_and_tf32(kind):
    learner = QUANTIZERS[kind]()
    learner.initialize(vectors_for(learner, 200))
    vectors = vectors_for(learner, 90)
    exact = learner(vectors)
    with products("tf32", "cuda"), torch.autocast("cpu", torch.bfloat16), Products() as seen:
        found, shown = learner(vectors), learner.lookup(exact.indices)
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.equal(found.indices, exact.indices)
    assert torch.equal(found.vectors, exact.vectors)
    assert torch.equal(shown, learner.lookup(exact.indices))
    assert seen.found <= {(torch.float32, "highest")}
    assert seen.found or kind == "fsq without projections"
