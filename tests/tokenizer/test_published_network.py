"""`tokenizer=dqvae` is the published network: with its weights, it computes its numbers."""

import pytest
import torch
from helpers_golden import golden, images_of
from helpers_parity import differences, import_golden

from graincode.config.job import build, with_layout
from graincode.config.validate import check
from graincode.core.density import region_entropy
from graincode.core.layout import CodeLayout
from graincode.core.rng import SampleRng

DUAL = ["tokenizer/size=paper_dual", "tokenizer.grains=[[16,16],[8,8]]", "tokenizer.size.attention=[4,8]"]
TRIPLE = ["tokenizer/size=paper_triple", "tokenizer.grains=[[32,32],[16,16],[8,8]]", "tokenizer.ratios=[0.4,0.3,0.3]",
          "tokenizer.size.attention=[4,8,16]"]  # fmt: skip
FEATURE = ["tokenizer/router=feature"]
THRESHOLD = 1.6777750253677368


def network_of(settings, pixels):
    """The network that settings make, narrow, in evaluation mode."""
    narrow = ["tokenizer.size.channels=32", "tokenizer.code_dim=64", "tokenizer.codebook_size=256"]
    cfg = check("train_tokenizer", ["data=fashion_mnist", "tokenizer=dqvae", *settings, *narrow])
    with_layout(cfg.tokenizer.model, CodeLayout((pixels, pixels), cfg.tokenizer.grains, 256, 0, cfg.tokenizer.codebook))
    return build(cfg.tokenizer.model).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize(
    ("network", "settings", "pixels"),
    [
        ("dqvae_dual_entropy", DUAL, 64),
        ("dqvae_dual_feature", [*DUAL, *FEATURE], 64),
        ("dqvae_triple_feature", [*TRIPLE, *FEATURE], 128),
    ],
)
def test_the_configuration_gives_the_published_numbers(network, settings, pixels, dtype, tolerance, tmp_path):
    module = network_of(settings, pixels)
    module.load_state_dict(import_golden(network, tmp_path).module.state_dict())
    found = differences(module, network, dtype, count=1)
    integers = {name: found.pop(name)[0] for name in ("grains", "indices")}
    assert set(integers.values()) == {0}
    assert {"features_coarse", "features_fine", "latent", "reconstruction"} <= set(found)
    assert max(absolute for absolute, _ in found.values()) < tolerance


def test_the_published_threshold_of_the_current_entropy_gives_the_published_grains():
    found = golden("dqvae_dual_entropy")
    density = region_entropy(images_of(found, torch.float32), (16, 16))
    assert torch.equal((density > THRESHOLD).long(), found["grains"])


def test_reconstructions_are_not_clamped_in_training_but_where_they_are_shown():
    module = network_of(DUAL, 64)
    with torch.no_grad():
        module.decoder.last.weight.mul_(100)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    module.initialize([images], SampleRng(0, torch.arange(2)))
    module.calibrate([images])
    assert float(module.train()(images).images.detach().abs().max()) > 1.5
    assert float(module.eval().detokenize(module.tokenize(images)).abs().max()) <= 1
