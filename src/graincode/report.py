"""The page of a finished demo: pictures, curves and figures in one file that needs no other."""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image
from torch import Tensor

from graincode.api import load_generator, load_tokenizer
from graincode.config.job import build
from graincode.core.errors import GraincodeError
from graincode.core.images import from_uint8, to_uint8
from graincode.core.layout import CodeLayout
from graincode.core.prompts import CodeMask, CodePrefix
from graincode.data.codes import CodeDataset, read_info
from graincode.data.images import ImageDataset
from graincode.data.loader import in_order
from graincode.evaluation.pairs import PairErrors
from graincode.files import replacing
from graincode.generator import Generator
from graincode.pictures import density_maps, grain_maps
from graincode.tokenizer import DQVAE
from graincode.training.trackers import read_log

SEARCHED, CARDS, CARD_SIDE = 1000, 12, 128
CLASSES, SAMPLES_OF_CLASS, SAMPLES_WITHOUT, SAMPLE_SIDE = 20, 10, 50, 96
BARS = 64
EDITED, DRAWS = 10, 3

# names in metrics.json without the network's; the name on the page, and whether more or less is better
FIGURES = {
    "fid": ("FID", "↓"),
    "fd": ("Fréchet distance", "↓"),
    "rfid": ("rFID", "↓"),
    "rfd": ("Fréchet distance", "↓"),
    "fid_floor": ("FID of as many real images: the floor", ""),
    "fd_floor": ("Fréchet distance of as many real images: the floor", ""),
    "is": ("Inception score", "↑"),
    "kid": ("Kernel distance", "↓"),
    "rkid": ("Kernel distance", "↓"),
    "precision": ("Precision", "↑"),
    "recall": ("Recall", "↑"),
    "density": ("Density", "↑"),
    "coverage": ("Coverage", "↑"),
    "mse": ("MSE of pixels in [0, 1]", "↓"),
    "psnr_of_mean": ("PSNR of the mean error, dB", "↑"),
    "psnr_mean": ("Mean PSNR, dB", "↑"),
    "ssim": ("SSIM", "↑"),
    "lpips": ("LPIPS", "↓"),
    "lite0_distance": ("Perceptual distance (lite0)", "↓"),
    "codebook_usage": ("Share of the codebook in use", "↑"),
    "codebook_perplexity": ("Codebook perplexity", "↑"),
    "class_accuracy": ("Class accuracy of samples", "↑"),
    "class_accuracy_of_real_images": ("Class accuracy of real images", ""),
    "class_accuracy_ratio": ("Ratio of the two", "↑"),
    "codes_per_image": ("Codes per image", ""),
    "grain_map_bits": ("Bits of a grain map", ""),
    "bits_per_image": ("Bits per image, grain map included", ""),
    **{f"bits_{what}_{g}": (f"Bits of {what}s, grain {g}", "↓") for g in range(8) for what in ("content", "position")},
    **{
        f"codebook_{what}_{g}": (f"{title}, grain {g}", "↑")
        for g in range(8)
        for what, title in (("usage", "Share of the codebook in use"), ("perplexity", "Codebook perplexity"))
    },
}


@dataclass(frozen=True)
class Curve:
    """A chart of a run's log: training values as a line, and validation values as points."""

    run: str
    title: str
    training: str = ""
    validation: str = ""
    log: bool = False


CURVES = (
    Curve("train_tokenizer", "Tokenizer: loss", training="train/loss", log=True),
    Curve("train_tokenizer", "Tokenizer: PSNR of the mean error, dB", validation="val/psnr_of_mean"),
    Curve("train_generator", "Generator: bits per image", "train/bits_per_image", "val/bits_per_image"),
    Curve("train_masked", "Masked generator: loss", "train/loss", "val/loss"),
)


@dataclass(frozen=True)
class Axes:
    """A chart as SVG, in a view box of 480 by 250, for data in the ranges `x` and `y`."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a data point lies in the view box."""
        scale = math.log if self.log else float
        low, high = scale(self.y[0]), scale(self.y[1])
        return 48 + 424 * (x - self.x[0]) / (self.x[1] - self.x[0]), 215 - 180 * (scale(y) - low) / (high - low)

    def line(self, points: Iterable[tuple[float, float]], style: str) -> str:
        """A line through data points."""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
        return f'<polyline class="{style}" points="{places}"/>'

    def svg(self, title: str, across: str, marks: str) -> str:
        """The chart with these marks; `across` is what the x axis counts."""
        parts, locator = [], MaxNLocator(5)
        if self.log and self.y[1] > 10 * self.y[0]:
            locator = LogLocator(subs=(1, 2, 5) if self.y[1] < 100 * self.y[0] else (1,))
        for value in locator.tick_values(*self.y):
            if self.y[0] <= value <= self.y[1]:
                _, y = self.at(self.x[0], value)
                parts.append(f'<line class="grid" x1="48" x2="472" y1="{y:.1f}" y2="{y:.1f}"/>')
                parts.append(f'<text x="42" y="{y + 4:.1f}" text-anchor="end">{value:,g}</text>')
        for value in MaxNLocator(6, integer=True).tick_values(*self.x):
            if self.x[0] <= value <= self.x[1]:
                x, _ = self.at(value, self.y[0])
                parts.append(f'<text x="{x:.1f}" y="231" text-anchor="middle">{value:,g}</text>')
        parts.append(f'<text x="472" y="248" text-anchor="end">{across}</text>')
        return f'<svg viewBox="0 0 480 250" role="img" aria-label="{title}">{"".join(parts)}{marks}</svg>'


def write_report(folder: Path, steps: Sequence[Any]) -> Path:
    """Write `index.html` into the folder of a demo.

    Args:
        folder: in which every step has finished.
        steps: of the demo, as `demo.plan` gives them.
    Returns:
        the page.
    Raises:
        GraincodeError: a step has not finished.
    """
    runs = {step.name: folder / step.job / step.name for step in steps}
    for name, run in runs.items():
        if not (run / "result.json").is_file():
            raise GraincodeError(
                f"{name} has not finished ({run / 'result.json'} is missing): "
                "type graincode-demo with the same overrides as before; it goes on where it was"
            )
    config = _read(runs["evaluate_reconstructions"] / "config.json")["config"]
    reconstructions, samples = (
        _read(runs[f"evaluate_{name}"] / "metrics.json") for name in ("reconstructions", "samples")
    )
    seconds, codes = _read(folder / "seconds.json"), runs["extract_codes"] / "codes"
    tokenizer = load_tokenizer(runs["train_tokenizer"] / "export")
    dataset = build(config["data"]).split(config["images"]["split"])
    # an unconditional generator is asked for no class, whatever labels the codes have
    names = read_info(codes)["class_names"] if _read(runs["sample"] / "result.json")["classes"] else []
    commands = []
    for step in steps:
        minutes = f", {seconds[step.name] / 60:.1f} minutes" if step.name in seconds else ""
        commands.append(f"<i># {step.name}{minutes}</i>\n{escape(step.command)}")
    width = tokenizer.layout.image_size[1]
    text = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{dataset.name} in {reconstructions['figures']['codes_per_image']:.1f} codes per image"),
        headlines=_headlines(tokenizer.layout, reconstructions, samples),
        side=f"{min(max(CARD_SIDE, width), 2 * CARD_SIDE)}px",
        rendering="pixelated" if width <= SAMPLE_SIDE else "auto",
        **_cards(tokenizer, dataset, config["images"]["ratios"]),
        **_lengths(codes),
        samples=_samples(runs["sample"] / "samples.npz", tokenizer.layout, names),
        edits=_edits(load_generator(runs["train_masked"] / "export"), tokenizer, CodeDataset(codes, "val"), names),
        curves="".join(_curve(curve, read_log(runs[curve.run])) for curve in CURVES),
        figures=_figures("Reconstructions", reconstructions) + _figures("Samples", samples),
        commands="\n\n".join(commands),
        folder=escape(shlex.quote(str(folder))),
        export=escape(repr(f"{runs['train_tokenizer']}/export")),
        coarse=[1.0] + [0.0] * (tokenizer.layout.num_grains - 1),
        versions=escape(", ".join(f"{name} {number}" for name, number in samples["versions"].items())),
    )
    page = folder / "index.html"
    with replacing(page) as partial:
        partial.write_text(text, encoding="utf-8")
    return page


def _headlines(layout: CodeLayout, reconstructions: dict[str, Any], samples: dict[str, Any]) -> str:
    """The few figures that matter most, each with what it is to be compared with."""
    made, drawn = reconstructions["metrics"], _by_base(samples)
    longest, count = layout.num_regions * layout.codes_per_region[-1], reconstructions["count"]
    tiles = [
        ("Codes per image", _number(made["codes_per_image"]), f"on average; {longest} with all regions fine"),
        ("PSNR of reconstructions", f"{made['psnr_of_mean']:.2f} dB", f"mean error of {count:,} images"),
    ]
    network = next(iter(samples["features"]))
    for base, title in (("fid", "FID of samples"), ("fd", "Fréchet distance of samples")):
        if base in drawn:
            floor = f"; {_number(drawn[f'{base}_floor'])} of as many real images" if f"{base}_floor" in drawn else ""
            tiles.append((title, _number(drawn[base]), f"in {network} features{floor}"))
    if "class_accuracy_ratio" in drawn:
        accuracy, real = drawn["class_accuracy"], drawn["class_accuracy_of_real_images"]
        about = f"of that of real images ({accuracy:.1%} against {real:.1%})"
        tiles.append(("Class accuracy of samples", f"{drawn['class_accuracy_ratio']:.1%}", about))
    return "".join(f"<div><dt>{n}</dt><dd>{v} <small>{escape(about)}</small></dd></div>" for n, v, about in tiles)


def _cards(tokenizer: DQVAE, dataset: ImageDataset, ratios: Sequence[float] | None) -> dict[str, str]:
    """Images beside what the tokenizer makes of them, from few codes to many."""
    layout, names = tokenizer.layout, dataset.class_names
    lengths, labels = [], []
    for batch in in_order(dataset, 250, SEARCHED):
        lengths.append(tokenizer.tokenize(batch.images, ratios).lengths)
        labels.append(batch.labels)
    lengths, labels = torch.cat(lengths), torch.cat(labels)
    order = lengths.argsort(stable=True)
    shortest, longest = int(order[0]), int(order[-1])
    ranks = order[torch.linspace(0, len(order) - 1, CARDS).long()].tolist()
    classes = [int((labels == label).nonzero()[0]) for label in labels.unique()[: CARDS - 2]] if names else []
    chosen = list(dict.fromkeys([shortest, longest, *classes, *ranks]))[:CARDS]
    chosen.sort(key=lambda index: (int(lengths[index]), index))
    images, tags = dataset[chosen].images, {longest: " (longest)", shortest: " (shortest)"}
    density, codes = tokenizer.route(images, ratios).shown, tokenizer.tokenize(images, ratios)
    originals, made = to_uint8(images), to_uint8(tokenizer.detokenize(codes))
    columns = {
        "original": originals,
        "density": density_maps(density, layout.image_size),
        "grain map": _outlined(images, codes.grains, layout, CARD_SIDE),
        "reconstruction": made,
    }
    cards = []
    for place, index in enumerate(chosen):
        errors = PairErrors()
        errors.update(made[place : place + 1], originals[place : place + 1])
        psnr = errors.metrics()["psnr_mean"].value
        name = names[int(labels[index])] if names else f"image {index}"
        pictures = "".join(
            f"<li>{_img(maps[place], f'{column}: {name}', 'smooth' if column == 'grain map' else '')}{column}</li>"
            for column, maps in columns.items()
        )
        cards.append(
            f'<figure class="card"><figcaption><span><strong>{int(lengths[index])} codes</strong>, '
            f"{psnr:.1f} dB</span><span>{escape(name)}{tags.get(index, '')}</span></figcaption>"
            f"<ul>{pictures}</ul></figure>"
        )
    note = (
        f"{len(chosen)} of the first {len(lengths):,} {escape(dataset.split)} images: the shortest, the longest, "
        f"{f'the first of {len(classes)} classes, ' if classes else ''}and some between."
    )
    return {"cards": "".join(cards), "cards_note": note, "legend": _legend(layout, density)}


def _legend(layout: CodeLayout, density: Tensor) -> str:
    scale = _img(density_maps(torch.linspace(0, 1, 64)[None, None], (1, 64))[0], "dark blue to yellow", "scale")
    items = [f"density, by rank, {density.min():.2g} {scale} {density.max():.2g}"]
    height, width = layout.grains[0]
    for grain, ((high, wide), count) in enumerate(zip(layout.grains, layout.codes_per_region, strict=True)):
        flat, grains = torch.full((1, 3, 2 * height, 2 * width), -1.0), torch.full((1, 2, 2), grain)
        swatch = _img(_outlined(flat, grains, layout, 32)[0], f"outlines of grain {grain}", "smooth")
        codes = "1 code" if count == 1 else f"{count} codes"
        items.append(f"{swatch} {codes} a region, one for {high}&times;{wide} pixels")
    return "".join(f"<li>{item}</li>" for item in items)


def _lengths(codes: Path) -> dict[str, str]:
    """The histogram of codes per image over all splits on disk, and a line of statistics."""
    info = read_info(codes)
    layout = CodeLayout.from_config(info["layout"])
    splits = [CodeDataset(codes, split) for split in info["splits"]]
    lengths = torch.cat([batch.codes.lengths for split in splits for batch in in_order(split, 5000)]).numpy()
    costs = layout.codes_per_region
    fixed = [layout.num_regions * cost for cost in costs]
    step = math.gcd(*(cost - costs[0] for cost in costs)) or 1  # between two lengths that an image can have
    width = step * math.ceil(((fixed[-1] - fixed[0]) // step + 1) / BARS)
    counts = np.bincount((lengths - fixed[0]) // width)
    room = max(width, (fixed[-1] - fixed[0]) // 12)
    axes, marks = Axes((fixed[0] - room, fixed[-1] + room), (0, 1.15 * counts.max())), ""
    for start, count in zip(range(fixed[0], fixed[-1] + 1, width), counts, strict=False):
        middle = start + (width - step) / 2
        (left, top), (right, bottom) = axes.at(middle - 0.42 * width, count), axes.at(middle + 0.42 * width, 0)
        box = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"'
        about = f"{start}{f' to {start + width - step}' if width > step else ''} codes: {count:,} images"
        marks += f'<rect class="bar" {box}><title>{about}</title></rect>'
    lines = [(at, f"all {high}&times;{wide}: {at}") for at, (high, wide) in zip(fixed, layout.grains, strict=True)]
    for number, (place, name) in enumerate([*lines, (lengths.mean(), f"mean: {lengths.mean():.1f}")]):
        x, _ = axes.at(place, 0)
        level = 12 + 14 * (number % 3)  # names of lines that are close must not meet
        marks += f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{level + 6}" y2="215"/>'
        marks += f'<text class="strong" x="{x:.1f}" y="{level}" text-anchor="middle">{name}</text>'
    low, middle, high = np.quantile(lengths, (0.05, 0.5, 0.95))
    views = f"; {info['views']} views of each training image" if info["views"] > 1 else ""
    note = (
        f"{len(lengths):,} images ({escape(', '.join(info['splits']))}{views}) with {lengths.mean():.2f} codes on "
        f"average, standard deviation {lengths.std():.1f}, median {middle:.0f}. Nine in ten have between {low:.0f} and "
        f"{high:.0f}, all of them between {lengths.min()} and {lengths.max()}."
    )
    return {"histogram": axes.svg("images by number of codes", "codes per image", marks), "lengths_note": note}


def _samples(file: Path, layout: CodeLayout, names: Sequence[str]) -> str:
    """The first samples of each class, each with its grain map and its number of codes."""
    with np.load(file, allow_pickle=False) as arrays:
        images, grains, labels = (torch.from_numpy(arrays[name]) for name in ("images", "grains", "labels"))
    blocks = []
    for label in labels.unique()[:CLASSES].tolist():
        chosen = (labels == label).nonzero()[: SAMPLES_OF_CLASS if names else SAMPLES_WITHOUT, 0]
        pixels, regions = images[chosen].permute(0, 3, 1, 2), grains[chosen].long()
        outlined = _outlined(from_uint8(pixels), regions, layout, SAMPLE_SIDE)
        name, items = f"sample of {names[label]}" if names else "sample", ""
        for image, outlines, length in zip(pixels, outlined, layout.lengths(regions).tolist(), strict=True):
            pictures = _img(image, name, "pixels") + _img(outlines, f"grain map: {name}", "smooth")
            items += f'<li title="{length} codes">{pictures}{length}</li>'
        heading = f"<h3>{escape(names[label])}</h3>" if names else ""
        blocks.append(f"<section>{heading}<ul>{items}</ul></section>")
    return "".join(blocks)


def _edits(generator: Generator, tokenizer: DQVAE, codes: CodeDataset, names: Sequence[str]) -> str:
    """Validation images, what of their codes is kept, and what is drawn in place of the rest."""
    labels = codes[range(min(len(codes), SEARCHED))].labels
    chosen = [int((labels == label).nonzero()[0]) for label in labels.unique()] if names else range(len(labels))
    batch = codes[list(chosen)[:EDITED]]
    height, width = generator.layout.image_size
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    outer = ((2 * row + 1 - height).abs() > height / 2) | ((2 * column + 1 - width).abs() > width / 2)
    top = row < height / 2
    others = (batch.labels + 1) % generator.classes if generator.classes else batch.labels
    edits = (
        ("The middle is drawn anew", CodeMask.of_pixels(batch.codes, outer), batch.labels),
        (
            f"The upper half is kept, the rest drawn{' as another class' if generator.classes else ''}",
            CodeMask.of_pixels(batch.codes, top),
            others,
        ),
        (
            "The codes of all finer grains are drawn anew",
            CodeMask.of_prefix(CodePrefix.of_grains(batch.codes, 1)),
            batch.labels,
        ),
    )
    originals, blocks = to_uint8(tokenizer.detokenize(batch.codes)), ""
    guidance = 2.0 if generator.classes else 1.0
    for number, (title, given, drawn_as) in enumerate(edits):
        if not number:
            blocks += _strip("from their codes", originals)
        cells = given.known_cells[:, None].float()
        known = F.interpolate(cells, (height, width)).bool()
        blocks += f"<p><strong>{title}</strong></p>" + _strip(
            "kept", torch.where(known, originals, 160), [names[label] for label in drawn_as] if names else ()
        )
        for draw in range(DRAWS):
            made = generator.sample(drawn_as, seed=draw, steps=16, guidance_scale=guidance, given=given)
            blocks += _strip(f"draw {draw + 1}", to_uint8(tokenizer.detokenize(made)))
    return blocks


def _strip(name: str, images: Tensor, captions: Sequence[str] = ()) -> str:
    """A line of images of equal size, with a name before it, and perhaps one below each."""
    items = ""
    for number, image in enumerate(images):
        items += f"<li>{_img(image, name)}{escape(captions[number]) if captions else ''}</li>"
    return f"<section><h3>{escape(name)}</h3><ul>{items}</ul></section>"


def _curve(curve: Curve, entries: Sequence[dict[str, float]]) -> str:
    """A chart of a log; nothing if the log has none of its keys."""
    line = [(entry["step"], entry[curve.training]) for entry in entries if curve.training in entry]
    points = [(entry["step"], entry[curve.validation]) for entry in entries if curve.validation in entry]
    if not line + points:
        return ""
    steps, values = zip(*line, *points, strict=True)
    low, high = min(values), max(values)
    margin, log = 0.05 * (high - low) or 0.05 * abs(high) or 1, curve.log and low > 0
    axes, marks = Axes((0, max(steps)), (0.9 * low if log else low - margin, high + margin), log), ""
    if line:
        raw, window = np.array(line)[:, 1], np.ones(max(1, len(line) // 20))
        smooth = np.convolve(raw, window, "same") / np.convolve(np.ones_like(raw), window, "same")
        marks += axes.line(line, "faint") + axes.line(zip(steps, smooth, strict=False), "line")
    for step, value in points:
        x, y = axes.at(step, value)
        about = f"<title>step {step}: {_number(value)}</title>"
        marks += f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{about}</circle>'
    return f'<figure class="box"><h3>{curve.title}</h3>{axes.svg(curve.title, "step", marks)}</figure>'


def _figures(title: str, record: dict[str, Any]) -> str:
    """A table of measured figures over one of what they depend on."""
    rows = ""
    for key, value in record["metrics"].items():
        base, network = _parted(key, record)
        name, better = FIGURES.get(base, (base, ""))
        spread = record["uncertainty"].get(key)
        about = f' title="{escape(spread["is"])}"' if spread else ""
        plus = f" ± {spread['std']:.2g}" if spread else ""
        name = escape(f"{name} ({network})" if network else name)
        rows += f'<tr><th scope="row">{name}&nbsp;{better}</th>'
        rows += f'<td class="value"{about}>{_number(value)}{plus}</td></tr>'
    settings = record["settings"]
    facts = {
        "images": f"{record['count']:,}",
        "reference": f"{record['reference']}, {record['reference_count']:,} images",
        "its SHA-256": record["reference_hash"][:16],
        "features": ", ".join(record["features"].values()),
        "IS splits": settings.get("inception_splits"),
        "tokenizer": record["tokenizer"],
        "ratios": record.get("ratios"),
        "generator": record.get("generator"),
        "sampler": ", ".join(f"{key} {value}" for key, value in record.get("sampler", {}).items()),
        "seed": record.get("seed"),
        "note": "; ".join(record["warnings"]),
    }
    known = "".join(
        f'<tr><th scope="row">{name}</th><td>{escape(str(fact))}</td></tr>'
        for name, fact in facts.items()
        if fact not in (None, "")
    )
    return f'<div class="box"><h3>{title}</h3><table>{rows}</table><table class="facts">{known}</table></div>'


def _parted(figure: str, record: dict[str, Any]) -> tuple[str, str]:
    """A figure's name without its network's, and that network's; empty if it needs none."""
    for network in record["features"]:
        if figure.endswith(f"_{network}"):
            return figure.removesuffix(f"_{network}"), network
    return figure, ""


def _by_base(record: dict[str, Any]) -> dict[str, float]:
    """Figures by their names without networks' names; of several networks the first counts."""
    found: dict[str, float] = {}
    for figure, value in record["metrics"].items():
        found.setdefault(_parted(figure, record)[0], value)
    return found


def _outlined(images: Tensor, grains: Tensor, layout: CodeLayout, side: int) -> Tensor:
    """Grain maps to be shown `side` pixels wide: small ones at twice that size, so that lines survive scaling."""
    width = images.shape[-1]
    maps = grain_maps(images, grains, layout.grains, max(1, side // width))
    return maps.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1) if width <= side else maps


def _img(image: Tensor, alt: str, style: str = "") -> str:
    """A (3, H, W) uint8 image as an element that holds its pixels."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "png", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="{style}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _number(value: float) -> str:
    """Four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def _read(file: Path) -> Any:
    return json.loads(file.read_text())
