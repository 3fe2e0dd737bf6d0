import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_GENERATOR, TINY_TOKENIZER, TINY_TRAINER, command, refusal, refused, result, train_masked
from PIL import Image

import graincode
from graincode.config.job import build, run_job, with_layout
from graincode.config.validate import check
from graincode.core.codes import GrainCodes
from graincode.core.layout import CodeLayout
from graincode.core.losses import weighted_sum
from graincode.core.prompts import CodePrefix
from graincode.core.rng import SampleRng
from graincode.data import CodeDataset
from graincode.generator import DGiTAR, Transformer
from graincode.jobs import given, sample
from graincode.tokenizer import DQVAE
from graincode.training.trackers import read_log

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


def test_codes_on_disk_are_what_the_tokenizer_says(inside):
    tokenizer = graincode.load_tokenizer("runs/train_tokenizer/tok/export")
    from graincode.data import ImageFolder

    source = ImageFolder(inside[1].split("=")[1], image_size=32, test_fraction=0.3)
    for split in ("train", "val", "test"):
        images, codes = source.split(split), CodeDataset("runs/extract_codes/codes/codes", split)
        everything = range(len(images))
        batch, stored = images[everything], codes[everything]
        expected = tokenizer.tokenize(batch.images)
        assert torch.equal(stored.codes.grains, expected.grains)
        assert torch.equal(stored.codes.indices, expected.indices)
        assert torch.equal(stored.labels, batch.labels)
        assert np.load(f"runs/extract_codes/codes/codes/{split}.indices.npy", mmap_mode="r").dtype == np.uint8
    assert codes.class_names == ("busy", "smooth")


def test_a_generator_of_contents_draws_them_for_the_maps_of_real_images(inside, capsys):
    paths = ["tokenizer_path=runs/train_tokenizer/tok/export", "generator_path=runs/train_generator/contents/export"]
    codes = "runs/extract_codes/codes/codes"
    command("train_generator", *TINY_GENERATOR, *TINY_TRAINER, f"codes_path={codes}", "run_name=contents",
            "generator.model.grain_map=given")  # fmt: skip
    command("sample", *paths, f"given.codes_path={codes}", "given.map=true", "num_samples=5", "run_name=maps")
    with np.load("runs/sample/maps/samples.npz") as arrays:
        assert np.array_equal(arrays["grains"], CodeDataset(codes, "test")[range(5)].codes.grains)
    settings = [*inside, *paths, LITE0, "evaluation.metrics=[fd]", "evaluation.floor=false", "run_name=maps"]
    command("evaluate", *settings, "images.num_samples=6")
    record = json.loads(Path("runs/evaluate/maps/metrics.json").read_text())
    mean = CodeDataset(codes, "train")[range(6)].codes.lengths.double().mean().item()
    assert record["metrics"]["codes_per_image"] == pytest.approx(mean)
    assert "training images" in json.dumps(record)
    with pytest.raises(SystemExit):
        command("evaluate", *settings, "images.num_samples=6", "images.labels=drawn", "run_name=drawn-maps")
    assert "leave images.labels=balanced" in capsys.readouterr().err


@pytest.mark.parametrize(("what", "count"), [("grains", 1), ("regions", 5)])
def test_samples_complete_what_is_given(inside, what, count, capsys):
    paths = [f"{stage}_path=runs/{job}/export" for stage, job in
             (("tokenizer", "train_tokenizer/tok"), ("generator", "train_generator/ar"))]  # fmt: skip
    codes = CodeDataset("runs/extract_codes/codes/codes", "test")
    given = ["given.codes_path=runs/extract_codes/codes/codes", "given.images=3"]
    command("sample", *paths, *given, f"given.{what}={count}", "num_samples=6", "batch_size=4", f"run_name=of-{what}")
    run = Path(f"runs/sample/of-{what}")
    real = codes[[0, 1, 2] * 2]
    with np.load(run / "samples.npz") as arrays:
        drawn = GrainCodes(
            *(torch.from_numpy(arrays[key].astype("int64")) for key in ("grains", "indices")), codes.layout
        )
        assert torch.equal(torch.from_numpy(arrays["labels"]), real.labels)
    prefix = getattr(CodePrefix, f"of_{what}")(real.codes, count)
    known = prefix.known_cells
    assert 0 < known.double().mean() < 1
    assert torch.equal(drawn.indices[known], real.codes.indices[known])
    assert not torch.equal(drawn.indices[~known], real.codes.indices[~known])
    side, gap = 2 * codes.layout.image_size[0], 2
    assert Image.open(run / "samples.png").size == (3 * (side + gap) + gap, 4 * (side + gap) + gap)
    for more, expected in (
        (["given.map=true"], f"given.{what}={count} given.map=True: expected one of them"),
        (["classes=[99]"], "classes=[99]: expected labels from 0 to 1"),
        ([f"given.{what}=99"], f"given.{what}=99: expected 0 to"),
        (["given.images=0"], "given.images=0: expected 1 or more"),
        (["given.codes_path=/nowhere"], "type given.codes_path=latest or given.codes_path=/path"),
    ):
        assert expected in refusal(capsys, "sample", *paths, *given, f"given.{what}={count}", *more)


@pytest.mark.parametrize("conditioning", ["class", "none"])
def test_a_generator_that_fills_in_masks_is_a_configuration(conditioning, inside, capsys):
    name, run = f"masked-{conditioning}", train_masked(conditioning)
    figures = result(run)["metrics"]
    assert result(run)["objective"] == pytest.approx(figures["content"] + figures["grains"])
    line = next(line for line in read_log(run) if "train/loss" in line)
    for group in ("0", "1", "at_25", "at_50", "at_75", "at_100"):
        assert 0 <= line[f"train/accuracy_{group}"] <= 1
        assert figures[f"content_{group}"] >= 0  # of 8 images, not all kinds of masks need be there
    assert max(figures[f"content_at_{percent}"] for percent in (25, 50, 75, 100)) > 3
    paths = ["tokenizer_path=runs/train_tokenizer/tok/export", f"generator_path={run}/export", "sampler=masked"]
    command("sample", *paths, "num_samples=6", "batch_size=4", f"run_name={name}")
    generator = graincode.load_generator(run / "export")
    labels = torch.arange(6) % 2 if conditioning == "class" else torch.zeros(6).long()
    with np.load(f"runs/sample/{name}/samples.npz") as arrays:
        assert (generator.sample(labels, batch_size=4).indices.numpy() == arrays["indices"]).all()
    settings = [*inside, *paths, LITE0, "evaluation.metrics=[fd]", "evaluation.floor=false", "batch_size=4"]
    command("evaluate", *settings, "images.num_samples=6", "sampler.order=dense_first", f"run_name={name}")
    record = json.loads(Path(f"runs/evaluate/{name}/metrics.json").read_text())
    assert record["sampler"]["order"] == "dense_first"
    assert 16 <= record["metrics"]["codes_per_image"] <= 64
    for job, more, expected in (
        ("sample", ["sampler=autoregressive"], "type sampler=masked"),
        ("evaluate", [*inside, "evaluation=likelihood"], "type evaluation=generation"),
    ):
        with pytest.raises(SystemExit):
            command(job, *paths, *more)
        assert expected in capsys.readouterr().err.splitlines()[-1]


def test_any_part_of_an_image_is_drawn_anew(inside, capsys):
    paths = [
        "tokenizer_path=runs/train_tokenizer/tok/export",
        f"generator_path={train_masked('class')}/export",
    ]
    codes = CodeDataset("runs/extract_codes/codes/codes", "test")
    given = ["sampler=masked", "given.codes_path=runs/extract_codes/codes/codes", "given.images=2", "num_samples=4"]
    kept = torch.zeros(4, 4, dtype=torch.bool)
    kept[1:3, 1:4] = True
    pixels = np.zeros((32, 32), dtype=np.uint8)
    pixels[8:24, 8:32] = 255
    pixels[9:20, 2:8] = 200  # no whole region
    Image.fromarray(pixels).save("mask.png")
    Image.fromarray(pixels[:, 1:]).save("narrow.png")
    Image.fromarray(np.full_like(pixels, 255)).save("white.png")
    Image.fromarray(np.dstack([np.full_like(pixels, 255)] * 3 + [pixels])).save("cut-out.png")  # white, or transparent
    for name, keys in (
        ("mask", ["given.mask=mask.png"]),
        ("cut-out", ["given.mask=cut-out.png", "given.map=true", "classes=[1,0]"]),
    ):
        command("sample", *paths, *given, *keys, "batch_size=4", f"run_name=edit-{name}")
        real = codes[[0, 1] * 2]
        cells = codes.layout.expand(kept, 0)
        with np.load(f"runs/sample/edit-{name}/samples.npz") as arrays:
            grains, indices = (torch.from_numpy(arrays[key].astype("int64")) for key in ("grains", "indices"))
            labels = arrays["labels"].tolist()
        assert torch.equal(grains[:, kept], real.codes.grains[:, kept])
        assert torch.equal(indices[:, cells], real.codes.indices[:, cells])
        assert not torch.equal(indices[:, ~cells], real.codes.indices[:, ~cells])
        assert labels == ([1, 1, 0, 0] if name == "cut-out" else real.labels.tolist())
    assert torch.equal(grains, real.codes.grains)  # the map was to be kept
    side, gap = 2 * codes.layout.image_size[0], 2
    assert Image.open("runs/sample/edit-mask/samples.png").size == (2 * (side + gap) + gap, 4 * (side + gap) + gap)
    Image.fromarray(255 - pixels).save("mask.png")
    autoregressive = [paths[0], "generator_path=runs/train_generator/ar/export", "sampler=autoregressive"]
    for more, expected in (
        ([*paths, *given, "given.mask=mask.png", "given.grains=1"], "given.mask=mask.png: expected one of them"),
        ([*paths, *given, "given.mask=mask.png", "batch_size=4", "run_name=edit-mask"], "(inputs.mask: "),
        ([*paths, *given, "given.mask=narrow.png"], "narrow.png: expected 32 x 32 pixels"),
        ([*paths, *given, "given.mask=none.png"], "none.png cannot be read as an image"),
        ([*paths, *given, "given.mask=white.png"], "white.png: expected an image that is not white everywhere"),
        ([*paths, *given, "given.mask=mask.png", "given.split=dev"], "dev.grains.npy is missing"),
        ([*given[1:], *autoregressive, "given.mask=mask.png"], "expected first grains, first regions or a grain map"),
    ):
        assert expected in refused("sample", *more)


def test_mirror_images_are_stored_beside_the_images_and_trained_on(inside):
    from graincode.data import ImageFolder

    tokenizer = graincode.load_tokenizer("runs/train_tokenizer/tok/export")
    flip = ["views=2", "augmentation.flip=true"]
    command("extract_codes", *inside, *flip, "tokenizer_path=runs/train_tokenizer/tok/export", "run_name=mirrored")
    path = Path("runs/extract_codes/mirrored/codes")
    codes, plain = CodeDataset(path, "train"), CodeDataset("runs/extract_codes/codes/codes", "train")
    assert (codes.info["views"], plain.info["views"]) == (2, 1)
    assert codes.identity != plain.identity
    assert len(CodeDataset(path, "val")) == len(CodeDataset(plain.path, "val"))
    batch = ImageFolder(inside[1].split("=")[1], image_size=32, test_fraction=0.3).split("train")[range(len(plain))]
    halves = tokenizer.tokenize(batch.images), tokenizer.tokenize(batch.images.flip(-1))
    assert not torch.equal(halves[0].indices, halves[1].indices)
    stored, expected = codes[range(len(codes))], graincode.GrainCodes.cat(halves)
    assert torch.equal(stored.codes.grains, expected.grains)
    assert torch.equal(stored.codes.indices, expected.indices)
    assert torch.equal(stored.labels, batch.labels.repeat(2))
    assert codes.lengths.tolist() == expected.lengths.tolist()
    for window in (1, 3):
        run = f"mirrored-{window}"
        settings = [f"codes_path={path}", f"trainer.bucketing_window={window}", f"run_name={run}"]
        command("train_generator", *TINY_GENERATOR, *TINY_TRAINER, *settings)
        lines = [line for line in read_log(Path(f"runs/train_generator/{run}")) if "train/loss" in line]
        assert all(0 <= line["speed/padding_share"] < 0.8 for line in lines)
        assert all(line["speed/tokens_per_second"] > 16 * line["speed/images_per_second"] for line in lines)
        assert not any("train/tokens_per_image" in line or "train/padding_share" in line for line in lines)


def test_codes_from_before_there_were_views_are_read(inside, tmp_path):
    for file in Path("runs/extract_codes/codes/codes").glob("val.*"):
        shutil.copy(file, tmp_path)
    info = json.loads(Path("runs/extract_codes/codes/codes/codes.json").read_text())
    (tmp_path / "codes.json").write_text(
        json.dumps({k: v for k, v in info.items() if k not in ("views", "augmentation")})
    )
    np.save(tmp_path / "val.density.npy", np.zeros(1))  # which earlier versions wrote
    codes = CodeDataset(tmp_path, "val")
    assert codes.info["views"] == 1
    assert len(codes[0].codes) == 1


def test_samples_are_kept_with_their_codes(inside):
    run = Path("runs/sample/samples")
    with np.load(run / "samples.npz") as arrays:
        assert arrays["images"].shape == (6, 32, 32, 3)
        assert arrays["images"].dtype == np.uint8
        assert arrays["labels"].tolist() == [0, 1, 0, 1, 0, 1]
        tokenizer = graincode.load_tokenizer("runs/train_tokenizer/tok/export")
        codes = graincode.GrainCodes(
            torch.from_numpy(arrays["grains"]).long(), torch.from_numpy(arrays["indices"]).long(), tokenizer.layout
        )
        shown = ((tokenizer.detokenize(codes) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        assert (shown == arrays["images"]).all()
    assert Image.open(run / "samples.png").size[0] > 64


@pytest.mark.parametrize("kind", ["ar", "masked-class"])
def test_samples_of_a_generator_in_half_precision(kind, inside, capsys):
    train_masked("class")
    paths = ["tokenizer_path=runs/train_tokenizer/tok/export", f"generator_path=runs/train_generator/{kind}/export"]
    sampler = f"sampler={'autoregressive' if kind == 'ar' else 'masked'}"
    command("sample", *paths, sampler, "num_samples=6", "precision=bfloat16", f"run_name=half-{kind}")
    assert re.search(r"6 samples of [\d.]+ codes, drawn and decoded at [\d.e+]+ images/s: ", capsys.readouterr().out)
    generator = graincode.load_generator(f"runs/train_generator/{kind}/export").bfloat16()
    with np.load(f"runs/sample/half-{kind}/samples.npz") as arrays:
        # the job draws six at once, though batch_size is 250
        assert (generator.sample(torch.arange(6) % 2, batch_size=6).indices.numpy() == arrays["indices"]).all()
    assert "type precision= one of" in refusal(capsys, "sample", *paths, sampler, "precision=float8")


@pytest.mark.parametrize("compiled", [False, True])
def test_what_samples_are_drawn_with_is_compiled_if_it_is_asked_for(compiled, inside, monkeypatch):
    calls = []
    monkeypatch.setattr(DGiTAR, "compile_sampling", lambda model: calls.append(model))
    paths = ["tokenizer_path=runs/train_tokenizer/tok/export", "generator_path=runs/train_generator/ar/export"]
    how = [f"hardware.compile={compiled}", f"run_name=compiled-{compiled}"]
    command("sample", *paths, "num_samples=2", *how)
    command("evaluate", *inside, *paths, LITE0, "evaluation.metrics=[fd]", "images.num_samples=2", *how)
    assert len(calls) == 2 * compiled


def test_a_picture_of_samples_has_a_column_for_each_class_unless_they_are_many():
    assert [sample._columns(classes, None) for classes in (0, 2, 20, 21, 1000)] == [10, 2, 20, 10, 10]
    assert sample._columns(2, [1]) == 10


def test_nothing_is_given_of_samples_by_default():
    for overrides in ([], ["given=null"], ["given.grains=0"]):
        assert given.asked(check("sample", overrides)) == {}


def test_the_public_functions_give_what_the_jobs_give(inside):
    generator = graincode.load_generator("runs/train_generator/ar/export")
    codes = generator.sample(torch.arange(6) % 2, seed=0, batch_size=4)
    with np.load("runs/sample/samples/samples.npz") as arrays:
        assert (codes.indices.numpy() == arrays["indices"]).all()
        assert (codes.grains.numpy() == arrays["grains"]).all()


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

    state = read_state(Path(f"runs/train_tokenizer/export-best/state/step_{best:09d}"), torch.device("cpu"))
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


def test_what_is_logged(inside):
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


TRIPLE = ["tokenizer.grains=[[16,16],[8,8],[4,4]]", "tokenizer.ratios=[0.2,0.5,0.3]"]


@pytest.mark.parametrize(
    ("name", "settings", "lengths"),
    [
        ("published", ["tokenizer=dqvae"], (16, 64)),
        ("feature", ["tokenizer=dqvae", "tokenizer/router=feature"], (16, 64)),
        ("elastic", [*TRIPLE, "tokenizer.router.elastic=true"], (4, 64)),
        ("image", [*TRIPLE, "tokenizer.router.density.of=error", "tokenizer.router.scope=image"], (25, 25)),
        ("length-32", ["tokenizer.grains=[[4,8]]", "tokenizer.ratios=[1]"], (32, 32)),
    ],
)
def test_routers_grains_and_fixed_length_are_configurations(name, settings, lengths, inside):
    run = f"run_name={name}"
    command("train_tokenizer", *inside, *TINY_TOKENIZER, *TINY_TRAINER, *settings, "trainer.steps=2", run)
    path = f"tokenizer_path=runs/train_tokenizer/{name}/export"
    command("extract_codes", *inside, path, run)
    codes = CodeDataset(f"runs/extract_codes/{name}/codes", "train")
    batch = codes[range(len(codes))]
    found = batch.codes.lengths
    assert int(found.min()) >= lengths[0]
    assert int(found.max()) <= lengths[1]
    if name == "published":  # by entropy: busy images get more codes
        labels, found = batch.labels, found.float()
        assert found[labels == 0].mean() > found[labels == 1].mean()
    if name not in ("elastic", "length-32"):
        return
    assert codes.layout.codebook == "per_grain"
    settings = [f"codes_path=runs/extract_codes/{name}/codes", "generator/conditioning=none", run]
    command("train_generator", *TINY_GENERATOR, *TINY_TRAINER, *settings)
    generator = f"generator_path=runs/train_generator/{name}/export"
    command("sample", path, generator, "num_samples=3", "batch_size=3", run)
    assert lengths[0] <= result(Path(f"runs/sample/{name}"))["mean_length"] <= lengths[1]


def test_ratios_and_psnr_can_be_asked_for_when_codes_are_extracted(inside):
    path = "tokenizer_path=runs/train_tokenizer/tok/export"
    for name, wanted, length in (("coarse", "ratios=[1,0]", 16), ("fine", "ratios=[0,1]", 64), ("vague", "psnr=1", 16)):
        command("extract_codes", *inside, path, wanted, "splits=[val]", f"run_name={name}")
        assert result(Path(f"runs/extract_codes/{name}"))["objective"] == length


@pytest.mark.parametrize("recipe", ["tok_imagenet_dual", "tok_imagenet_triple"])
def test_the_published_sizes_take_a_training_step(recipe):
    cfg = check("train_tokenizer", [f"experiment={recipe}", "data.root=none"])
    grains = [list(grain) for grain in cfg.tokenizer.grains]
    layout = CodeLayout((256, 256), grains, cfg.tokenizer.codebook_size, 1000, cfg.tokenizer.codebook)
    torch.manual_seed(0)
    module, adversary = build(with_layout(cfg.tokenizer.model, layout)), build(cfg.tokenizer.adversary)
    assert layout.max_tokens - layout.num_ends == 1024
    assert module.quantizers[0].codebook.shape == (1024, 256)
    images, rng = torch.rand(1, 3, 256, 256) * 2 - 1, SampleRng(0, torch.arange(1))
    images[..., :128] = 0.5
    module.quantizers[0].initialize(torch.randn(4096, 256))
    module.calibrate([images])
    optimizer, before = build(cfg.optimizer)(module.parameters()), module.quantizers[0].codebook.clone()
    made = module(images, rng=rng)
    terms = build(cfg.tokenizer.objective, perceptual=None)(images, made, module.router.nominal_length)
    assert cfg.tokenizer.perceptual._target_.endswith("LPIPSDistance")  # whose weights are not at hand
    adversary.adaptive.fill_(0.5)
    terms["adversarial"], gradients = adversary.generator_term(
        made.images, terms["l1"], module.decoder.last.weight, 20_000
    )
    weighted_sum(terms).backward()
    optimizer.step()
    module.update([made.quantized], [made.routing])
    assert all(bool(parameter.grad.isfinite().all()) for parameter in module.parameters())
    weighted_sum(adversary.discriminator_terms(adversary(torch.cat([images, made.images.detach()])))[0]).backward()
    adversary.update([gradients])
    assert 0 < float(adversary.adaptive) <= 0.75
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in adversary.parameters())
    assert not torch.equal(module.quantizers[0].codebook, before)
    assert len(set(made.routing.grains.flatten().tolist())) > 1


@pytest.mark.parametrize(("recipe", "classes"), [
    ("ar_imagenet", 1000), ("ar_ffhq", 0), ("nar_imagenet", 1000), ("nar_ffhq", 0),
])  # fmt: skip
def test_the_published_generators_take_a_training_step(recipe, classes):
    cfg = check("train_generator", [f"experiment={recipe}"])
    layout = CodeLayout((64, 64), [[16, 16], [8, 8]], 1024, classes)  # smaller images, all else as published
    torch.manual_seed(0)
    module = build(with_layout(cfg.generator.model, layout))
    stacks = [part for part in module.children() if isinstance(part, Transformer)]
    assert [len(stack.blocks) for stack in stacks] == [6, 18]
    assert 12 * 24 * 1024**2 < sum(p.numel() for p in module.parameters()) < 310e6
    grains = torch.arange(16).view(1, 4, 4) % 2
    codes = GrainCodes(grains, torch.zeros(1, 8, 8, dtype=torch.long), layout)
    optimizer, before = build(cfg.optimizer)(module.parameters()), module.content_head.weight.clone()
    weighted_sum(build(cfg.generator.objective)(module(codes, torch.zeros(1, dtype=torch.long)))).backward()
    optimizer.step()
    trained = [parameter.grad for name, parameter in module.named_parameters()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in trained)
    assert not torch.equal(module.content_head.weight, before)


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
