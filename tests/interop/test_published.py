"""Imported networks against the outputs of their authors' code, and against names and shapes at published size."""

from importlib import import_module

import pytest
import torch
from helpers_golden import about
from helpers_parity import NETWORKS, differences, import_golden, published

from graincode import load_tokenizer
from graincode.interop.containers import select
from graincode.interop.names import Options


@pytest.fixture(scope="module", params=NETWORKS)
def imported(request, tmp_path_factory):
    """The name of a golden network, and its tokenizer, loaded from an export."""
    folder = tmp_path_factory.mktemp(request.param)
    import_golden(request.param, folder).save(folder / "export")
    return request.param, load_tokenizer(folder / "export")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_an_imported_network_computes_what_the_authors_does(imported, dtype, tolerance):
    network, module = imported
    found = differences(module, network, dtype, count=1)
    assert {"indices", "reconstruction"} <= set(found)
    assert found["indices"][0] == found.get("grains", (0,))[0] == 0
    assert max(absolute for absolute, _ in found.values()) < tolerance


PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")
LEFT_OUT = {
    "dqvae_dual_entropy": {"loss": 55},
    "dqvae_dual_feature": {"loss": 55},
    "dqvae_triple_feature": {"loss": 55},
    "vqgan_f16": {"loss": 55},
    "llamagen_vq16": {"quantize": 1},
    "maskgit_vqgan": {},
    "open_magvit2": {"loss": 55, "model_ema": 2},
}
"""By the first part of their names, the number of published tensors that have no place here."""


@pytest.mark.parametrize("network", LEFT_OUT)
def test_every_tensor_at_published_size_is_mapped_or_left_out_by_name(network):
    weights = select(published(network))
    translate = import_module(f"graincode.interop.{NETWORKS[network]}").translate
    found = translate(weights, Options(256))
    counts = about(network)["published"]["parameters"]
    assert found.dropped | weights.outside == LEFT_OUT[network]
    own = {
        name: value
        for name, value in found.weights.items()
        if name.startswith(("encoder.", "decoder.", "project", "router.c", "router.n"))
    }
    assert sum(value.numel() for value in own.values()) == sum(counts.get(part, 0) for part in PARTS)
