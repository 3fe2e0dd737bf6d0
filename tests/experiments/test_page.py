import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from markupsafe import escape
from page import _lengths, write_report
from strategies import LAYOUTS, random_codes, random_grains

from graincode.api import load_tokenizer
from graincode.core.errors import GraincodeError
from graincode.data.codes import FORMAT, CodeBatch, read_report, write_split
from graincode.data.images import TensorImages
from graincode.files import write_json

GOLDEN = Path(__file__).parents[1] / "golden"
HOSTILE = '<b>"busy"&amp'
METRICS = {"is_lite0@112": 2.5, "codes_per_image": 40.5}
DISTANCE = 12.345678
RECONSTRUCTION = {
    "mse": 0.01, "psnr_of_mean": 20.0, "psnr_mean": 21.0, "codebook_usage": 1.0, "codebook_perplexity": 9.0,
    "codebook_usage_1": 0.5,
}  # fmt: skip
CLASSES = {
    "class_accuracy_lite0@112": 0.4,
    "class_accuracy_of_real_images_lite0@112": 0.8,
    "class_accuracy_ratio_lite0@112": 0.5,
}
RECORD = {
    "features": {"lite0@112": "lite0@112:0123"}, "reference": "folder test", "reference_count": 12,
    "reference_hash": "abcdef" * 10, "settings": {"inception_splits": 2}, "tokenizer": "feedbeef", "count": 12,
    "uncertainty": {"is_lite0@112": {"std": 0.125, "is": "standard deviation over 2 splits"}},
    "warnings": ["only <12> images"], "versions": {"graincode": "0.1.0"},
}  # fmt: skip
JOBS = {
    "train_tokenizer": "train_tokenizer", "extract_codes": "extract_codes", "train_generator": "train_generator",
    "train_masked": "train_generator", "sample": "sample", "evaluate_reconstructions": "evaluate",
    "evaluate_samples": "evaluate",
}  # fmt: skip


class Page(HTMLParser):
    """The elements of a page, which must nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def count(self, tag: str, style: str | None = None) -> int:
        return sum(found == tag and style in (None, attributes.get("class")) for found, attributes in self.elements)


def write_codes(path, codes, labels, names):
    """Codes on disk, in one split of training images and the same again for validation."""
    path.mkdir(parents=True)
    batch = CodeBatch(codes, labels)
    for split in ("train", "val"):
        write_split(path, split, codes.layout, len(labels), [batch], "as many as there are labels")
    splits = {split: read_report(path, split)["summary"] for split in ("train", "val")}
    info = {"format": FORMAT, "layout": codes.layout.to_config(), "class_names": names, "splits": splits}
    info |= {"tokenizer": 4 * "0123", "tokenizer_path": "/tokenizer"}
    write_json(path / "codes.json", info)
    return splits["train"]


@pytest.fixture(scope="module")
def images():
    with np.load(GOLDEN / "expected.npz") as arrays:
        return arrays["images"]


@pytest.fixture
def folder(tmp_path, images):
    """What a demo of small models leaves, whose first class has a name that is markup."""
    folder = tmp_path / "demo <1>"
    for name, job in JOBS.items():
        write_json(folder / job / name / "result.json", {"classes": 3 if name == "sample" else 0})
    runs = runs_of(folder)
    for name, export in (
        ("train_tokenizer", "tokenizer"),
        ("train_generator", "autoregressive"),
        ("train_masked", "masked"),
    ):
        shutil.copytree(GOLDEN / export, runs[name] / "export")
        entries = [{"step": step, "train/loss": 3 / step, "train/bits_per_image": 9 / step} for step in range(1, 30)]
        entries.append({"step": 29, "val/psnr_of_mean": 20.0, "val/bits_per_image": 1.0, "val/objective": 2.0})
        (runs[name] / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    tokenizer, labels = load_tokenizer(GOLDEN / "tokenizer"), torch.tensor([0, 1, 1, 0])
    codes = tokenizer.tokenize(dataset(images)[range(4)].images)
    write_codes(runs["extract_codes"] / "codes", codes, labels, [HOSTILE, "smooth", "none"])
    samples = {"images": images, "labels": labels.numpy(), "grains": codes.grains.numpy()}
    samples["indices"] = codes.indices.numpy()
    np.savez(runs["sample"] / "samples.npz", **samples)
    sampling = {"generator": "cafe", "sampler": {"temperature": 0.75}, "seed": 7}
    for name, metrics, more in (
        ("reconstructions", {"rfd_lite0@112": DISTANCE} | METRICS | RECONSTRUCTION, {"ratios": None}),
        ("samples", {"fd_lite0@112": DISTANCE} | METRICS | CLASSES | {"fd_floor_lite0@112": 1.5}, sampling),
    ):
        write_json(runs[f"evaluate_{name}"] / "metrics.json", {**RECORD, **more, "metrics": metrics})
    write_json(folder / "seconds.json", {"train_tokenizer": 90})
    return folder


def dataset(images, names=(HOSTILE, "smooth", "none")):
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return TensorImages("made", "test", pixels, torch.tensor([0, 1, 1, 0]), names)


def runs_of(folder):
    return {name: folder / job / name for name, job in JOBS.items()}


def report(folder, images, names=(HOSTILE, "smooth", "none")):
    commands = {name: f"graincode-{job} data=<mine>" for name, job in JOBS.items()}
    return write_report(folder, runs_of(folder), commands, dataset(images, names)).read_text()


def test_the_page_needs_no_other_file(folder, images):
    text = report(folder, images)
    page = Page(text)
    assert "http" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert not page.count("script") + page.count("link") + page.count("iframe")
    for _, attributes in page.elements:
        assert attributes.get("href", "#").startswith("#")
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")


def test_the_page_shows_every_part(folder, images):
    text = report(folder, images)
    page = Page(text)
    cards = page.count("figure", "card")
    assert cards == len(images)
    assert f"{cards} of the first" in text
    # four pictures a card, two a sample, the legend (the scale and an outline for each of two grains), and of one
    # validation image of each of two classes itself, and for three edits what is kept and three samples
    assert page.count("img") == 4 * cards + 2 * len(images) + 3 + 2 * (1 + 3 * 4)
    assert text.count("(shortest)") == text.count("(longest)") == 1
    assert page.count("svg") == 5
    for part in (
        "12.35",
        "2.500 ± 0.12",
        "Fréchet distance (lite0@112)",
        "codebook in use, grain 1",
        "lite0@112:0123",
        "only &lt;12&gt;",
        "abcdefabcdefabcd",
        "feedbeef",
        "cafe",
        "temperature 0.75",
        "train_tokenizer, 1.5 minutes",
        "as another class",
        "graincode-sample data=&lt;mine&gt;",
    ):
        assert part in text
    assert report(folder, images) == text


def test_names_from_outside_are_escaped(folder, images):
    text = report(folder, images)
    assert str(escape(HOSTILE)) in text
    assert HOSTILE not in text
    assert "demo &lt;1&gt;" in text
    assert "demo <1>" not in text


def test_nothing_that_a_run_names_is_built(folder, images, monkeypatch):
    import hydra.utils

    text = report(folder, images)
    monkeypatch.setattr(hydra.utils, "instantiate", lambda *_, **__: pytest.fail("something was built"))
    for run in runs_of(folder).values():
        write_json(run / "config.json", {"config": {"data": {"_target_": "os.system", "command": "touch /tmp/owned"}}})
    assert report(folder, images) == text


def test_unlabelled_data_has_neither_classes_nor_their_accuracy(folder, images):
    write_json(folder / "sample/sample/result.json", {"classes": 0})
    file = folder / "evaluate/evaluate_samples/metrics.json"
    record = json.loads(file.read_text())
    record["metrics"] = {key: value for key, value in record["metrics"].items() if key not in CLASSES}
    write_json(file, record)
    text = report(folder, images, ())
    assert "Class accuracy" not in text
    assert "smooth<" not in text


@pytest.mark.when("a step of a demo left what its page cannot show", "one line says so, and the page of before stays")
@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"mse": "x"}},
        {"metrics": {"mse": float("nan")}},
        {"reference_count": None},
        {"features": [1]},
        {"versions": None},
        {"count": HOSTILE},
    ],
)
def test_records_of_other_kinds_are_refused(folder, images, change):
    (folder / "index.html").write_text("before")
    file = folder / "evaluate/evaluate_samples/metrics.json"
    write_json(file, json.loads(file.read_text()) | change)
    with pytest.raises(GraincodeError) as error:
        report(folder, images)
    assert error.value.line.isprintable()
    assert (folder / "index.html").read_text() == "before"


@pytest.mark.parametrize("name", JOBS)
def test_an_unfinished_step_is_named_and_the_page_stays(folder, images, name):
    (folder / "index.html").write_text("before")
    (runs_of(folder)[name] / "result.json").unlink()
    with pytest.raises(GraincodeError, match=f"{name} has not finished"):
        report(folder, images)
    assert (folder / "index.html").read_text() == "before"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_lengths_are_those_of_all_splits(tmp_path, layout):
    grains = random_grains(layout, 30)
    names = [str(label) for label in range(layout.classes)]
    split = write_codes(tmp_path / "codes", random_codes(layout, grains), torch.zeros(30, dtype=torch.long), names)
    found = _lengths(tmp_path / "codes")
    assert found["splits"] == "train, val"
    assert len(found["all"]) == 60
    assert found["all"].mean() == pytest.approx(split["mean_length"])
    assert "images, of 60" in found["histogram"]
