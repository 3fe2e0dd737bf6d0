"""Codes on disk are those of the tokenizer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_GENERATOR, TINY_TOKENIZER, TINY_TRAINER, command, refused, result

import graincode
from graincode.data import CodeDataset
from graincode.files import read_json
from graincode.training.trackers import read_log

pytestmark = pytest.mark.slow

TRIPLE = ["tokenizer.grains=[[16,16],[8,8],[4,4]]", "tokenizer.ratios=[0.2,0.5,0.3]"]


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
        json.dumps({k: v for k, v in info.items() if k not in ("views", "augmentation", "identity")})
    )
    np.save(tmp_path / "val.density.npy", np.zeros(1))  # which earlier versions wrote
    codes = CodeDataset(tmp_path, "val")
    assert codes.info["views"] == 1
    assert len(codes[0].codes) == 1


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
    assert refused("extract_codes", *inside, path, "ratios=[0.5]", "run_name=no").startswith("ratios=[0.5]: expected 2")
    assert not Path("runs/extract_codes/no").exists()
    for name, wanted, length in (("coarse", "ratios=[1,0]", 16), ("fine", "ratios=[0,1]", 64), ("vague", "psnr=1", 16)):
        command("extract_codes", *inside, path, wanted, "splits=[val]", f"run_name={name}")
        assert result(Path(f"runs/extract_codes/{name}"))["objective"] == length


def test_codes_may_be_extracted_in_another_precision_which_is_another_run(inside):
    made = ["tokenizer_path=runs/train_tokenizer/tok/export", "splits=[test]", "runs_dir=runs/precise"]
    for precision in ("float32", "tf32", "bfloat16"):
        command("extract_codes", *inside, *made, f"precision={precision}")
    runs = {read_json(run.parent / "config.json", {}, "")["config"].get("precision"): run.parent
            for run in Path("runs/precise/extract_codes").glob("default-*/codes")}  # fmt: skip
    assert runs.keys() == {None, "tf32", "bfloat16"}  # runs of before keep their name
    found = {name: CodeDataset(run / "codes", "test") for name, run in runs.items()}
    assert [codes.info.get("precision") for codes in found.values()] == list(found)
    everything = [codes[range(len(codes))].codes for codes in (found[None], found["tf32"], found["bfloat16"])]
    assert torch.equal(everything[0].indices, everything[1].indices)  # TF32 is of GPUs
    share = float((everything[0].indices != everything[2].indices).double().mean())
    assert 0 < share < 0.5  # the router measures what decodes of all grains leave
    line = refused("extract_codes", *inside, *made, "precision=fp16")
    assert line == "precision=fp16: expected one of float32, tf32, bfloat16"
