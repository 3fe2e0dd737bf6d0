"""Samples: of all generators, with what is given of them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_GENERATOR, TINY_TRAINER, command, refusal, refused, result, train_masked
from PIL import Image

import graincode
from graincode.config.validate import check
from graincode.core.codes import GrainCodes
from graincode.core.prompts import CodePrefix
from graincode.data import CodeDataset
from graincode.data.codes import write_info
from graincode.generator import DGiTAR
from graincode.jobs import given, sample
from graincode.training.trackers import read_log

pytestmark = pytest.mark.slow

LITE0 = "features=lite0_112"


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
    assert "images.labels=drawn: " in capsys.readouterr().err


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
        (["given.map=true"], f"given.{what}={count} given.map=true: expected one of them"),
        (["classes=[99]"], "classes=[99]: expected labels from 0 to 1"),
        ([f"given.{what}=99"], f"given.{what}=99: expected 0 to"),
        (["given.images=0"], "given.images=0: expected 1 or more"),
        (["given.codes_path=/nowhere"], "given.codes_path=/nowhere: expected latest or a path"),
    ):
        assert expected in refusal(capsys, "sample", *paths, *given, f"given.{what}={count}", *more)


@pytest.mark.when(
    "a generator of another order of tokens meets codes of its tokenizer",
    "it takes them in its own order: codes do not depend on it",
)
def test_the_order_of_a_generators_tokens_is_its_own(inside):
    codes, run = "runs/extract_codes/codes/codes", "rows"
    command("train_generator", *TINY_GENERATOR, *TINY_TRAINER, f"codes_path={codes}", f"run_name={run}",
            "generator.sequence.last_grain_order=rows", "generator.sequence.grain_starts=true")  # fmt: skip
    paths = ["tokenizer_path=runs/train_tokenizer/tok/export", f"generator_path=runs/train_generator/{run}/export"]
    layout = graincode.load_generator(f"runs/train_generator/{run}/export").layout
    assert (layout.last_grain_order, layout.grain_starts) == ("rows", True)
    command("evaluate", *inside, *paths, "evaluation=likelihood", "images.split=val", f"run_name={run}")
    bits = json.loads(Path(f"runs/evaluate/{run}/metrics.json").read_text())["metrics"]["bits_per_image"]
    # its own evaluation at the end of training is of the same images and weights
    assert bits == pytest.approx(result(Path(f"runs/train_generator/{run}"))["objective"], rel=1e-5)
    command("sample", *paths, f"given.codes_path={codes}", "given.regions=5", "num_samples=3", f"run_name={run}")
    real = CodeDataset(codes, "test")[range(3)].codes
    known = CodePrefix.of_regions(GrainCodes(real.grains, real.indices, layout), 5).known_cells
    assert 0 < known.double().mean() < 1
    with np.load(f"runs/sample/{run}/samples.npz") as arrays:
        assert np.array_equal(arrays["indices"][known.numpy()], real.indices[known].numpy())


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
        ("sample", ["sampler=autoregressive"], "sampler=autoregressive: expected auto or masked"),
        ("evaluate", [*inside, "evaluation=likelihood"], "export: generator=DGiTNAR: expected one with a likelihood"),
    ):
        with pytest.raises(SystemExit):
            command(job, *paths, *more)
        assert expected in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.when(
    "codes that samples are given are of another tokenizer", "one line says so: its codes mean other images"
)
def test_codes_of_another_tokenizer_are_not_given(inside):
    shutil.copytree("runs/extract_codes/codes/codes", "foreign")
    about = json.loads(Path("foreign/codes.json").read_text())
    own, foreign = about["tokenizer"], "0123456789abcdef"
    del about["identity"]
    write_info(Path("foreign"), about | {"tokenizer": foreign})
    paths = ["tokenizer_path=runs/train_tokenizer/tok/export", "generator_path=runs/train_generator/ar/export"]
    line = refused("sample", *paths, "given.codes_path=foreign", "given.regions=5")
    assert line.startswith(f"given.codes_path={Path('foreign').resolve()}: codes of tokenizer {foreign}, ")
    assert f"are of {own};" in line


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
        ([*paths, *given, "given.mask=none.png"], "none.png: no such file"),
        ([*paths, *given, "given.mask=white.png"], "white.png: expected an image that is not white everywhere"),
        ([*paths, *given, "given.mask=mask.png", "given.split=dev"], "no codes of dev"),
        ([*given[1:], *autoregressive, "given.mask=mask.png"], "first grains, regions or a grain map"),
    ):
        assert expected in refused("sample", *more)


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
    assert "precision=float8: expected one of" in refusal(capsys, "sample", *paths, sampler, "precision=float8")


@pytest.mark.parametrize("compiled", [False, True])
def test_sampling_is_compiled_if_asked_for(compiled, inside, monkeypatch):
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
        assert given.find_given(check("sample", overrides), None) is None


def test_the_public_functions_give_what_the_jobs_give(inside):
    generator = graincode.load_generator("runs/train_generator/ar/export")
    codes = generator.sample(torch.arange(6) % 2, seed=0, batch_size=4)
    with np.load("runs/sample/samples/samples.npz") as arrays:
        assert (codes.indices.numpy() == arrays["indices"]).all()
        assert (codes.grains.numpy() == arrays["grains"]).all()
