"""Trainings from the command line: what they leave, how they stop and go on."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY_GENERATOR, TINY_TOKENIZER, TINY_TRAINER, command, result

import graincode
from graincode.config.job import run_job
from graincode.config.validate import check
from graincode.tokenizer import DQVAE
from graincode.training.trackers import read_log

pytestmark = pytest.mark.slow

LITE0 = "features=lite0_112"


def test_training_leaves_export_log_and_events(inside):
    for run, key in ((Path("runs/train_tokenizer/tok"), "mse"), (Path("runs/train_generator/ar"), "bits_per_image")):
        assert result(run)["objective"] == result(run)["metrics"][key]
        lines, names = read_log(run), sorted(path.name for path in (run / "pictures").iterdir())
        assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6]
        assert [line["step"] for line in lines if f"val/{key}" in line] == [3, 6]
        assert list((run / "tensorboard").glob("events*"))
        assert "codes_per_image.png" in names if key == "mse" else "samples_reconstructions.png" in names
        assert all(name.endswith(".png") for name in names)
        assert sorted(path.name for path in (run / "export").iterdir()) == ["config.json", "weights.safetensors"]


def test_the_same_command_again_does_nothing(inside):
    run = Path("runs/train_tokenizer/tok")
    before = (run / "export" / "weights.safetensors").stat().st_mtime_ns
    command("train_tokenizer", *inside, *TINY_TOKENIZER, *TINY_TRAINER, "run_name=tok")
    assert (run / "export" / "weights.safetensors").stat().st_mtime_ns == before


def overrides_of(job, inside):
    if job == "train_tokenizer":
        return [*inside, *TINY_TOKENIZER, *TINY_TRAINER]
    return [*TINY_GENERATOR, *TINY_TRAINER, "codes_path=runs/extract_codes/codes/codes"]


def signal_after(monkeypatch, step, number):
    """Let this process get a signal in a step's optimizer update."""
    from graincode.training import loop

    add = loop.FiniteNumbers.add

    def watched(self, now, values):
        if now == step:
            os.kill(os.getpid(), number)
        add(self, now, values)

    monkeypatch.setattr(loop.FiniteNumbers, "add", watched)


@pytest.mark.parametrize("job", ["train_tokenizer", "train_generator"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_stops_a_run_and_the_same_command_ends_it_as_if_nothing_had_been(
    job, number, inside, monkeypatch, capsys
):
    name, before = f"stopped-{number.name}", signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        signal_after(patch, 4, number)
        command(job, *overrides_of(job, inside), f"run_name={name}")
    assert stop.value.code == 75
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"stopped by {number.name} after step 4, state saved: the same command goes on"
    assert signal.getsignal(number) == before
    command(job, *overrides_of(job, inside), f"run_name={name}")
    run, whole = Path(f"runs/{job}/{name}"), Path(f"runs/{job}/{'tok' if job == 'train_tokenizer' else 'ar'}")
    assert (run / "export/weights.safetensors").read_bytes() == (whole / "export/weights.safetensors").read_bytes()
    lines = [[{k: v for k, v in line.items() if "speed" not in k} for line in read_log(path)] for path in (run, whole)]
    assert lines[0] == lines[1]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(inside, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_after(patch, 4, signal.SIGTERM)
        command("train_tokenizer", *overrides_of("train_tokenizer", inside), "run_name=damaged")
    states = Path("runs/train_tokenizer/damaged/state")
    assert sorted(path.name for path in states.glob("step_*")) == ["step_000000003", "step_000000004"]
    newest = states / "step_000000004/state.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    command("train_tokenizer", *overrides_of("train_tokenizer", inside), "run_name=damaged")
    assert f"{newest.parent} is damaged".replace("runs", "runs") in capsys.readouterr().out
    whole = Path("runs/train_tokenizer/tok/export/weights.safetensors")
    assert Path("runs/train_tokenizer/damaged/export/weights.safetensors").read_bytes() == whole.read_bytes()


def test_a_run_can_start_from_the_state_of_another(inside, capsys):
    base = [*inside, *TINY_TOKENIZER, *TINY_TRAINER]
    state = "trainer.resume=runs/train_tokenizer/tok/state/step_000000006"
    command("train_tokenizer", *base, state, "trainer.steps=8", "run_name=longer")
    assert "going on from step 6" in capsys.readouterr().out
    run = Path("runs/train_tokenizer/longer")
    assert [line["step"] for line in read_log(run)] == [6, 8, 8]
    assert json.loads((run / "state/best.json").read_text())["step"] in (6, 8)


def test_the_smallest_batch(inside):
    base = [*inside, *TINY_TOKENIZER, *TINY_TRAINER, "trainer.batch_size=1", "trainer.steps=2"]
    command("train_tokenizer", *base, "run_name=smallest")
    assert result(Path("runs/train_tokenizer/smallest"))["objective"] > 0


def test_the_best_weights_can_be_exported(inside, monkeypatch):
    from graincode.training.tokenizer_stage import TokenizerStage

    judge = TokenizerStage.evaluate
    calls = []

    def worse_after_the_third(self, module, limit, draw=False):
        calls.append(1)
        found = judge(self, module, limit, draw)
        return replace(found, metrics=found.metrics | {"objective": float(abs(len(calls) - 3))})

    monkeypatch.setattr(TokenizerStage, "evaluate", worse_after_the_third)
    base = [*inside, *TINY_TOKENIZER, *TINY_TRAINER, "trainer.ema_decay=0", "trainer.eval_every=1"]
    figures = {}
    for choice in ("best", "last"):
        calls.clear()
        command("train_tokenizer", *base, f"trainer.export={choice}", f"run_name=export-{choice}")
        run = Path(f"runs/train_tokenizer/export-{choice}")
        figures[choice] = result(run)["objective"]
        evaluations = [line["val/objective"] for line in read_log(run) if "val/objective" in line]
    assert figures["best"] == min(evaluations) < figures["last"] == evaluations[-1]
    best = json.loads((Path("runs/train_tokenizer/export-best") / "state/best.json").read_text())["step"]
    assert best == 3
    from graincode.runs.checkpoint import read_state

    state = read_state(Path(f"runs/train_tokenizer/export-best/state/step_{best:09d}"))
    module = graincode.load_tokenizer("runs/train_tokenizer/export-best/export")
    kept = state["trainables"]["tokenizer"]["module"]
    learned = {key: value for key, value in module.state_dict().items() if key != "router.quantiles"}  # calibrated anew
    assert all(torch.equal(kept[key], value) for key, value in learned.items())


@pytest.mark.parametrize("job", ["train_tokenizer", "train_generator"])
def test_fine_tuning_starts_from_an_export(job, inside):
    source = f"runs/{job}/{'tok' if job == 'train_tokenizer' else 'ar'}/export"
    more = [f"init_from={source}", "optimizer.lr=1e-12", "trainer.ema_decay=0", "run_name=tuned"]
    command(job, *overrides_of(job, inside), *more)
    load = graincode.load_tokenizer if job == "train_tokenizer" else graincode.load_generator
    before, after = load(source).state_dict(), load(f"runs/{job}/tuned/export").state_dict()
    learned = [key for key in before if not key.startswith(("quantizers.", "router."))]
    assert all(torch.allclose(before[key], after[key], atol=1e-8) for key in learned)


def test_a_discriminator_is_a_configuration(inside):
    base = [*inside, *TINY_TOKENIZER, *TINY_TRAINER, "tokenizer.adversary.discriminator.channels=8"]
    more = ["tokenizer/adversary=patch", "tokenizer.adversary.start_step=2", "tokenizer.adversary.ramp_steps=2"]
    command("train_tokenizer", *base, *more, "tokenizer.adversary.discriminator.layers=2", "trainer.log_every=1",
            "run_name=gan")  # fmt: skip
    lines = [line for line in read_log(Path("runs/train_tokenizer/gan")) if "train/loss" in line]
    assert ["train/discriminator" in line for line in lines] == [False] * 2 + [True] * 4
    assert lines[2]["train/adaptive_weight"] == 0
    assert all(line["train/adaptive_weight"] > 0 for line in lines[3:])
    assert lines[-1]["train/gradient_norm_discriminator"] > 0


def test_thresholds_are_calibrated_on_as_many_images_as_asked_for(inside, monkeypatch):
    seen = []
    calibrate = DQVAE.calibrate
    monkeypatch.setattr(DQVAE, "calibrate", lambda self, batches: calibrate(self, counted(batches)))

    def counted(batches):
        for images in batches:
            seen.append(len(images))
            yield images

    monkeypatch.setattr("graincode.jobs.train_tokenizer.CALIBRATION_IMAGES", 5)
    for asked, count in (("9", 9), ("null", 5)):
        overrides = [*inside, *TINY_TOKENIZER, *TINY_TRAINER, "trainer.steps=2", f"calibration_images={asked}"]
        command("train_tokenizer", *overrides, f"run_name=calibrated-{asked}")
        assert set(seen) == {count}
        seen.clear()


def test_logs_of_a_training(inside):
    run = Path("runs/train_tokenizer/tok")
    line = next(line for line in read_log(run) if "train/loss" in line)
    for grain in ("codebook_0", "codebook_1"):
        assert 0 < line[f"train/{grain}_usage"] <= 1
        assert 1 <= line[f"train/{grain}_perplexity"] <= 32
    assert "train/codebook_usage" not in line  # each grain has its own
    assert 0 <= line["speed/data_wait_share"] < 1
    for name in ("images_per_second", "step_seconds", "peak_memory_gib", "model_tflops"):
        assert line[f"speed/{name}"] > 0
    assert "speed/model_flops_utilization" not in line
    command("train_tokenizer", *overrides_of("train_tokenizer", inside), "hardware.peak_tflops=0.5", "run_name=peak")
    line = next(line for line in read_log(Path("runs/train_tokenizer/peak")) if "train/loss" in line)
    assert line["speed/model_flops_utilization"] == pytest.approx(line["speed/model_tflops"] / 0.5)


def test_weights_and_biases_offline(inside, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    command("train_tokenizer", *overrides_of("train_tokenizer", inside), "logging=wandb", "run_name=wandb")
    assert list(Path("runs/train_tokenizer/wandb/wandb").glob("offline-run-*/run-*.wandb"))


def test_a_sweep_gives_every_member_its_own_directory(inside):
    before = set(Path("runs/train_tokenizer").glob("default-*"))
    command(
        "train_tokenizer", "--multirun", *inside, *TINY_TOKENIZER[:2], *TINY_TRAINER, "trainer.steps=2",
        "tokenizer.codebook_size=16,32", "data.image_size=32,48",
    )  # fmt: skip
    made = set(Path("runs/train_tokenizer").glob("default-*")) - before
    settings = set()
    for run in made:
        config = json.loads((run / "config.json").read_text())["config"]
        settings.add((config["tokenizer"]["codebook_size"], config["data"]["image_size"]))
        assert (run / "export").is_dir()
    assert settings == {(16, 32), (32, 32), (16, 48), (32, 48)}


@pytest.mark.parametrize("job", ["train_tokenizer", "extract_codes", "train_generator", "sample", "evaluate"])
def test_dry_runs_count_and_stop(job, inside, capsys):
    data = inside if job in ("train_tokenizer", "extract_codes", "evaluate") else []
    paths = {
        "extract_codes": ["tokenizer_path=runs/train_tokenizer/tok/export"],
        "train_generator": ["codes_path=runs/extract_codes/codes/codes"],
        "sample": ["tokenizer_path=runs/train_tokenizer/tok/export", "generator_path=runs/train_generator/ar/export"],
        "evaluate": ["evaluation=reconstruction", LITE0, "tokenizer_path=runs/train_tokenizer/tok/export"],
    }.get(job, [])
    before = {path for path in Path("runs").rglob("*") if "sweeps" not in path.parts}
    command(job, *data, *paths, "debug=dry")
    assert {path for path in Path("runs").rglob("*") if "sweeps" not in path.parts} == before
    said = capsys.readouterr().out
    assert all(word in said for word in ("parameters", "GFLOPs", "MiB"))


def test_a_dry_run_counts_the_step_of_training():
    """Not that of evaluation, in which this router decodes once more. It needs none of the loss's weights."""

    def flops(*overrides):
        return run_job("train_tokenizer", check("train_tokenizer", [*TINY_TOKENIZER, "debug=dry", *overrides]))

    of = flops("tokenizer.router.density.of=gain")
    assert of == flops("tokenizer.router.density.of=error") < flops("tokenizer.router.density.in_training=gain")
    assert of == flops("tokenizer/perceptual=lpips", "tokenizer.perceptual.weights=/nowhere.pth")


def test_modules_run_from_any_directory(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "graincode.jobs.train_tokenizer", "--cfg", "job"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "codebook_size: 256" in done.stdout
    assert not list(tmp_path.iterdir())
