import pytest
import torch

from graincode.api import load_tokenizer
from graincode.config.job import build, with_layout
from graincode.config.validate import check
from graincode.core import density
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.core.rng import SampleRng
from graincode.export import save_export
from graincode.tokenizer import CodingDensity, EntropyDensity

LAYOUT = CodeLayout((32, 32), ((8, 8), (4, 4)), 16)
SMALL = ["tokenizer.size.channels=8", "tokenizer.code_dim=8", "tokenizer.codebook_size=16"]


def images():
    return torch.rand(8, 3, 32, 32) * torch.rand(8, 3, 1, 32) * 2 - 1


@pytest.mark.parametrize("name", ["gradient", "variance", "entropy", "entropy_wide", "random", "coding", "fixed"])
def test_its_configuration_makes_a_tokenizer_that_an_export_brings_back(name, tmp_path):
    cfg = check("train_tokenizer", [f"tokenizer/router={name}", *SMALL])
    config = with_layout(cfg.tokenizer.model, LAYOUT)
    tokenizer, seen = build(config).eval(), images()
    tokenizer.initialize([seen], SampleRng(0, torch.arange(8)))
    report = tokenizer.calibrate([seen])
    assert report["achieved_1"] == pytest.approx(0.5, abs=0.01)
    save_export(tmp_path / "export", "tokenizer", config, tokenizer)
    found = load_tokenizer(tmp_path / "export").tokenize(seen, [0.7, 0.3])
    assert torch.equal(found.grains, tokenizer.tokenize(seen, [0.7, 0.3]).grains)
    assert float(found.grains.float().mean()) == pytest.approx(0.3, abs=0.02)


def test_entropy_is_finite_and_orders_regions():
    flat, busy = torch.full((1, 3, 8, 8), -1.0), torch.rand(1, 3, 8, 8) * 2 - 1
    values = [float(density.region_entropy(x, (8, 8))) for x in (flat, busy)]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[1] > 2
    levels = torch.linspace(-1, 1, 999)[:, None, None, None].expand(-1, 3, 8, 8)
    entropy = density.region_entropy(levels, (8, 8))
    assert entropy.isfinite().all()
    assert 0.6 < float(entropy.max()) <= 0.7  # a flat patch between two bins: ln 2
    with pytest.raises(GraincodeError, match="sigma"):
        density.region_entropy(flat, (8, 8), sigma=1e-4)


@pytest.mark.parametrize(
    ("bins", "sigma", "expected"), [(0, 0.01, "bins=0"), (1, 0.01, "bins=1"), (-3, 1, "bins=-3"), (32, -1, "sigma=-1")]
)
def test_histograms_that_cannot_be_are_refused(bins, sigma, expected):
    with pytest.raises(GraincodeError, match=f"^{expected}: expected "):
        EntropyDensity(bins, sigma)


@pytest.mark.parametrize("name", ["of", "in_training"])
def test_other_measures_are_refused(name):
    with pytest.raises(GraincodeError, match=f"^{name}=both: expected one of error, gain"):
        CodingDensity(**{name: "both"})
