import pytest
import torch

from graincode.api import load_tokenizer
from graincode.config.job import build, with_layout
from graincode.config.schema import config_directory
from graincode.config.validate import check
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.core.rng import SampleRng
from graincode.export import save_export
from graincode.tokenizer import EntropyDensity, GradientDensity, Probe, QuantileRouter, RandomDensity, VarianceDensity

LAYOUT = CodeLayout((32, 32), ((8, 8), (4, 4)), 16)
SMALL = ["tokenizer.size.channels=8", "tokenizer.code_dim=8", "tokenizer.codebook_size=16"]
MEASURES = [EntropyDensity, GradientDensity, VarianceDensity, RandomDensity]


def pictures():
    return torch.rand(8, 3, 32, 32) * torch.rand(8, 3, 1, 32) * 2 - 1


@pytest.mark.parametrize("measure", MEASURES)
def test_thresholds_of_another_measure_are_refused(measure):
    router = QuantileRouter(LAYOUT, measure(), [0.5, 0.5])
    router.calibrate([Probe(pictures(), list, list)])
    for other in MEASURES:
        twin = QuantileRouter(LAYOUT, other(), [0.5, 0.5])
        if other is measure:
            twin.load_state_dict(router.state_dict())
        else:
            with pytest.raises((GraincodeError, RuntimeError)):
                twin.load_state_dict(router.state_dict())


@pytest.mark.parametrize("name", ["gradient", "variance"])
def test_its_configuration_makes_a_tokenizer_that_an_export_brings_back(name, tmp_path):
    assert (config_directory() / "tokenizer" / "router" / f"{name}.yaml").is_file()
    cfg = check("train_tokenizer", [f"tokenizer/router={name}", *SMALL])
    config = with_layout(cfg.tokenizer.model, LAYOUT)
    tokenizer, images = build(config).eval(), pictures()
    report = tokenizer.calibrate([images])
    assert report["achieved_1"] == pytest.approx(0.5, abs=0.01)
    tokenizer.initialize([images], SampleRng(0, torch.arange(8)))
    save_export(tmp_path / "export", "tokenizer", config, tokenizer)
    found = load_tokenizer(tmp_path / "export").tokenize(images, [0.7, 0.3])
    assert torch.equal(found.grains, tokenizer.tokenize(images, [0.7, 0.3]).grains)
    assert float(found.grains.float().mean()) == pytest.approx(0.3, abs=0.02)
