"""What is said of errors."""

import errno

import pytest
import torch
from omegaconf import OmegaConf

from graincode.config.errors import Keys, border, compose, explain, nearest
from graincode.config.job import build
from graincode.config.schema import JOBS, config_directory
from graincode.core.errors import GraincodeError


def test_the_nearest_key_is_suggested():
    assert nearest("codebok", {"codebook", "trainer"}) == "type codebook"
    assert "begins with one of data, trainer" in nearest("zzz", {"data.root", "trainer.steps"})


def test_every_root_config_is_there():
    for job in JOBS:
        assert (config_directory() / f"{job}.yaml").is_file()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "log.jsonl"), "no room on the disk for log.jsonl"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "give a smaller trainer.batch_size"),
    ],
)
def test_no_room_is_the_user_s_error(error, said):
    with pytest.raises(GraincodeError, match=said), border(OmegaConf.create({"trainer": {}})):
        raise error


def test_other_errors_pass():
    with pytest.raises(OSError, match="denied"), border(OmegaConf.create({})):
        raise OSError(errno.EACCES, "denied")


@pytest.mark.parametrize(("message", "node", "expected"), [
    ("batch_size=0: no", "features.lite0", "features.lite0.batch_size=0: no"),
    ("batch_size=250: no", "", "batch_size=250: no"), ("batch_size=0: no", "", "features.lite0.batch_size=0: no"),
    ("given.images=0: no", "", "given.images=0: no"), ("power=3: no", "", "features.lite0.power=3: no"),
    ("images: no export", "", "init_from=images: no export"),
    ("junk.png is damaged", "", "weights=junk.png is damaged"),
    ("junk.png has codes of 1", "", "weights=junk.png has codes of 1"),
    ("images of one size", "", "images of one size"),
])  # fmt: skip
def test_messages_get_the_key_that_was_typed(message, node, expected):
    features = {"lite0": {"batch_size": 0, "power": 3}}
    config = {"batch_size": 250, "features": features, "init_from": "images", "weights": "junk.png"}
    keys = Keys(OmegaConf.create(config | {"given": {"images": 0}}))
    assert keys.explain(message, node) == expected


class Refusing:
    def __init__(self, power, names):
        raise ValueError(f"power={power}: expected more" if names else "no power")


@pytest.mark.parametrize(("names", "expected"), [(True, "density.power=-1: expected more"), (False, "no power")])
def test_a_constructor_s_plain_value_error_gets_a_key(names, expected, monkeypatch):
    monkeypatch.setenv("GRAINCODE_PLUGINS", Refusing.__module__)
    target = f"{Refusing.__module__}.Refusing"
    cfg = OmegaConf.create({"density": {"_target_": target, "power": -1, "names": names}})
    with pytest.raises(GraincodeError, match=f"^{expected}$"):
        build(cfg.density)


@pytest.mark.parametrize(("typed", "expected"), [
    (["data=mnist"], "data=mnist: expected one of cifar10, "),
    (["tokenizer/router=none"], "tokenizer/router=none: expected one of coding, entropy, "),
    (["tokenizer.router.density.powr=2"], "type tokenizer.router.density.power"),
])  # fmt: skip
def test_groups_of_a_directory_of_one_s_own_are_known(typed, expected, tmp_path):
    file = tmp_path / "tokenizer" / "router" / "laplacian.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("defaults: [variance, _self_]\ndensity:\n  power: 2\n")
    own = [override for override in ["tokenizer/router=laplacian"] if not typed[0].startswith("tokenizer/")]
    with pytest.raises(Exception, match=r".") as caught:
        compose("train_tokenizer", [f"hydra.searchpath=[file://{tmp_path}]", *own, *typed])
    said = explain(caught.value, "train_tokenizer", ["--config-dir", str(tmp_path), *own, *typed])
    assert expected in said
    assert ("laplacian" in said) == typed[0].startswith("tokenizer/")
