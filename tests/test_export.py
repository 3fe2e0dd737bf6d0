"""Exports in tests/golden were written by graincode 0.1.0, with its codes, samples and pixels."""

import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
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


def reweigh(path, change):
    """Change an export's tensors, or the bytes of their file, and have the hash agree."""
    file = path / "weights.safetensors"
    if isinstance(change, bytes):
        file.write_bytes(change)
    else:
        weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(weights)
        save_file(weights, file)
    edit(path, lambda c: c.update(weights_sha256=hashlib.sha256(file.read_bytes()).hexdigest()))


def everywhere(name, value):
    """A change of all nodes of a model's configuration that have a key."""

    def change(config):
        for node in export._nodes(config["model"]):
            node |= {name: value} if name in node else {}

    return change


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
        (lambda c: c.update(format="4"), "damaged"),
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


MANY = [[2 ** (60 - g // 2), 2 ** (60 - (g + 1) // 2)] for g in range(119)]


@pytest.mark.when("an export asks for a larger model than its weights are", "it is refused before memory is taken")
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer", everywhere("blocks", 20_000)),
        ("tokenizer", everywhere("coarse_blocks", 10**9)),
        ("tokenizer", everywhere("codebook_size", 10**9)),
        ("tokenizer", everywhere("image_size", [10**6, 10**6])),
        ("tokenizer", lambda c: (everywhere("image_size", [2**60] * 2)(c), everywhere("grains", MANY)(c))),
        ("tokenizer", everywhere("channels", 10**6)),
        ("tokenizer", everywhere("density", {TARGET: "graincode.tokenizer.EntropyDensity", "bins": 10**7})),
        ("autoregressive", everywhere("layers", 20_000)),
        ("autoregressive", everywhere("width", 10**5)),
        ("masked", everywhere("image_size", [10**5, 10**5])),
        ("masked", everywhere("classes", 10**9)),
    ],
)
def test_a_configuration_asks_for_no_more_than_weights_hold(tmp_path, name, change):
    path = shutil.copytree(GOLDEN / name, tmp_path / "export")
    edit(path, change)
    with pytest.raises(
        GraincodeError, match=r"asks for a larger model than weights.safetensors holds|expected 119 shares"
    ):
        export.load_export(path, "tokenizer" if name == "tokenizer" else "generator")
    assert torch.is_grad_enabled()


@pytest.mark.when("weights have NaN or infinite values", "the export is refused, with the tensor's name")
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tokenizer, value):
    reweigh(tokenizer, lambda weights: weights["decoder.last.bias"].fill_(value))
    with pytest.raises(GraincodeError, match=r"'decoder\.last\.bias' has NaN or infinite"):
        graincode.load_tokenizer(tokenizer)
    reweigh(tokenizer, lambda w: (w["decoder.last.bias"].zero_(), w["router.quantiles"].fill_(torch.nan)))
    model = graincode.load_tokenizer(tokenizer)  # not calibrated yet, which is said where it matters
    with pytest.raises(GraincodeError, match="no thresholds yet"):
        model.tokenize(torch.zeros(1, 3, 16, 16))


WEIGHTS = (GOLDEN / "tokenizer" / "weights.safetensors").read_bytes()


@pytest.mark.when("an export's weights are cut, another model's, or no weights", "it is refused in one line")
@pytest.mark.parametrize(
    "change",
    [
        b"",
        WEIGHTS[:7],
        WEIGHTS[:-50],
        WEIGHTS + b"\0",
        (2**63).to_bytes(8, "little") + WEIGHTS[8:],
        (2**26).to_bytes(8, "little") + b" " * 2**26,
        WEIGHTS.replace(b"[4,3,3,3]", b"[3,3,3,4]"),
        WEIGHTS.replace(b'"F32"', b'"F64"'),
        (GOLDEN / "masked" / "weights.safetensors").read_bytes(),
        lambda weights: weights.pop("decoder.last.bias"),
        lambda weights: weights.update(more=torch.zeros(2)),
        lambda weights: weights.update({"decoder.last.bias": weights["decoder.last.bias"][:5].clone()}),
    ],
)
def test_weights_that_do_not_belong_are_refused(tokenizer, change):
    reweigh(tokenizer, change)
    with pytest.raises(GraincodeError, match="damaged") as error:
        graincode.load_tokenizer(tokenizer)
    assert "\n" not in str(error.value)


def test_weights_larger_than_the_machine_s_memory_are_not_read(tokenizer):
    size = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with (tokenizer / "weights.safetensors").open("r+b") as opened:
        opened.truncate(size)  # which takes no room
    with pytest.raises(GraincodeError, match="larger than the memory of this machine"):
        graincode.load_tokenizer(tokenizer)


def test_weights_that_are_not_finite_are_not_exported(tokenizer, tmp_path):
    model, config = graincode.load_tokenizer(tokenizer), upgraded(tokenizer, "tokenizer")
    model.decoder.last.bias.data[0] = torch.nan
    with pytest.raises(GraincodeError, match=r"'decoder\.last\.bias' has NaN"):
        export.save_export(tmp_path / "new", "tokenizer", config, model)
    assert not (tmp_path / "new").exists()


HOSTILE = [
    None, -1, 0, 10**9, 10**30, 1e308, float("nan"), "x", "\x1b[31m\n", True, [], {}, [1] * 5000, [[10**6] * 3] * 3,
    {TARGET: "os.system", "command": "exit"}, {"_args_": [1]}, {TARGET: "graincode.tokenizer.GrainEncoder"},
]  # fmt: skip


def places(value, at=()):
    """Paths of keys to all parts of a configuration."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*at, key)
        yield from places(inner, (*at, key))


@pytest.mark.when(
    "a value of an export's config.json is not what we wrote", "one line, or a model that works; nothing runs"
)
@pytest.mark.parametrize("name", ["tokenizer", "autoregressive", "masked"])
def test_a_configuration_changed_anywhere_never_runs_and_never_breaks(tmp_path, monkeypatch, name):
    for runner in ("system", "popen", "execv"):
        monkeypatch.setattr(os, runner, lambda *_: pytest.fail("it ran"))
    path, rng = shutil.copytree(GOLDEN / name, tmp_path / "export"), random.Random(0)
    original = json.loads((path / "config.json").read_text())
    known, refused = list(places(original)), []
    for at in rng.choices(known, k=60):
        config = part = json.loads(json.dumps(original))
        for key in at[:-1]:
            part = part[key]
        part[at[-1]] = rng.choice(HOSTILE)
        (path / "config.json").write_text(json.dumps(config))
        try:
            if name == "tokenizer":
                model = graincode.load_tokenizer(path)
                model.detokenize(model.tokenize(torch.zeros(1, 3, 16, 16)))
            else:
                graincode.load_generator(path).sample(torch.zeros(1).long(), batch_size=1)
        except GraincodeError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all(map(str.isprintable, refused))


@pytest.mark.when("config.json is cut, too large, too deep, or no JSON", "the file is named as damaged")
@pytest.mark.parametrize("text", [b"", b"null", b"[1]", b"\xff\xfe", b"[" * 10**5, b" " * 2**23, b'{"format": 5}'])
def test_a_damaged_config_is_named(tokenizer, text):
    (tokenizer / "config.json").write_bytes(text)
    with pytest.raises(GraincodeError, match=r"config\.json is damaged"):
        graincode.load_tokenizer(tokenizer)


def test_the_model_of_an_export_is_of_its_kind(tmp_path):
    path = shutil.copytree(GOLDEN / "masked", tmp_path / "export")
    edit(path, lambda c: c.update(kind="tokenizer", format=export.FORMATS["tokenizer"] - 1))
    with pytest.raises(GraincodeError, match="DGiTNAR is no tokenizer"):
        graincode.load_tokenizer(path)


def test_parts_of_other_layouts_are_refused(tokenizer):
    edit(tokenizer, lambda c: c["model"]["encoder"]["layout"].update(image_size=[32, 32]))
    with pytest.raises(GraincodeError, match="different layouts"):
        graincode.load_tokenizer(tokenizer)


def test_loading_takes_no_random_numbers_but_those_of_building(tokenizer):
    torch.manual_seed(0)
    export.build_node(upgraded(tokenizer, "tokenizer"))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    graincode.load_tokenizer(tokenizer)
    assert torch.equal(state, torch.get_rng_state())


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

        def tokenize(self, images):
            return images

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
