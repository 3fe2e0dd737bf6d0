"""Exports in tests/golden were written by graincode 0.1.0, with its codes, samples and pixels."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import graincode
from graincode import export
from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.images import from_uint8

GOLDEN = Path(__file__).with_name("golden")
TARGET = "_target_"


@pytest.fixture
def tokenizer(tmp_path):
    """A copy of an export, to be tampered with."""
    return shutil.copytree(GOLDEN / "tokenizer", tmp_path / "export")


@pytest.fixture(scope="module")
def expected():
    with np.load(GOLDEN / "expected.npz", allow_pickle=False) as arrays:
        return {name: torch.from_numpy(value) for name, value in arrays.items() if value.dtype.kind != "U"}


def edit(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def upgraded(path, kind):
    """The configuration node of an export of the format before, as today's code writes it."""
    node, weights = json.loads((path / "config.json").read_text())["model"], load_file(path / "weights.safetensors")
    for upgrade in export.UPGRADES:
        upgrade(kind, node, weights)
    return node


def same(codes, expected, prefix=""):
    grains, indices = (expected[f"{prefix}{name}"].long() for name in ("grains", "indices"))
    return torch.equal(codes.grains, grains) and torch.equal(codes.indices, indices)


def test_a_tokenizer_of_the_format_before_gives_the_same_codes_and_pixels(expected):
    model = graincode.load_tokenizer(GOLDEN / "tokenizer")
    assert not model.training
    codes = model.tokenize(from_uint8(expected["images"].permute(0, 3, 1, 2)))
    assert same(codes, expected)
    assert torch.allclose(model.detokenize(codes), expected["pixels"], atol=1e-6)  # sums differ between processors


@pytest.mark.parametrize("kind", ["autoregressive", "masked"])
def test_a_generator_of_the_format_before_gives_the_same_samples(expected, kind):
    generator, tokenizer = export.load_pair(GOLDEN / kind, str(GOLDEN / "tokenizer"))
    samples = generator.module.sample(torch.tensor([0, 1, 2, 0]), seed=3, temperature=0.9, guidance_scale=2.0)
    assert same(samples, expected, f"{kind}_")
    assert tokenizer.module.detokenize(samples).shape == (4, 3, 16, 16)


@pytest.mark.parametrize(
    ("kind", "name"), [("tokenizer", "tokenizer"), ("generator", "autoregressive"), ("generator", "masked")]
)
def test_a_saved_module_loads_unchanged(tmp_path, expected, kind, name):
    before = export.load_export(GOLDEN / name, kind)
    identity = export.save_export(tmp_path / "new", kind, upgraded(GOLDEN / name, kind), before.module, data="none")
    after = export.load_export(tmp_path / "new", kind)
    assert (after.identity, after.provenance) == (identity, {"data": "none"})
    assert all(map(torch.equal, before.module.state_dict().values(), after.module.state_dict().values()))
    if kind == "tokenizer":
        codes = GrainCodes(expected["grains"].long(), expected["indices"].long(), before.module.layout)
        assert torch.equal(after.module.detokenize(codes), before.module.detokenize(codes))


def test_a_generator_needs_the_tokenizer_of_its_codes(tokenizer):
    edit(tokenizer, lambda c: c["provenance"].update(data="other"))  # another identity
    with pytest.raises(GraincodeError, match=f"{tokenizer} is"):
        export.load_pair(GOLDEN / "masked", tokenizer)
    with pytest.raises(GraincodeError, match="precision=float8"):
        export.load_pair(GOLDEN / "masked", GOLDEN / "tokenizer", precision="float8")


def test_weights_start_a_model_of_the_same_build_alone(tokenizer):
    model = graincode.load_tokenizer(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    identity = export.load_weights(model, tokenizer, "tokenizer")
    assert identity == export.load_export(tokenizer, "tokenizer").identity
    assert any(parameter.any() for parameter in model.parameters())
    with pytest.raises(GraincodeError, match="built otherwise"):
        export.load_weights(nn.Linear(2, 2), tokenizer, "tokenizer")


@pytest.mark.parametrize(
    "target",
    ["torch.utils.collect_env.run", "os.system", "graincode.jobs.sample.main", "torch.nn.Linear", ["os.system"]],
)
def test_a_config_that_names_anything_else_is_refused(tokenizer, target, monkeypatch):
    monkeypatch.setattr(export, "import_module", lambda _: pytest.fail("it was imported"))
    edit(tokenizer, lambda c: c["model"].update(router={TARGET: target, "command": "touch /tmp/owned"}))
    with pytest.raises(GraincodeError, match="which exports may not name"):
        graincode.load_tokenizer(tokenizer)


def test_keys_that_hydra_would_obey_are_refused(tokenizer):
    edit(tokenizer, lambda c: c["model"].update(_args_=["x"]))
    with pytest.raises(GraincodeError, match="do not trust"):
        graincode.load_tokenizer(tokenizer)


class Boom:
    def __reduce__(self):
        return (pytest.fail, ("a pickle ran",))


@pytest.mark.parametrize("matching", [False, True])
def test_a_pickle_in_place_of_weights_is_refused(tokenizer, matching):
    content = pickle.dumps(Boom())
    (tokenizer / "weights.safetensors").write_bytes(content)
    if matching:
        edit(tokenizer, lambda c: c.update(weights_sha256=hashlib.sha256(content).hexdigest()))
    with pytest.raises(GraincodeError, match="damaged"):
        graincode.load_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=99), f"reads {export.FORMATS['tokenizer']}; install a newer"),
        (lambda c: c.update(format=1), "train the model again"),
        (lambda c: c.update(format="4"), "train the model again"),
        (lambda c: c.update(kind="generator"), "a generator; expected a tokenizer"),
        (lambda c: c.pop("model"), "damaged"),
        (lambda c: c.update(model=[]), "damaged"),
        (lambda c: c["model"]["encoder"].update(channels=16), "damaged"),
        (lambda c: c["model"]["encoder"].update(chanels=16), "damaged"),
        (lambda c: c["model"]["encoder"].update(channels=-1), "export"),
    ],
)
def test_damaged_or_newer_exports_are_refused(tokenizer, change, message):
    edit(tokenizer, change)
    with pytest.raises(GraincodeError, match=message) as error:
        graincode.load_tokenizer(tokenizer)
    assert str(error.value).startswith(str(tokenizer))
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_noticed(tokenizer):
    weights = tokenizer / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(GraincodeError, match="has changed"):
        graincode.load_tokenizer(tokenizer)


def test_a_truncated_or_missing_export_is_refused(tokenizer):
    weights = tokenizer / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(GraincodeError, match="damaged"):
        graincode.load_tokenizer(tokenizer)
    with pytest.raises(GraincodeError, match="no export"):
        graincode.load_tokenizer(tokenizer / "nothing")


def test_a_class_of_one_s_own_can_be_registered(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_ALLOWED", dict(export._ALLOWED))

    class Mine(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.linear = nn.Linear(width, width)

    config = {TARGET: "mylab.Mine", "width": 3}
    with pytest.raises(GraincodeError, match=r"graincode\.export\.register"):
        export.save_export(tmp_path / "mine", "tokenizer", config, Mine(3))
    assert not (tmp_path / "mine").exists()
    export.register("mylab.Mine", Mine)
    identity = export.save_export(tmp_path / "mine", "tokenizer", config, Mine(3))
    assert export.load_export(tmp_path / "mine", "tokenizer").identity == identity


def test_a_plugin_that_is_not_there_is_named(tokenizer, monkeypatch):
    monkeypatch.setenv("GRAINCODE_PLUGINS", "nosuch")
    with pytest.raises(GraincodeError, match="GRAINCODE_PLUGINS=nosuch: expected a module"):
        export.load_export(tokenizer, "tokenizer")


def test_every_class_that_exports_may_name_is_there():
    for name, cls in export._ALLOWED.items():
        package, _, attribute = name.rpartition(".")
        assert isinstance(cls or getattr(export.import_module(package), attribute), type)


def test_an_export_is_never_overwritten(tokenizer):
    model = graincode.load_tokenizer(tokenizer)
    with pytest.raises(GraincodeError, match="is there already"):
        export.save_export(tokenizer, "tokenizer", {}, model)


def test_importing_the_package_imports_no_torch():
    code = "import sys, graincode; dir(graincode); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False).returncode == 0
    assert {"CodeLayout", "load_generator"} <= set(dir(graincode))
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        _ = graincode.load
