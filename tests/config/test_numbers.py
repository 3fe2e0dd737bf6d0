"""No number in a configuration is taken that cannot be."""

import math

import pytest
from omegaconf import OmegaConf

from graincode.config.errors import compose
from graincode.config.job import build
from graincode.config.validate import check, validate
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.runs.identity import flatten
from graincode.tokenizer.decoder import GrainDecoder
from graincode.tokenizer.encoder import TrunkSize

CONFIGURATIONS = [
    ("train_tokenizer", ["data=image_folder", "data.root=x", "tokenizer/adversary=patch", "tokenizer/quantizer=simvq"]),
    ("train_tokenizer", ["data=fashion_mnist", "tokenizer=dqvae", "tokenizer/router=feature"]),
    ("train_generator", ["generator=dgit_ar", "optimizer=adamw", "hardware=gpu"]),
    ("train_generator", ["generator=dgit_nar"]),
    ("sample", ["sampler=masked"]),
    ("sample", ["sampler=autoregressive"]),
    ("evaluate", ["evaluation=generation", "data=fashion_mnist"]),
    ("evaluate", ["evaluation=likelihood"]),
    ("extract_codes", ["data=fashion_mnist"]),
]


@pytest.mark.slow
@pytest.mark.when("a number is NaN or infinite", "one line names its key")
@pytest.mark.parametrize(("job", "overrides"), CONFIGURATIONS)
def test_every_number_is_finite(job, overrides):
    whole = compose(job, overrides)
    numbers = {key for key, value in flatten(OmegaConf.to_container(whole)).items() if type(value) in (int, float)}
    assert numbers
    for key in numbers:
        for value in (math.nan, math.inf):
            cfg = whole.copy()
            OmegaConf.update(cfg, key, value)
            with pytest.raises(GraincodeError, match=f"{key.rpartition('.')[2]}={value}"):
                validate(job, cfg)


@pytest.mark.parametrize("value", ["nan", "[0.5,inf]"])
def test_a_number_in_a_list_is_finite(value):
    with pytest.raises(GraincodeError, match="ratios="):
        check("extract_codes", ["data=fashion_mnist", f"ratios={value}"])


@pytest.mark.when("a number of hardware is out of range", "one line names its key")
@pytest.mark.parametrize(
    "setting",
    ["workers=-1", "workers=1000000000", "threads=-1", "threads=0", "timeout_minutes=0", "timeout_minutes=1e9",
     "main_port=70000", "main_port=0", "num_processes=0", "num_processes=-1", "num_nodes=0", "node_rank=1",
     "node_rank=-1", "gradient_accumulation=0", "peak_tflops=-1"],
)  # fmt: skip
def test_numbers_of_hardware_are_checked(setting):
    name = setting.partition("=")[0]
    with pytest.raises(GraincodeError, match=rf"^hardware\.{name}="):
        build(check("sample", [f"hardware.{setting}"]).hardware)


@pytest.mark.when("guidance is below 0", "one line names sampler.guidance_scale")
def test_guidance_below_zero_is_refused():
    with pytest.raises(GraincodeError, match=r"^sampler\.guidance_scale=-1"):
        build(check("sample", ["sampler.guidance_scale=-1"]).sampler)


def test_a_decoder_has_no_negative_number_of_blocks():
    layout = CodeLayout((32, 32), [[8, 8], [4, 4]], 16, 0)
    with pytest.raises(GraincodeError, match="coarse_blocks=-1"):
        GrainDecoder(layout, TrunkSize(8, [1, 2], blocks=1, attention=[], patch=2), 8, coarse_blocks=-1)
