import json
import subprocess
import sys
from pathlib import Path

import demo
import pytest
from demo import plan, run_demo
from helpers import TINY_GENERATOR, TINY_TOKENIZER, TINY_TRAINER, command, write_images

from graincode.core.errors import GraincodeError


def test_overrides_go_to_the_jobs_that_know_them(tmp_path):
    write_images(tmp_path)
    overrides = [
        "data=image_folder",
        f"data.root={tmp_path}",
        "tokenizer.codebook_size=64",
        "sample:seed=3",
        "trainer.steps=7",
    ]
    given = {
        step.name: [o for o in overrides if o.removeprefix("sample:") in step.arguments]
        for step in plan(Path("d"), overrides)
    }
    assert given == {
        "train_tokenizer": [*overrides[:3], "trainer.steps=7"],
        "extract_codes": overrides[:2],
        "train_generator": ["trainer.steps=7"],
        "train_masked": ["trainer.steps=7"],
        "sample": ["sample:seed=3"],
        "evaluate_reconstructions": overrides[:2],
        "evaluate_samples": overrides[:2],
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenzier.codebook_size=3", "type tokenizer"),
        ("tokenizer.codebok_size=3", "type tokenizer.codebook_size"),
        ("evaluation.num_samples=5", "unknown key 'evaluation.num_samples'"),
        ("trainer.steps=x", "expected a whole number"),
    ],
)
def test_a_wrong_override_is_refused_before_anything_runs(override, message, tmp_path):
    with pytest.raises(GraincodeError, match=message):
        run_demo(tmp_path / "demo", [override])
    assert not (tmp_path / "demo").exists()


def test_unlabelled_images_make_an_unconditional_demo(tmp_path):
    write_images(tmp_path)
    overrides = ["data=image_folder", f"data.root={tmp_path}", "data.classes=none"]
    arguments = {step.name: step.arguments for step in plan(Path("d"), overrides)}
    for name in ("train_generator", "train_masked"):
        assert "generator/conditioning=none" in arguments[name]
    assert not any("guidance" in argument for argument in arguments["sample"])


def test_steps_run_in_processes_that_take_no_module_from_where_the_user_is(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(
        subprocess, "run", lambda arguments, **_: called.append(arguments) or subprocess.CompletedProcess([], 3)
    )
    with pytest.raises(GraincodeError, match="train_tokenizer ended with status 3"):
        run_demo(tmp_path, [])
    assert called[0][:4] == [sys.executable, "-P", "-m", "graincode.jobs.train_tokenizer"]
    assert json.loads((tmp_path / "seconds.json").read_text())["train_tokenizer"] < 60


@pytest.mark.slow
def test_the_recipe_for_one_s_own_images(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAINCODE_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "images", count=60)
    overrides = [
        "data=image_folder", "data.root=images", "data.image_size=32", "data.test_fraction=0.3",
        *TINY_TOKENIZER, *TINY_GENERATOR, *TINY_TRAINER, "train_masked:generator.size.width=32",
        "sample:num_samples=4", "evaluate_samples:images.num_samples=12", "evaluate_samples:batch_size=6",
    ]  # fmt: skip

    def in_process(step):
        if step.name == interrupted:
            raise KeyboardInterrupt
        return command(step.job, *step.arguments) or 0

    interrupted = "extract_codes"
    monkeypatch.setattr(demo, "_run", in_process)
    with pytest.raises(KeyboardInterrupt):
        run_demo(Path("runs/demo"), overrides)
    assert list(json.loads(Path("runs/demo/seconds.json").read_text())) == ["train_tokenizer", "extract_codes"]
    interrupted = ""
    trained = Path("runs/demo/train_tokenizer/train_tokenizer/export/weights.safetensors").stat().st_mtime_ns
    page = run_demo(Path("runs/demo"), overrides)  # goes on where it was
    assert Path("runs/demo/train_tokenizer/train_tokenizer/export/weights.safetensors").stat().st_mtime_ns == trained
    text = page.read_text()
    assert "smooth" in text
    assert "Fréchet distance (lite0@112)" in text
    assert "data.root=images" in text
    seconds = json.loads(Path("runs/demo/seconds.json").read_text())
    assert len(seconds) == 7
    first = capfd.readouterr().out
    assert "[7/7] evaluate_samples" in first
