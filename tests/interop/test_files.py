"""Files as their authors, trainers and downloads leave them."""

import argparse
import json
import os
import pickle
import sys
import types
import zipfile

import pytest
import torch
from helpers_golden import about, state_dict
from helpers_parity import NETWORKS
from safetensors.torch import save_file

from graincode.core.errors import GraincodeError
from graincode.interop.containers import read
from graincode.interop.convert import import_tokenizer
from graincode.jobs import import_weights

SMALL = "maskgit_vqgan"


@pytest.fixture(scope="module")
def tensors():
    return state_dict(SMALL)


@pytest.fixture
def save(tmp_path):
    """Writes an object by torch.save, and gives the path."""

    def write(value, name="file.pt"):
        torch.save(value, tmp_path / name)
        return tmp_path / name

    return write


def refused(path, family="maskgit"):
    """The one line of the error."""
    with pytest.raises(GraincodeError) as error:
        import_tokenizer(family, path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def same(path, tensors, **arguments):
    found = read(path, **arguments)
    assert set(found.tensors) == set(tensors)
    assert all(torch.equal(found.tensors[name], value.float()) for name, value in tensors.items())
    return found


@pytest.fixture
def foreign(monkeypatch):
    """A class of a module that is gone when the file is read, by its full name."""

    def make(name, base=object):
        module, _, short = name.rpartition(".")
        cls = type(short, (base,), {"__module__": module})
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        setattr(sys.modules[module], short, cls)
        return cls

    return make


@pytest.mark.when(
    "a checkpoint of Lightning 1.0 has a callback's class among its keys", "its weights are read without that class"
)
def test_a_class_that_keys_a_callback_is_not_needed(foreign, save, tensors, monkeypatch):
    callback = foreign("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    path = save({"epoch": 3, "callbacks": {callback: {"best": 1.0}}, "state_dict": tensors, "optimizer_states": [{}]})
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    same(path, tensors)
    assert not [name for name in sys.modules if name.startswith("pytorch_lightning")]


def test_arguments_of_a_training_run_are_not_needed(save, tensors):
    same(save({"model": tensors, "args": argparse.Namespace(lr=1e-4, betas=[0.9]), "steps": 5}), tensors)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.when("a file of weights would have to be unpickled", "it is refused, with the line that saves it anew")
@pytest.mark.parametrize("how", ["beside", "as a key", "in Namespace", "alone", "by pickle"])
def test_what_needs_unpickling_is_refused_and_not_run(how, save, tensors, tmp_path):
    bad = Touch(tmp_path / "made")
    values = {"beside": {"model": tensors, "x": bad}, "as a key": {"model": tensors, "x": {bad: 1}}, "alone": bad,
              "in Namespace": {"model": tensors, "args": argparse.Namespace(x=bad)}}  # fmt: skip
    path = tmp_path / "file.pt"
    if how == "by pickle":
        path.write_bytes(pickle.dumps(bad))
    else:
        save(values[how])
    message = refused(path)
    assert not (tmp_path / "made").exists()
    if how != "by pickle":
        assert "posix.mkdir" in message
        assert "torch.save({'model': torch.load(FILE, weights_only=False)['model']}, NEW)" in message


def test_a_module_or_another_class_is_refused_by_its_name(foreign, save, tensors):
    assert "torch.nn.modules.linear.Linear" in refused(save(torch.nn.Linear(2, 2)))
    settings = foreign("pytorch_lightning.utilities.parsing.AttributeDict", dict)
    assert "pytorch_lightning.utilities.parsing.AttributeDict" in refused(
        save({"state_dict": tensors, "hyper_parameters": settings(a=1)})
    )


@pytest.mark.when("a file of weights is cut short, or a page or pointer that a download left", "one line says which")
def test_what_is_no_file_of_weights_is_named(save, tensors, tmp_path):
    whole = save(tensors).read_bytes()
    for name, content, part in [
        ("half.pt", whole[: len(whole) // 2], "cut short"),
        ("empty.pt", b"", "empty"),
        ("empty.safetensors", b"", "empty"),
        ("half.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{", "cut short"),
        ("page.ckpt", b"\n<!DOCTYPE html><html>", "web page"),
        ("pointer.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1", "Git LFS"),
        ("text.pt", b"epoch 3", "no file of weights"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert part in refused(tmp_path / name)
    assert "no such file" in refused(tmp_path / "absent.pt")
    assert "holds list" in refused(save([1, 2]))
    assert "holds epoch, optimizer" in refused(save({"epoch": 1, "optimizer": {}}))
    assert "encoder.conv_in.weight nowhere" in refused(save({"a.weight": torch.zeros(2)}))


@pytest.mark.when("weights of one family are imported as another", "the family that they look like is named")
def test_another_family_is_named(save):
    for network, family in NETWORKS.items():
        path = save(dict.fromkeys(about(network)["small"]["state_dict"], torch.zeros(1)))
        for other in {*NETWORKS.values()} - {family}:
            assert refused(path, other).endswith(f"they look like {family}'s")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_widened(dtype, save, tensors):
    found = read(save({name: value.to(dtype) for name, value in tensors.items()}))
    for name, value in found.tensors.items():
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(value, tensors[name].to(dtype).to(value.dtype))


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module.model.", "first_stage_model."])
def test_a_prefix_of_all_names_is_taken_off(prefix, save, tensors):
    around = {"cond_stage_model.encoder.conv_in.weight": torch.zeros(1), "transformer.head.weight": torch.zeros(1)}
    around = around if prefix == "first_stage_model." else {}
    found = same(save({"state_dict": {prefix + name: value for name, value in tensors.items()} | around}), tensors)
    assert found.outside == {name.partition(".")[0]: 1 for name in around}


@pytest.mark.parametrize("kind", ["a key", "names without dots", "a prefix"])
def test_moving_averages_are_taken_unless_told_otherwise(kind, save, tensors):
    averages = {name: value * 2 for name, value in tensors.items()}
    flat = {f"model_ema.{name.replace('.', '')}": value for name, value in averages.items()}
    marked = {f"ema_model.{name}": value for name, value in averages.items()}
    path = save({
        "a key": {"model": tensors, "ema": averages},
        "names without dots": {"state_dict": tensors | flat | {"model_ema.decay": torch.tensor(0.999)}},
        "a prefix": {f"model.{name}": value for name, value in tensors.items()} | marked,
    }[kind])  # fmt: skip
    assert same(path, averages).averaged
    assert same(path, averages, averages=True).averaged
    assert not same(path, tensors, averages=False).averaged
    with pytest.raises(GraincodeError, match="no moving averages"):
        read(save(tensors, "plain.pt"), averages=True)


def shard(folder, tensors):
    """Tensors in two files and their index."""
    folder.mkdir()
    names, parts = list(tensors), {}
    for number, own in enumerate((names[:80], names[80:]), 1):
        save_file({name: tensors[name] for name in own}, folder / f"model-{number:05d}-of-00002.safetensors")
        parts |= dict.fromkeys(own, f"model-{number:05d}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    return folder


def test_parts_in_safetensors_are_one_file(tmp_path, tensors):
    folder = shard(tmp_path / "model", tensors)
    for path in (folder, folder / "model.safetensors.index.json"):
        assert set(same(path, tensors).files) == {
            "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        }  # fmt: skip
    assert "parts" in refused_after(lambda: (folder / "model-00002-of-00002.safetensors").unlink(), folder)
    for wrong in ("../model.safetensors", "/etc/passwd", "x.bin", 3):
        index = json.dumps({"weight_map": {"a": wrong}})
        (folder / "model.safetensors.index.json").write_text(index)
        assert "no index of safetensors" in refused(folder / "model.safetensors.index.json")


def refused_after(change, folder):
    change()
    return refused(folder / "model.safetensors.index.json")


def test_a_folder_has_one_model(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.fp16.safetensors")
    same(tmp_path, tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    assert "several" in refused(tmp_path)


@pytest.mark.when("imported weights lack tensors, or have unknown or misshapen ones", "they are counted and named")
def test_tensors_that_do_not_fit_are_counted_and_named(save, tensors):
    wrong = {name: value for name, value in tensors.items() if not name.startswith("decoder.mid.1")}
    wrong |= {"encoder.new.weight": torch.zeros(3), "decoder.conv_out.bias": torch.zeros(4)}
    message = refused(save(wrong))
    assert "6 missing (decoder.mid.1.conv1.weight, decoder.mid.1.conv2.weight, decoder.mid.1.norm1.bias)" in message
    assert "1 unknown (encoder.new.weight)" in message
    assert "1 of other shapes (decoder.conv_out.bias [4] instead of [3])" in message
    for name in ("quantize.embedding.weight", "encoder.down.0.block.0.conv1.weight"):
        assert name in refused(save({key: value for key, value in tensors.items() if key != name}))


def test_strange_shapes_make_one_line(save, tensors, tmp_path):
    for name, value, part in [
        ("encoder.conv_out.weight", torch.tensor(1.0), "no weights of maskgit"),
        ("encoder.down.0.block.0.conv1.weight", torch.zeros(0, 3, 3, 3), "multipliers=[0, 1, "),
        ("quantize.embedding.weight", torch.zeros(2, 3, 4), "code_dim=3: expected 64"),
    ]:
        assert part in refused(save(tensors | {name: value}))
    wide = dict.fromkeys(about("open_magvit2")["small"]["state_dict"], torch.zeros(64))
    assert "codes=2^64: expected 2^24 or fewer" in refused(save(wide), "magvit2")


def test_a_key_of_averages_that_holds_none_is_left_alone(save, tensors):
    path = save({"model": tensors, "ema": {"decay": torch.tensor(0.999)}})
    assert not same(path, tensors).averaged


def test_a_file_with_a_short_member_is_refused_and_a_deflated_one_is_read(save, tensors, tmp_path):
    for name, method, cut in [("short.pt", zipfile.ZIP_STORED, 10), ("deflated.pt", zipfile.ZIP_DEFLATED, None)]:
        with zipfile.ZipFile(save(tensors)) as old, zipfile.ZipFile(tmp_path / name, "w", method) as new:
            for member in old.namelist():
                new.writestr(member, old.read(member)[: cut if member.endswith("data/0") else None])
    assert "damaged" in refused(tmp_path / "short.pt")
    same(tmp_path / "deflated.pt", tensors)


def test_deeply_nested_json_is_one_line(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    for name, file in [("config.json", "model.safetensors"), ("model.safetensors.index.json",) * 2]:
        (tmp_path / name).write_text("[" * 200_000)
        with pytest.raises(GraincodeError, match=r"damaged|no index"):
            read(tmp_path / file)


def test_what_may_not_be_read_is_one_line(save, tensors, tmp_path, monkeypatch):
    def forbid(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    path = save(tensors)
    monkeypatch.setattr("pathlib.Path.open", forbid)
    monkeypatch.setattr("pathlib.Path.iterdir", forbid)
    for target in (path, tmp_path):
        assert "cannot be read (Permission denied)" in refused(target)


@pytest.mark.when("an import cannot write its export", "one line says where")
@pytest.mark.parametrize("error", [FileExistsError(17, "File exists", "x"), PermissionError(13, "Permission denied")])
def test_an_export_that_cannot_be_written_is_one_line(error, save, tensors, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("graincode.interop.convert.Imported.save", fail)
    with pytest.raises(SystemExit) as stop:
        import_weights.main(["maskgit", str(save(tensors)), "-o", str(tmp_path / "new")])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert error.strerror in err


@pytest.mark.parametrize(("file", "name"), [(".hidden", ".hidden"), ("v1.5.ckpt", "v1.5"), ("last.ckpt", "last")])
def test_an_export_is_named_after_the_file(file, name, save, tensors, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imported" / name).mkdir(parents=True)
    with pytest.raises(SystemExit):
        import_weights.main(["maskgit", str(save(tensors, "weights.pt").rename(tmp_path / file))])
    assert f"imported/{name} is there already" in capsys.readouterr().err


def test_moving_averages_of_a_few_weights_are_not_taken(save, tensors):
    one = {"model_ema.encoderconv_inweight": tensors["encoder.conv_in.weight"]}
    path = save(tensors | one)
    assert f"not of {len(tensors) - 2} others" in refused(path)  # the codebook may have none
    assert not same(path, tensors, averages=False).averaged


def test_long_names_make_short_messages(save, tensors):
    long = "x" * 10**6
    for value in ({long: 1}, {long: torch.zeros(1)}, tensors | {f"{long}.encoder.conv_in.weight": torch.zeros(1)}):
        assert len(refused(save(value))) < 1000


def test_a_class_of_builtins_is_refused_by_its_name(tmp_path):
    for content in (b"\x80\x02cbuiltins\neval\n.", b"\x80\x02c__builtin__\neval\n."):
        with zipfile.ZipFile(tmp_path / "file.pt", "w") as new:
            for name, value in {"data.pkl": content, "version": b"3\n", "byteorder": b"little"}.items():
                new.writestr(f"file/{name}", value)
        assert "eval in it would have to be unpickled" in refused(tmp_path / "file.pt")
