"""The evaluation from the command line: what it agrees with, what it keeps, what it refuses."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from helpers import command, refused, result, write_images, write_inception
from helpers_networks import in_torch_fidelity
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity import calculate_metrics

from graincode.core.errors import GraincodeError
from graincode.data import CodeDataset
from graincode.evaluation.subjects import Folder
from graincode.export import load_export
from graincode.networks.features import Lite0Features

LITE0 = ("features=lite0_112", "features.lite0_112.resolution=32")  # the quickest
TOKENIZER = "tokenizer_path=runs/train_tokenizer/tok/export"
GENERATOR = "generator_path=runs/train_generator/ar/export"


def record_of(run: str) -> dict:
    return json.loads(Path(f"runs/evaluate/{run}/metrics.json").read_text())


def write_pictures(folder: Path, count: int, seed: int, coarse: int, side: int = 32, form: str = "png") -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for index in range(count):
        small = Image.fromarray(rng.integers(0, 256, (coarse, coarse, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{index:03}.{form}")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Two folders of images that differ."""
    root = tmp_path_factory.mktemp("folders")
    return write_pictures(root / "a", 40, 0, 4), write_pictures(root / "b", 44, 1, 7)


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    return write_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("features", ["lite0_112", "inception"])
def test_metrics_are_those_of_torch_fidelity(features, folders, inception, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAINCODE_CACHE", str(tmp_path / "cache"))
    a, b = folders
    if features == "inception":  # which takes a second for three images
        a, b = write_pictures(tmp_path / "a", 8, 0, 4), write_pictures(tmp_path / "b", 9, 1, 7)
    counts, subset = (len(list(a.iterdir())), len(list(b.iterdir()))), min(20, len(list(a.iterdir())) - 4)
    weights = {"feature_extractor_weights_path": str(inception)} if features == "inception" else {}
    names = {"lite0_112": in_torch_fidelity(Lite0Features(32)), "inception": "inception-v3-compat"}
    expected = calculate_metrics(
        input1=str(a), input2=str(b), feature_extractor=names[features], fid=True, isc=True, kid=True, prc=True,
        isc_splits=4, kid_subset_size=subset, kid_subsets=50, rng_seed=7, batch_size=32, cuda=False, cache=False,
        verbose=False, **weights,
    )  # fmt: skip
    more = ["features=inception", f"features.inception.weights={inception}"] if weights else LITE0
    command("evaluate", "images=folder", f"images.path={a}", "reference=folder", f"reference.path={b}", "seed=7",
            "evaluation.inception_splits=4", f"evaluation.kid_subset_size={subset}",
            "evaluation.kid_subsets=50", "evaluation.metrics=[fd,is,kid,precision_recall]", "run_name=tf",
            "batch_size=9", *more)  # fmt: skip
    record = record_of("tf")
    end = "" if weights else "_lite0@32"
    found, spread = record["metrics"], record["uncertainty"]
    for name, value in (
        ("fid" if weights else "fd_lite0@32", expected["frechet_inception_distance"]),
        (f"is{end}", expected["inception_score_mean"]),
        (f"kid{end}", expected["kernel_inception_distance_mean"]),
        (f"precision{end}", expected["precision"]),
        (f"recall{end}", expected["recall"]),
    ):
        assert found[name] == pytest.approx(value, rel=1e-5)
    assert spread[f"is{end}"]["std"] == pytest.approx(expected["inception_score_std"], rel=1e-4)
    assert spread[f"kid{end}"]["std"] == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-4)
    assert (record["count"], record["reference_count"], record["seed"]) == (*counts, 7)


@pytest.mark.slow
def test_an_npz_reference_gives_the_distance_of_the_folder_that_it_was_made_from(folders, inside):
    a, b = folders
    command("evaluate", *LITE0, "evaluation=statistics", "images=folder", f"images.path={b}", "run_name=stat")
    statistics = Path("runs/evaluate/stat/statistics-lite0@32.npz")
    shared = Path("runs/shared.npz")  # as the field shares them: mu and sigma alone
    with np.load(statistics, allow_pickle=False) as arrays:
        assert int(arrays["count"]) == 44
        np.savez(shared, mu=arrays["mu"], sigma=arrays["sigma"])
    images = [*LITE0, "images=folder", f"images.path={a}"]
    command("evaluate", *images, "reference=folder", f"reference.path={b}", "run_name=folder")
    command("evaluate", *images, "reference=statistics", f"reference.path={statistics}", "run_name=own")
    command("evaluate", *images, "reference=statistics", f"reference.path={shared}", "run_name=shared")
    distances = [record_of(name)["metrics"]["fd_lite0@32"] for name in ("folder", "own", "shared")]
    assert distances[0] == distances[1] == distances[2] > 0
    left_out = [line.split()[0] for line in record_of("shared")["warnings"] if "file of means and covariances" in line]
    assert left_out == ["kid", "precision_recall", "density_coverage"]
    assert record_of("shared")["reference_count"] is None


@pytest.mark.slow
def test_images_against_a_reference_file_of_themselves(inception, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAINCODE_CACHE", str(tmp_path / "cache"))
    a = write_pictures(tmp_path / "a", 5, 0, 4)
    images = ["images=folder", f"images.path={a}", f"features.inception.weights={inception}"]
    command("evaluate", *images, "evaluation=statistics", "keep=npz", "run_name=own")
    with np.load("runs/evaluate/own/statistics-inception-v3-compat.npz", allow_pickle=False) as known:
        statistics = {name: known[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    with np.load("runs/evaluate/own/images.npz") as kept:
        np.savez("VIRTUAL_imagenet256_labeled.npz", arr_0=kept["arr_0"], **statistics)
    command("evaluate", *images, "evaluation=adm", "run_name=adm")
    metrics = record_of("adm")["metrics"]
    assert list(metrics) == ["fid", "sfid", "is", "precision", "recall"]
    assert abs(metrics["fid"]) < 1e-6
    assert abs(metrics["sfid"]) < 1e-6
    assert metrics["precision"] == metrics["recall"] == 1
    lines = capsys.readouterr().out
    for part in ("adm: 5 images (a images; uint8 as they are) against VIRTUAL_imagenet256_labeled.npz, 5 images",
                 "features of inception-v3-compat: torch-fidelity's port; bilinear without antialias"):  # fmt: skip
        assert part in lines
    known = "reference.path=runs/evaluate/own/statistics-inception-v3-compat.npz"
    command("evaluate", *images, "reference=statistics", known, "evaluation.metrics=[sfd]", "run_name=spatial")
    assert record_of("spatial")["metrics"] == pytest.approx({"sfid": 0}, abs=1e-6)
    line = refused("evaluate", *images, "reference=folder", "reference.path=VIRTUAL_imagenet256_labeled.npz")
    assert line.startswith("reference.path=VIRTUAL_imagenet256_labeled.npz: holds images and statistics")


@pytest.mark.slow
def test_evaluation_of_reconstructions_and_of_samples(inside, capsys):
    command("evaluate", *inside, *LITE0, TOKENIZER, "evaluation=reconstruction", "run_name=rec")
    record = record_of("rec")
    assert record["features"].keys() == {"lite0@32"}
    assert record["count"] == record["reference_count"] == 8
    assert record["metrics"]["psnr_mean"] > 3
    assert -1 <= record["metrics"]["ssim"] <= 1
    assert result(Path("runs/evaluate/rec"))["objective"] == record["metrics"]["rfd_lite0@32"]
    settings = ["images.num_samples=12", "sampler.guidance_scale=1.5", "batch_size=5"]
    command("evaluate", *inside, *LITE0, TOKENIZER, GENERATOR, *settings, "run_name=gen")
    record = record_of("gen")
    assert record["sampler"]["guidance_scale"] == 1.5
    assert record["seed"] == 0
    assert all(len(record[name]) >= 16 for name in ("reference_hash", "generator", "tokenizer"))
    assert record["metrics"]["fd_lite0@32"] > 0
    assert record["metrics"]["fd_floor_lite0@32"] > 0
    assert 0 <= record["metrics"]["class_accuracy_lite0@32"] <= 1
    assert any("1280 features, and there are only 8 images" in line for line in record["warnings"])
    assert "fd_lite0@32" in capsys.readouterr().out
    assert list(Path(os.environ["GRAINCODE_CACHE"]).glob("statistics/lite0@32-*.safetensors"))
    with Path("runs/evaluate/table.csv").open() as file:
        lines = {line["run"]: line for line in csv.DictReader(file)}
    assert float(lines["gen"]["fd_lite0@32"]) == record["metrics"]["fd_lite0@32"]
    assert lines["gen"]["sampler.guidance_scale"] == "1.5"
    assert lines["rec"]["fd_lite0@32"] == ""


def test_reference_statistics_are_used_again_unless_the_images_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAINCODE_CACHE", str(tmp_path / "cache"))
    a, b = write_pictures(tmp_path / "a", 12, 0, 4), write_pictures(tmp_path / "b", 12, 1, 4)
    rows = []
    forward = Lite0Features.__call__

    def counted(self, images):
        rows.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Lite0Features, "__call__", counted)

    def seen(name: str) -> int:
        rows.clear()
        command("evaluate", *LITE0, "images=folder", f"images.path={a}", "reference=folder", f"reference.path={b}",
                "evaluation.metrics=[fd]", f"run_name={name}")  # fmt: skip
        return sum(rows)

    assert [seen("first"), seen("again")] == [24, 12]
    Image.new("RGB", (32, 32)).save(b / "000.png")
    assert seen("changed") == 24
    distances = [record_of(name)["metrics"]["fd_lite0@32"] for name in ("first", "again", "changed")]
    assert distances[0] == distances[1] != distances[2]


@pytest.mark.parametrize("form", ["png", "npz"])
def test_kept_samples_are_measured_alike(form, inside):
    settings = [*LITE0, "images.num_samples=12", "evaluation.metrics=[fd,is]", "evaluation.floor=false"]
    command("evaluate", *inside, TOKENIZER, GENERATOR, *settings[:3], "evaluation.floor=false", f"keep={form}",
            "batch_size=5", f"run_name=keep-{form}")  # fmt: skip
    kept = f"runs/evaluate/keep-{form}/images" + (".npz" if form == "npz" else "")
    metrics = "evaluation.metrics=[fd,is" + (",class_consistency]" if form == "npz" else "]")
    command("evaluate", *inside, *LITE0, "images=folder", f"images.path={kept}", metrics, "evaluation.floor=false",
            f"run_name=kept-{form}")  # fmt: skip
    drawn, read = (record_of(f"{name}-{form}")["metrics"] for name in ("keep", "kept"))
    assert drawn["fd_lite0@32"] == read["fd_lite0@32"]
    assert drawn["is_lite0@32"] == read["is_lite0@32"]
    assert record_of(f"keep-{form}")["pixels"] == "rounded to the nearest uint8"
    if form == "npz":
        with np.load(kept, allow_pickle=False) as arrays:
            assert arrays["arr_0"].shape == (12, 32, 32, 3)
            assert arrays["arr_1"].tolist() == [0, 1] * 6
        assert drawn["class_accuracy_lite0@32"] == read["class_accuracy_lite0@32"]
        assert record_of("kept-npz")["labels"] == "2 classes of 6 images"
        # where no data set is read, none is trained on
        command("evaluate", *LITE0, "images=folder", f"images.path={kept}", "reference=folder",
                f"reference.path={kept}", "run_name=kept-self")  # fmt: skip
        assert any("the reference is no split" in line for line in record_of("kept-self")["warnings"])
    else:
        assert len(list(Path(kept).glob("*.png"))) == 12


@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch_but_for_rounding(inside):
    images = []
    for size in (7, 64):
        command("evaluate", *inside, *LITE0, TOKENIZER, GENERATOR, "images.num_samples=20", f"batch_size={size}",
                "evaluation.metrics=[fd,is]", "keep=npz", f"run_name=batch-{size}")  # fmt: skip
        with np.load(f"runs/evaluate/batch-{size}/images.npz") as arrays:
            images.append(arrays["arr_0"].astype(int))
    first, second = (record_of(f"batch-{size}")["metrics"] for size in (7, 64))
    assert first == pytest.approx(second, rel=1e-4)
    assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize("labels", ["drawn", "reference"])
def test_labels_can_be_drawn_or_taken_from_the_reference(labels, inside):
    command("evaluate", *inside, *LITE0, TOKENIZER, GENERATOR, "images.num_samples=11", f"images.labels={labels}",
            "evaluation.metrics=[fd]", "keep=npz", f"run_name=labels-{labels}")  # fmt: skip
    with np.load(f"runs/evaluate/labels-{labels}/images.npz") as arrays:
        found = arrays["arr_1"].tolist()
    assert set(found) == {0, 1}
    assert found != [0, 1] * 5 + [0]
    if labels == "reference":
        from graincode.data import ImageFolder

        test = ImageFolder(inside[1].split("=")[1], image_size=32, test_fraction=0.3).split("test").labels.tolist()
        assert found == (test * 2)[:11]


def test_pairs_of_folders_are_measured_as_reconstructions(folders, tmp_path, inside, capsys):
    a, _ = folders
    shifted = tmp_path / "shifted"
    shifted.mkdir()
    for path in sorted(a.iterdir()):
        pixels = np.asarray(Image.open(path)).clip(0, 245) + 10
        Image.fromarray(pixels.astype(np.uint8)).save(shifted / path.name)
    pair = [*LITE0, "evaluation=reconstruction", "images=folder", f"images.path={shifted}", "reference=folder"]
    command("evaluate", *pair, f"reference.path={a}", "evaluation.metrics=[ssim]", "run_name=pairs")
    figures = record_of("pairs")["metrics"]
    assert 27.9 < figures["psnr_mean"] < 28.6  # 255 / 10 is 28.1 dB; clipped pixels move less
    assert 0.9 < figures["ssim"] < 1
    assert "rfd_lite0@32" not in figures
    line = refused("evaluate", *pair, f"reference.path={folders[1]}")
    assert "40 images" in line
    (shifted / "039.png").rename(shifted / "040.png")
    line = refused("evaluate", *pair, f"reference.path={a}")
    assert "040.png" in line
    assert "039.png" in line


@pytest.mark.slow
def test_a_sweep_leaves_a_table_and_a_plot(inside, capsys):
    command("evaluate", "--multirun", *inside, *LITE0, TOKENIZER, GENERATOR, "images.num_samples=10",
            "evaluation.metrics=[fd,is]", "evaluation.floor=false", "sampler.guidance_scale=1,2",
            "sampler.top_k=0,4")  # fmt: skip
    folder = Path(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sweep: "))[7:]).parent
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    swept = {(row["sampler.guidance_scale"], row["sampler.top_k"]) for row in rows}
    assert swept == {(scale, k) for scale in ("1", "2") for k in ("0", "4")}
    for row in rows:
        assert float(row["fd_lite0@32"]) == record_of(row["run"])["metrics"]["fd_lite0@32"]
        assert record_of(row["run"])["sampler"]["guidance_scale"] == float(row["sampler.guidance_scale"])
    assert Image.open(folder / "plot.png").size[0] > 400


@pytest.mark.slow
def test_a_sweep_over_lengths_draws_error_over_rate(inside, capsys):
    command("evaluate", "--multirun", *inside, *LITE0, TOKENIZER, "evaluation=reconstruction",
            "evaluation.metrics=[ssim]", "images.ratios=[1,0],[0.5,0.5],[0,1]")  # fmt: skip
    folder = Path(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sweep: "))[7:]).parent
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    lengths = [float(row["codes_per_image"]) for row in rows]
    assert [lengths[0], lengths[2]] == [16, 64]
    for row, length in zip(rows, lengths, strict=True):
        assert float(row["bits_per_image"]) == pytest.approx(5 * length + float(row["grain_map_bits"]))
        assert 0 <= float(row["grain_map_bits"]) <= 16
    assert float(rows[0]["grain_map_bits"]) == float(rows[2]["grain_map_bits"]) == 0
    assert Image.open(folder / "rate_distortion.png").size[0] > 400


def test_warnings_about_metrics_are_recorded_beside_them(folders, tmp_path, inside):
    a, _ = folders
    jpeg = write_pictures(tmp_path / "jpeg", 40, 0, 4, side=48, form="jpg")
    command("evaluate", *LITE0, "images=folder", f"images.path={jpeg}", "reference=folder", f"reference.path={a}",
            "run_name=warned")  # fmt: skip
    warnings = "\n".join(record_of("warned")["warnings"])
    for part in ("kept as JPEG", "(48, 48) pixels against (32, 32)", "only 40 images", "no floor",
                 "class_consistency left out: the images have no classes"):  # fmt: skip
        assert part in warnings


def test_images_and_references_that_cannot_be_measured_are_refused(folders, tmp_path, inside, capsys):
    a, b = folders
    (tmp_path / "empty").mkdir()
    mixed = write_pictures(tmp_path / "mixed", 3, 0, 4)
    Image.new("RGB", (48, 32)).save(mixed / "003.png")
    one = write_pictures(tmp_path / "one", 1, 0, 4)
    np.savez(tmp_path / "small.npz", mu=np.zeros(10), sigma=np.eye(10))
    np.savez(tmp_path / "other.npz", samples=np.zeros(10))
    images, reference = [*LITE0, "images=folder", f"images.path={a}"], ["reference=folder", f"reference.path={b}"]
    for overrides, *expected in (
        (
            [*LITE0, "images=folder", f"images.path={tmp_path}/empty", *reference],
            "/empty: expected images",
        ),
        ([*LITE0, "images=folder", "images.path=/nowhere", *reference], "images.path=/nowhere: "),
        ([*LITE0, "images=folder", f"images.path={mixed}", *reference], "003.png", "32 x 48"),
        ([*LITE0, "images=folder", f"images.path={one}", *reference], "num_samples=1: expected 2 images"),
        ([*images, "reference=statistics", f"reference.path={tmp_path}/small.npz"], "reference.path=", "1280 features"),
        ([*images, "reference=statistics", f"reference.path={tmp_path}/other.npz"], "no arrays mu and sigma"),
        ([*images, "reference=folder", f"reference.path={tmp_path}/small.npz"], "mu and sigma are statistics"),
        (
            [*images, *reference, "evaluation.metrics=[class_consistency]"],
            "class_consistency: ",
        ),
        ([*images, *reference, "evaluation.inception_splits=41"], "evaluation.inception_splits=41: expected 1 to 40"),
        ([*images, *reference, "evaluation.kid_subset_size=41"], "kid: it needs 41 images, and there are 40"),
        (
            [*images, *reference, "evaluation.density_neighbours=40", "evaluation.metrics=[density_coverage]"],
            "density_coverage: it needs 41 images",
        ),
        ([*images, *reference, "evaluation.floor=true", "evaluation.metrics=[is]"], "evaluation.floor=true: "),
        ([*images, "evaluation=statistics", *reference], "reference=folder: expected split"),
        ([*images, *reference, "images.image_size=0"], "images.image_size=0: "),
        (
            [*inside, *LITE0, TOKENIZER, GENERATOR, "reference.split=train", "evaluation.metrics=[class_consistency]"],
            "the reference is what the classifier is trained on",
        ),
        ([*inside, *LITE0, TOKENIZER, "evaluation=reconstruction", "precision=bfloat16"], "precision=bfloat16: "),
    ):
        line = refused("evaluate", *overrides)
        for part in expected:
            assert part in line, line


def test_images_are_looked_for_before_networks_are_downloaded(tmp_path):
    line = refused("evaluate", "features=inception", "images=split", "data=image_folder", f"data.root={tmp_path}")
    assert line.startswith(f"data.root={tmp_path}: ")


def test_transparent_images_of_a_folder_are_on_a_background(tmp_path):
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "a.png")
    for background, pixel in ("white", 255), ("#000", 0), ("none", 10):
        images = Folder(str(tmp_path), background=background).open_reference(None, None).images
        assert images.load(torch.tensor([0]))[0][0, 0, 0, 0] == pixel
    with pytest.raises(GraincodeError, match=r"^background=whyte: "):
        Folder(str(tmp_path), background="whyte")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["images=reconstructions"], "images=reconstructions: "),
        (["reference=originals"], "reference=originals: expected split"),
        (["evaluation=reconstruction", "images=samples"], "images=samples: expected reconstructions or folder"),
        (["evaluation=reconstruction", "reference=split"], "reference=split: expected originals"),
        (["evaluation=reconstruction", "reference=statistics", "reference.path=a.npz"], "expected originals"),
        (["evaluation=reconstruction", "images=folder", "images.path=a"], "reference=originals: expected folder"),
        (["evaluation=likelihood", "images=samples"], "images=samples: expected split"),
        (["evaluation=statistics", "reference=originals"], "reference=originals: expected split"),
        (
            ["features=[lite0_112,lite0_224]", "reference=statistics", "reference.path=."],
            "features=[lite0_112,lite0_224]: expected one",
        ),
        (["evaluation.metrics=[]"], "evaluation.metrics=[]: expected null"),
        (["evaluation=reconstruction", "images.psnr=20", "images.ratios=[1,0]"], "images.psnr=20"),
    ],
)
def test_meaningless_comparisons_are_refused(overrides, expected):
    assert expected in refused("evaluate", *overrides)


def test_networks_can_be_several_at_once(folders, inside):
    a, b = folders
    command("evaluate", "features=[lite0_112,lite0_224]", LITE0[1], "features.lite0_224.resolution=48",
            "images=folder", f"images.path={a}", "reference=folder", f"reference.path={b}",
            "evaluation.metrics=[fd]", "run_name=both")  # fmt: skip
    assert record_of("both")["metrics"].keys() == {"fd_lite0@32", "fd_lite0@48"}
    command("evaluate", *LITE0, "images=folder", f"images.path={a}", "reference=folder", f"reference.path={b}",
            "evaluation.metrics=[fd]", "run_name=single")  # fmt: skip
    single = record_of("single")["metrics"]["fd_lite0@32"]
    assert record_of("both")["metrics"]["fd_lite0@32"] == single


def test_real_images_against_themselves_and_others(inside):
    command("evaluate", *inside, *LITE0, "images=split", "images.split=test", "run_name=self")
    figures = record_of("self")["metrics"]
    assert abs(figures["fd_lite0@32"]) < 1e-3
    assert figures["precision_lite0@32"] == figures["recall_lite0@32"] == 1
    assert figures["class_accuracy_ratio_lite0@32"] == 1


def test_likelihood_of_a_split_is_that_of_training(inside, capsys):
    settings = [*inside, TOKENIZER, GENERATOR, "evaluation=likelihood", "images.split=val", "batch_size=5"]
    command("evaluate", *settings, "run_name=likelihood")
    figures, codes = record_of("likelihood")["metrics"], CodeDataset("runs/extract_codes/codes/codes", "val")
    model, batch = load_export("runs/train_generator/ar/export", "generator").module, codes[range(len(codes))]
    with torch.no_grad():
        expected = model(batch.codes, batch.labels).bits()
    assert figures["bits_per_image"] == pytest.approx(expected["per_image"].mean().item(), rel=1e-5)
    assert {f"bits_{name}" for name in expected} | {"codes_per_image"} == set(figures)
    parts = [value for name, value in figures.items() if name.startswith(("bits_content", "bits_position"))]
    assert sum(parts) == pytest.approx(figures["bits_per_image"], rel=1e-6)
    assert record_of("likelihood")["reference"] is None


@pytest.mark.slow
def test_lpips_with_weights_of_one_s_own(inside, tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.vgg16(weights=None)
    weights = tmp_path / "vgg16.pth"
    torch.save({k: v for k, v in network.state_dict().items() if k.startswith("features.")}, weights)
    settings = [*inside, TOKENIZER, "evaluation=reconstruction", "evaluation.metrics=[lpips,lite0]"]
    command("evaluate", *settings, f"evaluation.lpips_weights={weights}", "run_name=lpips")
    record = record_of("lpips")
    assert record["metrics"]["lpips"] > 0
    assert record["metrics"]["lite0_distance"] > 0
    assert record["lite0_distance"].startswith("lite0:")
    assert record["lpips"].startswith("lpips-vgg:")
    assert record["features"] == {}


@pytest.mark.slow
def test_training_images_that_change_are_measured_anew(tmp_path, inside, monkeypatch):
    monkeypatch.setenv("GRAINCODE_CACHE", str(tmp_path / "cache"))
    root = write_images(tmp_path / "data" / "train", count=16).parent
    write_images(root / "test", count=8, seed=1)
    settings = ["data=image_folder", f"data.root={root}", "data.image_size=32", *LITE0, TOKENIZER, GENERATOR,
                "images.num_samples=8", "evaluation.metrics=[fd,class_consistency]"]  # fmt: skip
    floors = []
    for _ in range(2):
        command("evaluate", *settings)
        record = json.loads(Path("runs/evaluate/latest/metrics.json").read_text())
        floors.append((record["floor_hash"], record["metrics"]["fd_floor_lite0@32"]))
        for path in (root / "train").rglob("*.png"):
            Image.eval(Image.open(path), lambda value: 255 - value).save(path)
    assert floors[0][0] != floors[1][0]
    assert floors[0][1] != floors[1][1]


@pytest.mark.slow
def test_reconstructions_of_other_images_are_other_statistics(inside):
    runs = set()
    for size in ("test", "val"):
        command("evaluate", *inside, *LITE0, TOKENIZER, "evaluation=statistics", "images=reconstructions",
                f"images.split={size}")  # fmt: skip
        runs.add(Path("runs/evaluate/latest").resolve().name)
        (statistics,) = Path("runs/evaluate/latest").glob("statistics-*.npz")
        with np.load(statistics, allow_pickle=False) as arrays:
            assert len(str(arrays["originals_identity"])) == 64
    assert len(runs) == 2


def test_a_network_without_a_classifier_has_no_inception_score_and_all_else(folders, inside, tmp_path, capsys):
    a, b = folders
    torch.manual_seed(0)
    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    blind = [f"features.timm.weights={weights}", "features.timm.model=test_vit", "features.timm.resolution=64"]
    pair = ["images=folder", f"images.path={a}", "reference=folder", f"reference.path={b}"]
    create = timm.create_model

    with pytest.MonkeyPatch.context() as patch:
        headless = {"test_vit": {"num_classes": 0}}
        patch.setattr(timm, "create_model", lambda name, **more: create(name, **headless.get(name, {}), **more))
        command(
            "evaluate",
            *pair,
            "features=[lite0_112,timm]",
            LITE0[1],
            *blind,
            "evaluation.metrics=[fd,is]",
            "run_name=blind",
        )
        record = record_of("blind")
        assert record["metrics"].keys() == {"fd_lite0@32", "is_lite0@32", "fd_test_vit@64"}
        assert any("test_vit@64 has no classifier" in line for line in record["warnings"])
        line = refused("evaluate", *pair, "features=timm", *blind, "evaluation.metrics=[is]")
        assert "test_vit@64 has no classifier" in line


def test_the_inception_score_alone_needs_no_reference(folders, inside, capsys):
    a, b = folders
    command("evaluate", *LITE0, "images=folder", f"images.path={a}", "reference=folder", f"reference.path={b}",
            "evaluation.metrics=[is]", "run_name=alone", "cache_dir=nothing")  # fmt: skip
    assert record_of("alone")["metrics"].keys() == {"is_lite0@32"}
    assert not Path("nothing").exists()


def test_a_record_that_cannot_be_read_does_not_spoil_the_table(folders, inside, capsys):
    a, b = folders
    old = Path("runs/evaluate/old")
    old.mkdir()
    (old / "metrics.json").write_text('{"metrics": {"frechet_distance": 1.0}}')
    command("evaluate", *LITE0, "images=folder", f"images.path={a}", "reference=folder", f"reference.path={b}",
            "evaluation.metrics=[is]", "run_name=beside")  # fmt: skip
    assert "old/metrics.json is left out of the table" in capsys.readouterr().out
    assert "beside" in Path("runs/evaluate/table.csv").read_text()
    (old / "metrics.json").unlink()


@pytest.mark.slow
def test_a_member_that_is_refused_is_in_the_sweep_s_table(folders, inside, capsys):
    a, b = folders
    with pytest.raises(SystemExit):
        command("evaluate", "--multirun", *LITE0, "images=folder", f"images.path={a}", "reference=folder",
                f"reference.path={b}", "evaluation.metrics=[kid]", "evaluation.kid_subset_size=20,30,50",
                "hydra.sweep.dir=runs/sweeps/early")  # fmt: skip
    with Path("runs/sweeps/early/table.csv").open() as file:
        rows = [(row["evaluation.kid_subset_size"], row["status"]) for row in csv.DictReader(file)]
    assert rows == [("20", "0"), ("30", "0"), ("50", "2")]
