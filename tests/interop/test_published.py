"""Imported networks against the outputs of their authors' code, and against names and shapes at published size."""

import re
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


def translated(network, tensors):
    """The layout of a network at published size."""
    weights = select(tensors)
    node = import_module(f"graincode.interop.{NETWORKS[network]}").translate(weights, Options(256)).node
    return node["layout"]["grains"], node["layout"]["codebook_size"]


def test_vqgan_has_any_number_of_entries():
    tensors = published("vqgan_f16") | {"quantize.embedding.weight": torch.empty(16384, 256, device="meta")}
    tensors = {name: value for name, value in tensors.items() if not name.startswith("loss.discriminator.main.11")}
    assert translated("vqgan_f16", tensors) == ([[16, 16]], 16384)


@pytest.mark.parametrize(
    ("network", "levels"),
    [
        ("llamagen_vq16", ("conv_blocks.", "conv_blocks.")),
        ("open_magvit2", ("down.", "up.")),
        ("vqgan_f16", ("down.", "up.")),
    ],
)
def test_a_network_with_a_level_less_has_codes_of_8_pixels(network, levels):
    """LlamaGen's VQ-8 and Open-MAGVIT2 at 128 pixels: widths [1, 2, 2, 4], the finest level left out."""
    tensors, from_coarse = {}, network == "llamagen_vq16"
    for name, value in published(network).items():
        found = re.fullmatch(rf"(encoder\.{levels[0]}|decoder\.{levels[1]}|decoder\.adaptive\.)(\d)(\..+)", name)
        if found is None:
            tensors |= {} if name.startswith("model_ema.") else {name: value}
        elif from_coarse and found[1].startswith("decoder"):
            last = found[2] == "4" or (found[2] == "3" and "upsample" in name)
            tensors |= {} if last else {name: value}
        elif found[2] != "0" and not (found[1].startswith("decoder") and found[2] == "1" and "upsample" in name):
            tensors[f"{found[1]}{int(found[2]) - 1}{found[3]}"] = value
    assert translated(network, tensors)[0] == [[8, 8]]
