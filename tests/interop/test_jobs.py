"""Imported tokenizers in the jobs: codes, the three generators, samples, reconstructions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY_GENERATOR, TINY_TRAINER, command, result, write_images
from helpers_parity import write_golden

from graincode import load_tokenizer
from graincode.export import load_export
from graincode.files import sha256
from graincode.jobs import import_weights


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with images, and a VQGAN of 32-pixel images that the command has imported."""
    folder = tmp_path_factory.mktemp("import")
    write_images(folder / "images", size=32)
    write_golden("vqgan_f16", folder / "last.ckpt")
    tensors = torch.load(folder / "last.ckpt")["state_dict"]
    torch.save(tensors | {"decoder.conv_out.bias": torch.tensor([0, torch.inf, 0])}, folder / "infinite.pt")
    import_weights.main(["vqgan", str(folder / "last.ckpt"), "-o", str(folder / "vqgan"), "--image-size", "32"])
    return folder


@pytest.fixture
def inside(root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setenv("GRAINCODE_CACHE", str(root / "cache"))
    return ["data=image_folder", "data.root=images", "data.image_size=32", "data.test_fraction=0.3"]


def test_the_command_writes_an_export_and_says_what_it_did(root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    (root / "named.ckpt").symlink_to("last.ckpt")
    import_weights.main(["vqgan", "named.ckpt", "--image-size", "64"])
    out = capsys.readouterr().out
    for part in ("256 entries", "16 x 16 pixels a code", "left out: 1 of loss", "imported/named"):
        assert part in out
    export = load_export("imported/named", "tokenizer")
    assert export.module.layout.image_size == (64, 64)
    assert export.identity in out
    assert export.provenance["imported"] == {
        "family": "vqgan",
        "files": {"named.ckpt": sha256(root / "last.ckpt")},
        "weights": "as trained",
        "image_size": [64, 64],
        "graincode": export.provenance["imported"]["graincode"],
    }


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["vqgan", "last.ckpt", "-o", "vqgan"], "vqgan is there already"),
        (["vqgan", "absent.ckpt", "-o", "new"], "absent.ckpt: no such file"),
        (["llamagen", "last.ckpt", "-o", "new"], "they look like vqgan's"),
        (["vqgan", "infinite.pt", "-o", "new"], "'decoder.last.bias' has NaN or infinite values"),
        (["vqgan", "last.ckpt", "-o", "new", "--ema"], "no moving averages"),
        (["vqgan", "last.ckpt", "-o", "new", "--image-size", "0"], "image_size=0: expected 1 or more"),
        (["vqgan", "last.ckpt", "-o", "new", "--image-size", "100"], "could be [112, 112]"),
    ],
)
def test_an_error_is_one_line_and_leaves_nothing(root, arguments, part, capsys, monkeypatch):
    monkeypatch.chdir(root)
    before = sorted(path.name for path in root.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        import_weights.main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err
    assert sorted(path.name for path in root.rglob("*")) == before


def test_help_needs_no_torch():
    code = """if True:
        import sys
        from graincode.jobs.import_weights import main
        try:
            main(["--help"])
        finally:
            assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "llamagen" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["gpt", "dgit_ar", "dgit_nar"])
def test_generators_learn_and_draw_codes_of_an_imported_tokenizer(inside, generator):
    command("extract_codes", *inside, "tokenizer_path=vqgan", "run_name=codes")
    codes = json.loads(Path("runs/extract_codes/codes/codes/codes.json").read_text())
    assert codes["tokenizer_imported"]["family"] == "vqgan"
    assert codes["layout"]["grains"] == [[16, 16]]
    assert codes["splits"]["train"]["mean_length"] == 4
    command("train_generator", f"generator={generator}", *TINY_GENERATOR, *TINY_TRAINER, f"run_name={generator}")
    export = Path(f"runs/train_generator/{generator}/export")
    made = load_export(export, "generator").provenance
    assert (made["tokenizer"], made["tokenizer_imported"]) == (codes["tokenizer"], codes["tokenizer_imported"])
    command("sample", f"generator_path={export}", "tokenizer_path=vqgan", "num_samples=4", f"run_name={generator}")
    assert Path(f"runs/sample/{generator}/samples.png").is_file()
    assert result(Path(f"runs/sample/{generator}"))["tokenizer_imported"] == codes["tokenizer_imported"]


@pytest.mark.slow
def test_reconstructions_of_an_imported_tokenizer_are_measured(inside):
    settings = ["features=lite0_112", "tokenizer_path=vqgan", "run_name=rfid"]
    command("evaluate", "evaluation=reconstruction", *inside, *settings)
    record = json.loads(Path("runs/evaluate/rfid/metrics.json").read_text())
    assert record["tokenizer"] == load_export("vqgan", "tokenizer").identity
    assert record["tokenizer_imported"]["files"] == {"last.ckpt": sha256(Path("last.ckpt"))}
    assert load_tokenizer("vqgan").layout.codebook_size == 256


@pytest.mark.when("an argument of graincode-import is wrong or missing", "one line says what is expected")
@pytest.mark.parametrize(("arguments", "expected"), [
    ([], "FAMILY, FILE"), (["vqgan"], "FILE"), (["vq", "x"], "FAMILY: invalid choice: 'vq' (choose from "),
    (["vqgan", "x", "--image-size", "1e3"], "--image-size: "), (["vqgan", "x", "extra"], "extra"),
    (["vqgan", "x", "--entropy", "new"], "--entropy: "), (["vqgan", "x", "--image-size=\x1b[31m"], "\\x1b[31m"),
])  # fmt: skip
def test_wrong_arguments_are_one_line(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        import_weights.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line.startswith("error: ")
    assert expected in line
