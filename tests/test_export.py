import hashlib
import json
import os
import pickle
import shutil

import pytest
import torch
from strategies import random_codes, random_grains
from torch import nn

import graincode
from graincode import export
from graincode.core.errors import GraincodeError

TARGET = "_target_"


@pytest.fixture
def tokenizer(inside, tmp_path):
    """A copy of an export, to be tampered with."""
    return shutil.copytree("runs/train_tokenizer/tok/export", tmp_path / "export")


def edit(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def test_an_export_rebuilds_the_model(tokenizer):
    model = graincode.load_tokenizer(tokenizer)
    assert not model.training
    codes = random_codes(model.layout, random_grains(model.layout, 3))
    images = model.detokenize(codes)
    assert images.shape == (3, 3, 32, 32)
    assert images.abs().max() <= 1
    assert (model.tokenize(images, ratios=[1, 0]).lengths == 16).all()
    again = graincode.load_tokenizer(str(tokenizer))
    assert torch.equal(again.detokenize(codes), images)


@pytest.mark.parametrize(
    "target", ["torch.utils.collect_env.run", "os.system", "graincode.jobs.sample.main", "torch.nn.Linear"]
)
def test_a_config_that_names_anything_else_is_refused(tokenizer, target, monkeypatch):
    monkeypatch.setattr(os, "system", lambda _: pytest.fail("it ran"))
    edit(tokenizer, lambda c: c["model"].update(router={TARGET: target, "command": "touch /tmp/owned"}))
    with pytest.raises(GraincodeError, match="not among the classes that an export may name"):
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
    with pytest.raises(GraincodeError, match="is damaged"):
        graincode.load_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=99), "reads 4: type pip install -U graincode"),
        (lambda c: c.update(format=1), "train it anew"),
        (lambda c: c.pop("model"), "is damaged"),
        (lambda c: c["model"]["encoder"].update(channels=16), "is damaged"),
        (lambda c: c["model"]["encoder"].update(chanels=16), "is damaged"),
        (lambda c: c["model"]["router"]["density"].update(of="error"), "another density definition"),
    ],
)
def test_damaged_or_newer_exports_are_refused(tokenizer, change, message):
    edit(tokenizer, change)
    with pytest.raises(GraincodeError, match=message):
        graincode.load_tokenizer(tokenizer)


def test_a_flipped_bit_is_noticed(tokenizer):
    weights = tokenizer / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(GraincodeError, match="its content has changed"):
        graincode.load_tokenizer(tokenizer)


def test_a_truncated_export_is_refused(tokenizer):
    weights = tokenizer / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(GraincodeError, match="is damaged"):
        graincode.load_tokenizer(tokenizer)
    with pytest.raises(GraincodeError, match="is no export"):
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


def test_an_export_is_never_overwritten(tokenizer):
    model = graincode.load_tokenizer(tokenizer)
    with pytest.raises(GraincodeError, match="is there already"):
        export.save_export(tokenizer, "tokenizer", {}, model)
