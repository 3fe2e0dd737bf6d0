"""`graincode-report` on made runs."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from graincode.jobs.report import main

HOSTILE = '"><script>alert(1)</script>\x1b[31m'


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(name, rate, losses, **metrics):
        folder = tmp_path / "runs" / "train" / name
        (folder / "pictures").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"config": {}, "identity": {"optimizer.lr": rate, "seed": 0}}))
        (folder / "result.json").write_text(json.dumps({"objective": 1.0, "metrics": metrics}))
        lines = ({"step": step, "train/loss": loss, "speed/images": 1} for step, loss in enumerate(losses))
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "pictures" / "grain_maps.png")
        return folder

    return run


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data.strip())


def page_of(capsys, *runs):
    main([*runs, "-o", "page.html"])
    assert capsys.readouterr().out == "page.html\n"
    return Page(open("page.html", encoding="utf-8").read())


def test_a_page_shows_settings_curves_metrics_and_pictures_and_needs_no_other_file(make, capsys):
    make("a", 0.1, [3, 2, 1], mse=0.25), make("b", 0.2, [3, 1, 1], mse=0.125)
    page = page_of(capsys, "a", "b")
    text = " ".join(page.text)
    assert all(
        words in text for words in ("2 runs of train", "optimizer.lr 0.1 0.2", "mse 0.2500 0.1250", "grain maps")
    )
    assert "seed" not in text
    assert {"train/loss", "speed/images"} <= {tag[1].get("aria-label") for tag in page.tags}
    assert sum(tag == "img" for tag, _ in page.tags) == 2
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(link.startswith(("data:image/png", "#")) for link in links)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}


@pytest.mark.when("a run that is compared is damaged, or its files hold markup", "the page shows it as text")
def test_what_runs_hold_is_text(make, capsys):
    make("a", HOSTILE, [3, 2], **{HOSTILE: 1.0})
    harmed = make("b", 0.1, [1, 2])
    (harmed / "config.json").write_text("{")
    (harmed / "log.jsonl").write_text('{"step": 1, "train/loss": "x"}\n{"step"')
    (harmed / "pictures" / "grain_maps.png").write_text("<svg>")
    page = page_of(capsys, "a", "b")
    assert "damaged" in page.text
    assert "script" not in {tag for tag, _ in page.tags}
    assert sum(tag == "img" for tag, _ in page.tags) == 1
    assert "\x1b" not in " ".join(page.text)
    assert not re.search("optimizer.lr", " ".join(page.text))


def test_numbers_and_names_that_no_plot_has(make, capsys):
    run = make("a", 0.1, [3, 2])
    (run / "failed.json").write_text(json.dumps({"error": HOSTILE}))
    (run / "result.json").unlink()
    lines = [{"step": step, "train/loss": value} for step, value in enumerate([1e308, -1e308, 10**400, 1.0, 2.0])]
    lines += [{"step": 5, "train/loss": float("nan")}, {"step": 6, "train/loss": float("inf")}, {"step": 10**300}]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    odd = make(os.fsdecode(b"\xff"), 0.1, [1, 2])
    main(["a", str(odd), "-o", "page.html"])
    text = Path("page.html").read_text(encoding="utf-8")
    assert all(line.isprintable() for line in text.split("\n"))
    assert "<script" not in text


def test_one_run_has_a_page_too_and_unknown_ones_end_in_one_line(make, capsys):
    make("a", 0.1, [3, 2])
    assert "a" in page_of(capsys, "a").text
    with pytest.raises(SystemExit) as stop:
        main(["nosuch"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: nosuch: no run in runs; type a run's path\n"
