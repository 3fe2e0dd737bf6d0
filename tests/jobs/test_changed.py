"""Runs whose inputs or outputs changed since they were begun, and runs that are made longer."""

import csv
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import TINY_GENERATOR, TINY_TOKENIZER, TINY_TRAINER, command, refused, result, write_images
from helpers_files import ARRAY_DAMAGES

import graincode
from graincode.config.job import run_job
from graincode.config.validate import check
from graincode.core.errors import GraincodeError
from graincode.data import CodeDataset, ImageFolder
from graincode.training.trackers import read_log

pytestmark = pytest.mark.slow

TOKENIZER = "tokenizer_path=runs/train_tokenizer/tok/export"
STATE = Path("runs/train_tokenizer/tok/state/step_000000006")


def run(job, *overrides):
    return run_job(job, check(job, list(overrides)))


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


def weights(path):
    return (path / "export/weights.safetensors").read_bytes()


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
    assert "on other images" in refused("train_tokenizer", *overrides)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
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
    short, objective = weights(path), result(path)["objective"]
    stopped(monkeypatch, "train_tokenizer", *base, "trainer.steps=6")
    assert (weights(path), result(path)["objective"]) == (short, objective)
    assert "trainer.steps: 6 -> 3" in refused("train_tokenizer", *base, "trainer.steps=3")
    run("train_tokenizer", *base, "trainer.steps=6")
    said = capsys.readouterr().out
    assert "is lengthened (trainer.steps: 3 -> 6)" in said
    assert "which was 1 of its largest in step 3 of 3, is 0.854 in step 4 of 6" in said
    assert weights(path) != short
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


@pytest.mark.when(
    "the export of a finished training is gone, empty or damaged",
    "the same command writes it again from the last state; without a state, one line says so",
)
@pytest.mark.parametrize("job", ["train_tokenizer", "train_generator"])
@pytest.mark.parametrize("damage", ["gone", "empty", "damaged", "a file"])
def test_an_export_that_does_not_load_is_written_again(job, damage, inside):
    source = Path(f"runs/{job}/{'tok' if job == 'train_tokenizer' else 'ar'}")
    path = Path(f"runs/{job}/export-{damage.replace(' ', '-')}")
    shutil.copytree(source, path)
    export = path / "export"
    if damage == "damaged":
        (export / "weights.safetensors").write_bytes(weights(path)[:-9])
    else:
        shutil.rmtree(export)
        if damage != "gone":
            export.mkdir() if damage == "empty" else export.write_text("")
    data = inside if job == "train_tokenizer" else ["codes_path=runs/extract_codes/codes/codes"]
    base = [*data, *(TINY_TOKENIZER if job == "train_tokenizer" else TINY_GENERATOR), *TINY_TRAINER]
    before = result(path)
    run(job, *base, f"run_name={path.name}")
    assert weights(path) == weights(source)
    assert result(path) == before
    shutil.rmtree(export)
    shutil.rmtree(path / "state")
    assert "no state to make it from" in refused(job, *base, f"run_name={path.name}")


@pytest.mark.when("codes of a finished extraction are damaged or gone", "the same command makes that split again")
@pytest.mark.parametrize("damage", ["cut", "missing", "fewer", "no description"])
def test_damaged_codes_are_extracted_again(damage, inside):
    path, overrides = Path("runs/extract_codes/mended"), [*inside, TOKENIZER, "run_name=mended"]
    run("extract_codes", *overrides)
    files = {file: file.read_bytes() for file in path.glob("codes/*")}
    broken = path / "codes/val.indices.npy"
    (path / "codes/codes.json").unlink() if damage == "no description" else ARRAY_DAMAGES[damage](broken)
    kept = (path / "codes/train.indices.npy").stat().st_mtime_ns
    run("extract_codes", *overrides)
    assert {file: file.read_bytes() for file in path.glob("codes/*")} == files
    assert (path / "codes/train.indices.npy").stat().st_mtime_ns == kept


@pytest.mark.when(
    "an evaluation is killed between its result and the table", "the same command, or the next evaluation, adds its row"
)
def test_a_row_that_is_missing_is_added_by_the_same_command(inside, monkeypatch):
    overrides = [*inside, "evaluation=reconstruction", "features=lite0_112", TOKENIZER, "run_name=row"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("graincode.jobs.evaluate.update_table", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        run("evaluate", *overrides)
    run("evaluate", *overrides)
    with Path("runs/evaluate/table.csv").open() as file:
        assert "row" in [row["run"] for row in csv.DictReader(file)]


@pytest.mark.when(
    "what a finished sample or evaluation wrote is damaged or gone",
    "the same command makes it again, with equal results",
)
@pytest.mark.parametrize(
    ("job", "name", "file"),
    [("sample", "six", "samples.npz"), ("sample", "six", "samples.png"), ("evaluate", "record", "metrics.json")],
)
@pytest.mark.parametrize("damage", ["cut", "gone", "a directory"])
def test_results_that_do_not_load_are_made_again(job, name, file, damage, inside):
    overrides = ["num_samples=6", "batch_size=4", TOKENIZER, "generator_path=runs/train_generator/ar/export"]
    if job == "evaluate":
        overrides = [*inside, "evaluation=reconstruction", "features=lite0_112", TOKENIZER]
    run(job, *overrides, f"run_name={name}")
    path = Path(f"runs/{job}/{name}") / file
    before, content = result(path.parent), path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-30])
    else:
        path.unlink()
        if damage == "a directory":
            path.mkdir()
    if damage == "a directory":
        assert refused(job, *overrides, f"run_name={name}").startswith(f"{path} is a directory")
        path.rmdir()
    run(job, *overrides, f"run_name={name}")
    if job == "sample":
        assert path.read_bytes() == content
    else:
        assert result(path.parent) == before
        assert json.loads(path.read_text())["metrics"] == before["metrics"]


def edited(state, change):
    """A copy of a state with other content, and the right hash of that."""
    content = torch.load(state / "state.pt", weights_only=True)
    change(content)
    torch.save(content, state / "state.pt")
    about = json.loads((state / "state.json").read_text())
    about["sha256"] = hashlib.sha256((state / "state.pt").read_bytes()).hexdigest()
    (state / "state.json").write_text(json.dumps(about))


def of_another_stage(state):
    from graincode.runs.checkpoint import read_state

    other = read_state(Path("runs/train_generator/ar/state/step_000000006"))
    state.clear()
    state.update(other)


CONTENTS = {
    "another stage": of_another_stage,
    "no weights": lambda state: state["trainables"].clear(),
    "weights of other names": lambda state: state["trainables"]["tokenizer"]["module"].update(more=torch.zeros(1)),
    "weights of other shapes": lambda state: _first(state["trainables"]["tokenizer"]["module"]),
    "moments of other shapes": lambda state: _first(_moments(state)),
    "average of other shapes": lambda state: _first(state["average"]),
    "a meter of numbers": lambda state: state.update(meter={"terms": {"loss": 3}, "histograms": {}}),
    "no meter": lambda state: state.pop("meter"),
    "a best of text": lambda state: state.update(best="good"),
    "metrics of nothing": lambda state: state.update(metrics=None),
    "flops of nothing": lambda state: state.pop("flops"),
}


def _first(tensors):
    name = next(name for name, value in tensors.items() if isinstance(value, torch.Tensor) and value.ndim)
    tensors[name] = torch.zeros(3, 3, 3)


def _moments(state):
    return next(iter(state["trainables"]["tokenizer"]["optimizer"]["state"].values()))


@pytest.mark.when(
    "a state holds what is not of its training: another stage, other names, other shapes", "one line names it"
)
@pytest.mark.parametrize("case", CONTENTS)
def test_a_state_of_something_else_is_refused(case, inside):
    path = Path(f"runs/train_tokenizer/state-{case.replace(' ', '-')}")
    shutil.copytree(STATE.parents[1], path)
    for name in ("result.json", "export"):
        shutil.rmtree(path / name) if name == "export" else (path / name).unlink()
    edited(path / "state" / STATE.name, CONTENTS[case])
    line = refused("train_tokenizer", *inside, *TINY_TOKENIZER, *TINY_TRAINER, f"run_name={path.name}")
    assert line.startswith(f"{path / 'state' / STATE.name} is no")
    shutil.rmtree(path / "state" / STATE.name)  # as the line says
    run("train_tokenizer", *inside, *TINY_TOKENIZER, *TINY_TRAINER, f"run_name={path.name}")
    assert weights(path) == weights(STATE.parents[1])


def test_exports_of_either_run_load_after_all_this(inside):
    for path in Path("runs/train_tokenizer").glob("*/export"):
        graincode.load_tokenizer(path)
