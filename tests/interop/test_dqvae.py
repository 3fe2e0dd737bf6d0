"""DQ-VAE as its authors compute it, from weights by their published names."""

import pytest
import torch
from helpers_golden import about, golden, images_of, state_dict
from hydra.utils import instantiate

from graincode.core.codes import GrainCodes
from graincode.interop import dqvae

NETWORKS = ["dqvae_dual_entropy", "dqvae_dual_feature", "dqvae_triple_feature"]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def imported(network, dtype, current=True):
    node, weights, _ = dqvae.translate(state_dict(network))
    if network.endswith("entropy") and current:
        node["router"]["density"]["span"] = [-1.0, 1.0]  # as the golden density is
    module = instantiate(node)
    module.load_state_dict(weights)
    return module.eval().to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_a_published_network_gives_its_published_numbers(network, dtype):
    found, module = golden(network), imported(network, dtype)

    def close(ours, name, atol=TOLERANCE[dtype]):
        torch.testing.assert_close(ours.double(), found[name], rtol=0, atol=atol)

    images = images_of(found, dtype)
    probe = module.probe(images)
    grains = [name for name in ("coarse", "median", "fine") if f"features_{name}" in found]
    for features, name in zip(probe.features, grains, strict=True):
        close(features, f"features_{name}")
    routing = module.router(probe)
    assert torch.equal(routing.grains, found["grains"])
    if "density" in found:
        close(routing.density, "density", 1e-5)  # ours is rounded to 2^-20
    else:
        density = found["gate"][:, 1:].logsumexp(dim=1) - found["gate"][:, 0]
        torch.testing.assert_close(routing.density.double(), density, rtol=0, atol=1e-4)  # ours is float32
    codes = module.codes_at(probe, routing)
    assert torch.equal(codes.indices, found["indices"])
    merged = sum(
        module.layout.expand(x * module.layout.cells_at(codes.grains, g)[:, None], g)
        for g, x in enumerate(probe.features)
    )
    close(module.project_in(merged.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), "latent")
    reconstruction = module(images).images
    close(reconstruction[..., ::2, ::2], "reconstruction")
    torch.testing.assert_close(module.detokenize(codes), reconstruction.clamp(-1, 1), rtol=0, atol=1e-5)
    assert isinstance(codes, GrainCodes)


@pytest.mark.parametrize(
    ("network", "parameters"),
    [("dqvae_dual_entropy", 47_833_731), ("dqvae_dual_feature", 48_098_437), ("dqvae_triple_feature", 74_010_502)],
)
def test_every_published_name_is_known(network, parameters):
    published = about(network)["published"]["state_dict"]
    with torch.device("meta"):
        node, weights, dropped = dqvae.translate({name: torch.empty(shape) for name, shape in published.items()})
        module = instantiate(node)
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    assert {name: value.shape for name, value in weights.items()} == shapes
    assert dropped == [name for name in published if name.startswith("loss.")]
    codebook = module.quantizers[0].codebook
    padding = codebook.shape[1]  # theirs has one row more
    assert sum(p.numel() for p in module.parameters()) + codebook.numel() + padding == parameters
