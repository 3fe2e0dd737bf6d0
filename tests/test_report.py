import json
import re
import shutil
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import train_masked, write_images
from strategies import LAYOUTS, random_codes, random_grains

from graincode.core.errors import GraincodeError
from graincode.data.codes import FORMAT, CodeBatch, CodeDataset, write_split
from graincode.files import write_json
from graincode.jobs.demo import plan
from graincode.report import _lengths, write_report

HOSTILE = '<b>"busy"&amp'
FIGURES = {"is_lite0@112": 2.5, "codes_per_image": 40.5}
DISTANCE = 12.345678
RECONSTRUCTION = {
    "mse": 0.01,
    "psnr_of_mean": 20.0,
    "psnr_mean": 21.0,
    "codebook_usage": 1.0,
    "codebook_perplexity": 9.0,
}
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


@pytest.fixture
def folder(inside, tmp_path):
    """A demo of six training steps, whose first class has a name that is markup."""
    folder = tmp_path / "demo <1>"
    runs = {"train_tokenizer": "tok", "extract_codes": "codes", "train_generator": "ar", "sample": "samples"}
    for job, run in runs.items():
        shutil.copytree(Path("runs") / job / run, folder / job / job)
    shutil.copytree(train_masked("class"), folder / "train_generator/train_masked")
    images = write_images(tmp_path / "images")
    (images / "busy").rename(images / HOSTILE)
    name_classes(folder, [HOSTILE, "smooth"])
    data = {"_target_": "graincode.data.ImageFolder", "root": str(images), "image_size": 32, "test_fraction": 0.3}
    config = {"data": data, "images": {"split": "test", "ratios": None}}
    drawn = {"generator": "cafe", "sampler": {"temperature": 0.75}, "seed": 7}
    for name, figures, more in (
        ("reconstructions", {"rfd_lite0@112": DISTANCE} | FIGURES | RECONSTRUCTION, {"ratios": None}),
        ("samples", {"fd_lite0@112": DISTANCE} | FIGURES | CLASSES | {"fd_floor_lite0@112": 1.5}, drawn),
    ):
        run = folder / "evaluate" / f"evaluate_{name}"
        run.mkdir(parents=True)
        write_json(run / "config.json", {"config": config})
        write_json(run / "metrics.json", {**RECORD, **more, "metrics": figures})
        write_json(run / "result.json", {})
    write_json(folder / "seconds.json", {"train_tokenizer": 90})
    return folder


def name_classes(folder: Path, names: list[str]) -> None:
    file = folder / "extract_codes/extract_codes/codes/codes.json"
    write_json(file, json.loads(file.read_text()) | {"class_names": names})


def test_the_page_needs_no_other_file(folder):
    text = write_report(folder, plan(Path("demo"))).read_text()
    page = Page(text)
    assert "http" not in text
    assert "url(" not in text
    assert not page.count("script") + page.count("link") + page.count("iframe")
    for _, attributes in page.elements:
        assert "href" not in attributes
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")


def test_the_page_shows_every_part(folder):
    text = write_report(folder, plan(Path("demo"))).read_text()
    page = Page(text)
    cards = page.count("figure", "card")
    edited = len(CodeDataset(folder / "extract_codes/extract_codes/codes", "val"))
    assert f"{cards} of the first" in text
    # four pictures a card, two a sample, the legend (the scale and an outline for each of two grains), and of the one
    # validation image itself, and for three edits what is kept and three draws
    assert page.count("img") == 4 * cards + 2 * 6 + 3 + edited * (1 + 3 * 4)
    assert text.count("(shortest)") == text.count("(longest)") == 1
    assert page.count("svg") == 5
    for part in (
        "12.35",
        "2.500 ± 0.12",
        "Fréchet distance (lite0@112)",
        "lite0@112:0123",
        "only &lt;12&gt;",
        "abcdefabcdefabcd",
        "feedbeef",
        "cafe",
        "temperature 0.75",
    ):
        assert part in text
    assert "train_tokenizer, 1.5 minutes" in text
    assert write_report(folder, plan(Path("demo"))).read_text() == text


def test_names_from_outside_are_escaped(folder):
    text = write_report(folder, plan(Path("demo"))).read_text()
    assert escape(HOSTILE) in text
    assert HOSTILE not in text
    assert "demo &lt;1&gt;" in text
    assert "demo <1>" not in text


def test_unlabelled_data_has_neither_classes_nor_their_accuracy(folder):
    name_classes(folder, [])
    samples = folder / "sample/sample/samples.npz"
    with np.load(samples) as arrays:
        np.savez(samples, **{**arrays, "labels": np.zeros(6, dtype=np.int64)})
    for name in ("reconstructions", "samples"):
        run = folder / "evaluate" / f"evaluate_{name}"
        config, record = (json.loads((run / f"{file}.json").read_text()) for file in ("config", "metrics"))
        config["config"]["data"]["classes"] = "none"
        record["metrics"] = {key: value for key, value in record["metrics"].items() if key not in CLASSES}
        write_json(run / "config.json", config)
        write_json(run / "metrics.json", record)
    text = write_report(folder, plan(Path("demo"))).read_text()
    assert "Class accuracy" not in text
    assert "smooth<" not in text
    assert "as another class" in text


@pytest.mark.parametrize("step", plan(Path("demo")), ids=lambda step: step.name)
def test_an_unfinished_step_is_named_and_the_page_stays(folder, step):
    (folder / "index.html").write_text("before")
    (folder / step.job / step.name / "result.json").unlink()
    with pytest.raises(GraincodeError, match=rf"{step.name} has not finished .*type graincode-demo"):
        write_report(folder, plan(Path("demo")))
    assert (folder / "index.html").read_text() == "before"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_bars_of_the_histogram_add_up(tmp_path, layout):
    grains = random_grains(layout, 30)
    batch = CodeBatch(random_codes(layout, grains), torch.zeros(30, dtype=torch.long))
    report = write_split(tmp_path, "train", layout, 30, [batch])
    info = {"format": FORMAT, "layout": layout.to_config(), "class_names": [], "splits": {"train": report}}
    write_json(tmp_path / "codes.json", info)
    made = _lengths(tmp_path)
    assert sum(map(int, re.findall(r"codes: (\d+) images", made["histogram"]))) == 30
    assert f"{report['mean_length']:.2f} codes on average" in made["lengths_note"]
