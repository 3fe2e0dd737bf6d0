"""Losses and codebook updates as the public code of DQ-VAE computes them."""

import pytest
import torch
from helpers_golden import golden

from graincode.core.codes import CodeCells
from graincode.core.layout import CodeLayout
from graincode.core.losses import weighted_sum
from graincode.tokenizer import EMAQuantizer, FeatureRouter, Reconstruction, ReconstructionObjective, Routing
from graincode.tokenizer.router import budget_pull

DUAL = CodeLayout((32, 32), ((8, 8), (4, 4)), 16, codebook="shared")
TRIPLE = CodeLayout((32, 32), ((16, 16), (8, 8), (4, 4)), 16, codebook="shared")


def quantizer_of(codebook, **settings):
    quantizer = EMAQuantizer(*codebook.shape, **settings).double()
    quantizer.codebook.copy_(codebook)
    quantizer.counts.fill_(1)
    return quantizer.train()


@pytest.mark.parametrize(
    ("name", "layout", "grains", "loss", "norms"),
    [
        ("dual", DUAL, ("coarse", "fine"), 0.6084617834, (0.0044868748, 0.0099351974)),
        ("triple", TRIPLE, ("coarse", "median", "fine"), 0.4167486226, (0.0018391394, 0.0044834237, 0.0076100390)),
    ],
)
def test_commitment_per_cell_is_the_published_loss(name, layout, grains, loss, norms):
    found, masked = golden("losses"), "_masked" if name == "dual" else ""
    features = [found[f"{name}_{grain}"].requires_grad_() for grain in grains]
    routing = Routing(found[f"{name}_grains"], found[f"{name}_grains"].double())
    quantized = quantizer_of(found["codebook"])(*CodeCells.of(routing.grains, layout).gather(features))
    images = torch.zeros(len(routing.grains), 3, 32, 32, dtype=torch.float64)
    router = FeatureRouter(layout, 8, [1 / layout.num_grains] * layout.num_grains)
    objective = ReconstructionObjective(commitment=0.25, commitment_per="cells")
    terms = objective(images, Reconstruction(images, (quantized,), routing), router)
    ours = weighted_sum({"commitment": terms["commitment"]})
    value = float(ours.detach()) * (1 + 0.25) / 0.25  # theirs adds the distance once more, without a gradient
    assert value == pytest.approx(loss, abs=1e-8)
    assert value == pytest.approx(float(found[f"{name}{masked}_loss"]), abs=1e-12)
    gradients = torch.autograd.grad(ours, features)
    assert [float(gradient.norm()) for gradient in gradients] == pytest.approx(norms, abs=1e-9)
    for gradient, grain in zip(gradients, grains, strict=True):
        torch.testing.assert_close(gradient, found[f"{name}{masked}_grad_{grain}"], rtol=0, atol=1e-9)


def test_commitment_per_code_divides_by_the_codes_that_an_image_is_expected_to_have():
    found, objective = golden("losses"), ReconstructionObjective(commitment_per="codes")
    routing = Routing(found["dual_grains"], found["dual_grains"].double())
    quantized = quantizer_of(found["codebook"])(
        *CodeCells.of(routing.grains, DUAL).gather([found["dual_coarse"], found["dual_fine"]])
    )
    images = torch.zeros(2, 3, 32, 32)
    term = objective(images, Reconstruction(images, (quantized,), routing), FeatureRouter(DUAL, 8, [0.5, 0.5]))
    assert float(term["commitment"].total) == pytest.approx(
        1.6 * 2 * 0.6084617834 / 1.25, rel=1e-6
    )  # 64 cells, 40 codes


@pytest.mark.parametrize(
    ("name", "ratios", "weights", "loss"),
    [
        ("dual", [0.7, 0.3], [20.0], "loss_all"),
        ("dual", [0.7, 0.3], [10.0], "loss_single"),
        ("triple", [0.4, 0.3, 0.3], [1.0, 2.0], "loss"),
    ],
)
def test_the_budget_has_the_published_value_and_gradient(name, ratios, weights, loss):
    found = golden("losses")
    gates = found[f"budget_{name}_gate"].permute(0, 2, 3, 1).contiguous().requires_grad_()
    shares = gates.detach().mean(dim=(0, 1, 2))
    pull = budget_pull(gates, shares, ratios, weights)
    excess = shares[1:] - torch.tensor(ratios, dtype=torch.float64)[1:]
    value = sum(weight * float(over) ** 2 for weight, over in zip(weights, excess, strict=True))
    assert value == pytest.approx(float(found[f"budget_{name}_{loss}"]), abs=1e-9)
    (gradient,) = torch.autograd.grad(pull / len(gates), gates)
    published = found[f"budget_{name}_{loss.replace('loss', 'grad')}"].permute(0, 2, 3, 1)
    # along what keeps a region's gates at a sum of 1
    torch.testing.assert_close(
        gradient[..., 1:] - gradient[..., :1], published[..., 1:] - published[..., :1], rtol=0, atol=1e-9
    )


def test_a_step_of_the_moving_averages_is_the_published_one():
    found = golden("losses")
    quantizer = quantizer_of(found["codebook"], decay=0.99, restart_below=0, max_restarts=0)
    quantizer.counts.copy_(found["ema_counts_before"])
    quantizer.sums.copy_(found["codebook"] * found["ema_counts_before"][:, None])
    vectors = found["ema_latent"].permute(0, 2, 3, 1).flatten(0, 2)
    quantized = quantizer(vectors)
    quantizer.update([quantized.seen])
    assert torch.equal(quantized.indices, found["ema_indices"].flatten())
    torch.testing.assert_close(quantizer.counts, found["ema_counts_after"], rtol=0, atol=1e-9)
    torch.testing.assert_close(quantizer.sums, found["ema_sums_after"], rtol=0, atol=1e-9)
    counts = quantizer.counts  # theirs moves each count towards the mean by 1e-5, as in Laplace's rule
    smoothed = (counts + 1e-5) * counts.sum() / (counts.sum() + 1e-5 * len(counts))
    expected = found["ema_codebook_after"] * (smoothed / counts)[:, None]
    torch.testing.assert_close(quantizer.codebook, expected, rtol=0, atol=1e-9)


def test_a_codebook_may_start_from_small_uniform_numbers():
    quantizer = EMAQuantizer(64, 8, start="uniform")
    quantizer.initialize(torch.randn(512, 8))
    assert float(quantizer.codebook.abs().max()) <= 1 / 64
    assert float(quantizer.codebook.std()) == pytest.approx(1 / 64 / 3**0.5, rel=0.1)
    torch.testing.assert_close(quantizer.sums, quantizer.codebook * quantizer.counts[:, None])
    for _ in range(12):  # a tenth of the entries may restart at once
        quantizer.update([quantizer(torch.randn(512, 8)).seen])
    assert len(quantizer.nearest(torch.randn(4096, 8)).unique()) > 60
