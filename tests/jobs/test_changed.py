"""Runs whose inputs changed since they were begun, and runs that are made longer."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from helpers import TINY_GENERATOR, TINY_TOKENIZER, TINY_TRAINER, command, refused, result, weights_of, write_images
from helpers import run_checked as run

from graincode.core.errors import GraincodeError
from graincode.data import CodeDataset, ImageFolder
from graincode.training.trackers import read_log

pytestmark = pytest.mark.slow

TOKENIZER = "tokenizer_path=runs/train_tokenizer/tok/export"
STATE = Path("runs/train_tokenizer/tok/state/step_000000006")


@pytest.fixture
def folder(inside, tmp_path):
    """Images in three classes, the last of one image; gives the folder and the overrides that name it."""
    root = write_images(tmp_path / "images", 12)
    (root / "z").mkdir()
    shutil.copy(root / "busy/000.png", root / "z/100.png")
    return root, ["data=image_folder", f"data.root={root}", "data.image_size=32", "data.test_fraction=0"]


def stopped(monkeypatch, job, *overrides):
    """Run a job that a signal stops after step 4."""
    from graincode.training import loop

    add = loop.FiniteNumbers.add

    def watched(self, now, values):
        if now == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        add(self, now, values)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop.FiniteNumbers, "add", watched)
        command(job, *overrides)


@pytest.mark.when(
    "an image was added, removed or written anew since a training was begun",
    "the same command is refused, and says what changed; with the images of before, it goes on",
)
def test_a_training_does_not_go_on_with_other_images(folder, monkeypatch):
    root, data = folder
    overrides = [*data, *TINY_TOKENIZER, *TINY_TRAINER, "run_name=changed", "data.val_fraction=0.3"]
    stopped(monkeypatch, "train_tokenizer", *overrides)
    added = root / "busy/more.png"
    shutil.copy(root / "busy/000.png", added)
    split = "train" if _trains(added, root) else "val"
    line = refused("train_tokenizer", *overrides)
    assert f"holds a run on other images (inputs.{split}_images: " in line
    assert line.count(" -> ") == 1
    added.unlink()
    file = root / "z/100.png"
    times = file.stat()
    os.utime(file, (0, 0))
    line = refused("train_tokenizer", *overrides)
    assert "on other images" in line
    advised = re.search(r"give (trainer\.resume=\S+),", line)[1]
    run("train_tokenizer", *overrides, "run_name=on-others", advised)  # as the line says
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    moved = root.rename(root.with_name("moved"))
    file, overrides[1] = moved / "z/100.png", f"data.root={moved}"
    run("train_tokenizer", *overrides)
    assert [line["step"] for line in read_log(Path("runs/train_tokenizer/changed")) if "train/loss" in line] == [
        2,
        4,
        6,
    ]
    os.utime(file, (0, 0))
    assert "on other images" in refused("train_tokenizer", *overrides)  # though it is finished


def _trains(file, root):
    """Whether a file is in the training split."""
    source = ImageFolder(str(root), image_size=32, test_fraction=0, val_fraction=0.3)
    encoded = source.split("train").encoded
    return str(file) in {encoded.name(index) for index in range(len(encoded.paths))}


def test_a_state_is_taken_to_other_images_where_that_is_asked_for(folder, caplog):
    root, data = folder
    base = [*data, *TINY_TOKENIZER, *TINY_TRAINER]
    run("train_tokenizer", *base, "run_name=first-images")
    os.utime(root / "z/100.png", (0, 0))
    state = "runs/train_tokenizer/first-images/state/step_000000006"
    run("train_tokenizer", *base, "trainer.steps=8", f"trainer.resume={state}", "run_name=other-images")
    assert any("is of a run on other images" in record.getMessage() for record in caplog.records)


@pytest.mark.when(
    "an extraction stops at a corrupt image, which is then removed, and with it its class",
    "the same command makes the codes of the splits that changed anew: labels and names are of the same classes",
)
def test_labels_and_names_agree_after_a_corrupt_image_was_removed(folder):
    root, data = folder
    overrides = [*data, TOKENIZER, "data.val_fraction=0.3", "splits=[val,train]", "run_name=corrupt", "batch_size=2"]
    corrupt = next(file for file in sorted(root.rglob("*.png"), reverse=True) if _trains(file, root))
    corrupt.write_bytes(corrupt.read_bytes()[:60])
    assert "cannot be read as an image" in refused("extract_codes", *overrides)
    codes = Path("runs/extract_codes/corrupt/codes")
    assert (codes / "val.json").is_file()
    with pytest.raises(GraincodeError, match="not finished"):
        CodeDataset(codes, "val")
    corrupt.unlink()
    shutil.rmtree(root / "z")
    run("extract_codes", *overrides)
    for split in ("train", "val"):
        dataset = CodeDataset(codes, split)
        assert dataset.class_names == ("busy", "smooth")
        assert int(dataset[range(len(dataset))].labels.max()) <= 1


def test_a_split_that_did_not_change_is_not_extracted_again(folder, monkeypatch):
    root, data = folder
    overrides = [*data, TOKENIZER, "data.val_fraction=0.3", "splits=[val,train]", "run_name=half"]
    train = next(file for file in sorted(root.rglob("*.png")) if _trains(file, root))
    whole = train.read_bytes()
    train.write_bytes(whole[:60])
    assert "cannot be read as an image" in refused("extract_codes", *overrides)
    before = Path("runs/extract_codes/half/codes/val.indices.npy").stat().st_mtime_ns
    train.write_bytes(whole)
    run("extract_codes", *overrides)
    assert Path("runs/extract_codes/half/codes/val.indices.npy").stat().st_mtime_ns == before


@pytest.mark.when("the images of a finished extraction have changed", "the same command says so, in one line")
def test_a_finished_extraction_of_other_images_is_refused(folder):
    root, data = folder
    overrides = [*data, TOKENIZER, "splits=[train]", "run_name=pixels"]
    run("extract_codes", *overrides)
    run("extract_codes", *overrides)
    for file in root.rglob("*.png"):
        shutil.copy(root / "busy/000.png", file) if file != root / "busy/000.png" else None
    assert "inputs.train_images: " in refused("extract_codes", *overrides)


def test_a_data_set_is_one_however_its_path_is_spelled(folder, monkeypatch, caplog):
    root, data = folder
    monkeypatch.chdir(root.parent)
    shutil.copytree(Path(os.environ["GRAINCODE_CACHE"]).parent / "runs/train_tokenizer/tok/export", "tok")
    caplog.set_level("INFO")
    for path in ("images", "./images", "images/", str(root)):
        run("extract_codes", *data, f"data.root={path}", "tokenizer_path=tok", "splits=[train]")
    assert len(list(Path("runs/extract_codes").glob("default-*"))) == 1
    assert sum("is finished" in record.getMessage() for record in caplog.records) == 3


@pytest.mark.when(
    "codes that a generator is trained on are extracted anew, and differ", "the training is refused under its name"
)
def test_a_training_does_not_go_on_with_other_codes(folder, monkeypatch):
    root, data = folder
    extract = [*data, TOKENIZER, "data.val_fraction=0.3", "run_name=again", "splits=[train,val]"]
    overrides = [*TINY_GENERATOR, *TINY_TRAINER, "codes_path=runs/extract_codes/again/codes", "run_name=again"]
    run("extract_codes", *extract)
    identity = CodeDataset("runs/extract_codes/again/codes", "train").identity
    stopped(monkeypatch, "train_generator", *overrides)
    shutil.rmtree("runs/extract_codes/again")
    for file in root.rglob("*.png"):
        os.utime(file, (0, 0))
    run("extract_codes", *extract)
    assert CodeDataset("runs/extract_codes/again/codes", "train").identity == identity  # the same codes are the same
    shutil.rmtree("runs/extract_codes/again")
    for file in root.glob("smooth/*.png"):
        shutil.copy(root / "busy/000.png", file)
    run("extract_codes", *extract)
    assert f"inputs.codes: {identity} -> " in refused("train_generator", *overrides)


@pytest.mark.when(
    "trainer.steps is raised for a run that is finished or was stopped",
    "it goes on; export and result of the shorter run stay until the longer one has ended",
)
def test_a_finished_run_goes_on_with_more_steps(inside, monkeypatch, capsys):
    base, path = [*inside, *TINY_TOKENIZER, *TINY_TRAINER, "run_name=long"], Path("runs/train_tokenizer/long")
    run("train_tokenizer", *base, "trainer.steps=3")
    short, objective = weights_of(path), result(path)["objective"]
    stopped(monkeypatch, "train_tokenizer", *base, "trainer.steps=6")
    assert (weights_of(path), result(path)["objective"]) == (short, objective)
    assert "trainer.steps: 6 -> 3" in refused("train_tokenizer", *base, "trainer.steps=3")
    run("train_tokenizer", *base, "trainer.steps=6")
    said = capsys.readouterr().out
    assert "is lengthened (trainer.steps: 3 -> 6)" in said
    assert "which was 1 of its largest in step 3 of 3, is 0.854 in step 4 of 6" in said
    assert weights_of(path) != short
    assert set(result(path)) == {"objective", "metrics"}
    rates = {line["step"]: line["train/learning_rate"] for line in read_log(path) if "train/loss" in line}
    whole = {line["step"]: line["train/learning_rate"] for line in read_log(Path("runs/train_tokenizer/tok"))
             if "train/loss" in line}  # fmt: skip
    assert {step: rates[step] for step in (4, 6)} == {step: whole[step] for step in (4, 6)}
    run("train_tokenizer", *base, "trainer.steps=6")
    assert "is finished" in capsys.readouterr().out


def test_a_stopped_run_goes_on_with_more_steps(inside, monkeypatch):
    base = [*inside, *TINY_TOKENIZER, *TINY_TRAINER, "run_name=longer-stopped"]
    stopped(monkeypatch, "train_tokenizer", *base)
    for steps, words in ((2, "trainer.steps: 6 -> 2"), (5, "trainer.steps: 6 -> 5")):
        assert words in refused("train_tokenizer", *base, f"trainer.steps={steps}")
    run("train_tokenizer", *base, "trainer.steps=8")
    assert [line["step"] for line in read_log(Path("runs/train_tokenizer/longer-stopped"))][-1] == 8
