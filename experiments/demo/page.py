"""The page of a finished demo: pictures, charts and metrics in one file that needs no other."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from graincode.api import load_generator, load_tokenizer
from graincode.core.errors import GraincodeError, brief
from graincode.core.images import from_uint8, to_uint8
from graincode.core.layout import CodeLayout
from graincode.core.prompts import CodeMask, CodePrefix
from graincode.data.codes import CodeDataset, read_info
from graincode.data.images import ImageDataset
from graincode.data.loader import in_order
from graincode.evaluation.pairs import MSE_FLOOR
from graincode.evaluation.record import read_record
from graincode.evaluation.samples import read_samples
from graincode.files import read_json
from graincode.generator import Generator
from graincode.pages import draw_curve, logarithmic, png_address, write_page
from graincode.pictures import BLUE, ORANGE, chart, density_maps, grain_maps, length_histogram, to_svg
from graincode.tokenizer import DQVAE
from graincode.training.trackers import read_log

# what records of other kinds than ours raise
_UNSHOWN = LookupError, TypeError, ValueError, ArithmeticError, AttributeError, jinja2.UndefinedError
SEARCHED, CARDS, CARD_SIDE = 1000, 12, 128
CLASSES, SAMPLES_OF_CLASS, SAMPLES_WITHOUT, SAMPLE_SIDE = 20, 10, 50, 96
EDITED, EDITS_OF_EACH = 10, 3

# the run, the title, the keys of training and of validation in its log, and whether the scale is logarithmic
CURVES = (
    ("train_tokenizer", "Tokenizer: loss", "train/loss", "", True),
    ("train_tokenizer", "Tokenizer: PSNR of the mean error, dB", "", "val/psnr_of_mean", False),
    ("train_generator", "Generator: bits per image", "train/bits_per_image", "val/bits_per_image", False),
    ("train_masked", "Masked generator: loss", "train/loss", "val/objective", False),
)


def write_report(folder: Path, runs: Mapping[str, Path], commands: Mapping[str, str], dataset: ImageDataset) -> Path:
    """Write `index.html` into the folder of a demo, and give its path.

    Args:
        folder: of the demo.
        runs: the directory of each finished step: train_tokenizer, extract_codes, train_generator, train_masked,
            sample, evaluate_reconstructions, evaluate_samples.
        commands: what to type to run each step alone.
        dataset: the images of evaluate_reconstructions. No class that a file of a run names is ever built, but for
            those that exports may name.
    Raises:
        GraincodeError: a step has not finished, or left what cannot be shown.
    """
    for name, run in runs.items():
        if not (run / "result.json").is_file():
            raise GraincodeError(f"{run / 'result.json'}: missing, {name} has not finished; run the same demo again")
    try:
        return _write(folder, runs, commands, dataset)
    except GraincodeError:
        raise
    except _UNSHOWN as error:
        found = f"{type(error).__name__}: {brief(error)}"
        advice = "remove the runs whose files were changed, such as evaluate/, and run the same demo again"
        raise GraincodeError(f"{folder} holds what the page cannot show ({found}): {advice}") from error


def _write(folder: Path, runs: Mapping[str, Path], commands: Mapping[str, str], dataset: ImageDataset) -> Path:
    records = {of: read_record(runs[f"evaluate_{of.lower()}"]) for of in ("Reconstructions", "Samples")}
    seconds, codes = read_json(folder / "seconds.json", {}, "remove it"), runs["extract_codes"] / "codes"
    tokenizer = load_tokenizer(runs["train_tokenizer"] / "export")
    masked = load_generator(runs["train_masked"] / "export")
    layout = tokenizer.layout
    sampled = read_json(runs["sample"] / "result.json", {"classes": int}, "remove it, and run the same demo again")
    # an unconditional generator is asked for no class, whatever labels the codes have
    names = read_info(codes)["class_names"] if sampled["classes"] else []
    return write_page(
        folder / "index.html",
        Path(__file__).with_suffix(".html"),
        dataset=dataset,
        layout=layout,
        records=records,
        metrics={title: _metrics(record) for title, record in records.items()},
        side=f"{min(max(CARD_SIDE, layout.image_size[1]), 2 * CARD_SIDE)}px",
        rendering="pixelated" if layout.image_size[1] <= SAMPLE_SIDE else "auto",
        cards=_cards(tokenizer, dataset, records["Reconstructions"].get("ratios")),
        lengths=_lengths(codes),
        samples=_samples(runs["sample"] / "samples.npz", layout, names),
        edits=_edits(masked, tokenizer, CodeDataset(codes, "val"), names),
        curves=[chart for run, *rest in CURVES if (chart := _curve(read_log(runs[run]), *rest))],
        commands=[(name, seconds.get(name), command) for name, command in commands.items()],
        folder=shlex.quote(str(folder)),
        export=repr(f"{runs['train_tokenizer']}/export"),
        coarse=[1.0] + [0.0] * (layout.num_grains - 1),
    )


def _cards(tokenizer: DQVAE, dataset: ImageDataset, ratios: Sequence[float] | None) -> dict[str, Any]:
    """Images beside their reconstructions, from few codes to many, and what explains them."""
    layout, names = tokenizer.layout, dataset.class_names
    batches = ((tokenizer.tokenize(b.images, ratios).lengths, b.labels) for b in in_order(dataset, 250, SEARCHED))
    lengths, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    order = lengths.argsort(stable=True)
    shortest, longest = int(order[0]), int(order[-1])
    ranks = order[torch.linspace(0, len(order) - 1, CARDS).long()].tolist()
    classes = [int((labels == label).nonzero()[0]) for label in labels.unique()[: CARDS - 2]] if names else []
    chosen = list(dict.fromkeys([shortest, longest, *classes, *ranks]))[:CARDS]
    chosen.sort(key=lambda index: (int(lengths[index]), index))
    images, tags = dataset[chosen].images, {longest: " (longest)", shortest: " (shortest)"}
    density, codes = tokenizer.route(images, ratios).shown, tokenizer.tokenize(images, ratios)
    columns = {
        "original": to_uint8(images),
        "density": density_maps(density, layout.image_size),
        "grain map": _outlined(images, codes.grains, layout, CARD_SIDE),
        "reconstruction": to_uint8(tokenizer.detokenize(codes)),
    }
    differences = (columns["original"].double() - columns["reconstruction"].double()) / 255
    errors = differences.square().flatten(1).mean(dim=1).clamp_min(MSE_FLOOR)
    cards = [
        {
            "codes": int(lengths[index]),
            "psnr": psnr,
            "name": names[int(labels[index])] if names else f"image {index}",
            "tag": tags.get(index, ""),
            "pictures": {column: _uri(maps[row]) for column, maps in columns.items()},
        }
        for row, (index, psnr) in enumerate(zip(chosen, (-10 * errors.log10()).tolist(), strict=True))
    ]
    scale = _uri(density_maps(torch.linspace(0, 1, 64)[None, None], (1, 64))[0])
    height, width = layout.grains[0]
    flat = torch.full((1, 3, 2 * height, 2 * width), -1.0)
    legend = [
        (_uri(_outlined(flat, torch.full((1, 2, 2), grain), layout, 32)[0]), count, size)
        for grain, (size, count) in enumerate(zip(layout.grains, layout.codes_per_region, strict=True))
    ]
    ends = float(density.min()), float(density.max())
    return {"all": cards, "of": len(lengths), "classes": len(classes), "legend": legend, "scale": scale, "ends": ends}


def _lengths(codes: Path) -> dict[str, Any]:
    """The histogram of codes per image over all splits on disk, and statistics."""
    info = read_info(codes)
    splits = [CodeDataset(codes, split) for split in info["splits"]]
    lengths = np.concatenate([split.lengths for split in splits])
    figure = length_histogram(torch.from_numpy(lengths), splits[0].layout)
    return {
        "splits": ", ".join(info["splits"]),
        "views": info["views"],
        "all": lengths,
        "quantiles": np.quantile(lengths, (0.05, 0.5, 0.95)).tolist(),
        "histogram": Markup(to_svg(figure, "images by number of codes")),
    }


def _samples(file: Path, layout: CodeLayout, names: Sequence[str]) -> list[tuple[str, list[tuple[str, str, int]]]]:
    """The first samples of each class: the class, and each one's picture, grain map and number of codes."""
    found = read_samples(file)
    images, grains, labels = (torch.from_numpy(found[name]) for name in ("images", "grains", "labels"))
    blocks = []
    for label in labels.unique()[:CLASSES].tolist():
        chosen = (labels == label).nonzero()[: SAMPLES_OF_CLASS if names else SAMPLES_WITHOUT, 0]
        pixels, regions = images[chosen].permute(0, 3, 1, 2), grains[chosen].long()
        outlined = _outlined(from_uint8(pixels), regions, layout, SAMPLE_SIDE)
        items = zip(map(_uri, pixels), map(_uri, outlined), layout.lengths(regions).tolist(), strict=True)
        blocks.append((names[label] if names else "", list(items)))
    return blocks


def _edits(generator: Generator, tokenizer: DQVAE, codes: CodeDataset, names: Sequence[str]) -> list[tuple[str, Any]]:
    """Validation images, what of their codes is kept, and samples of the rest: titles, each with named strips."""
    labels = codes[range(min(len(codes), SEARCHED))].labels
    chosen = [int((labels == label).nonzero()[0]) for label in labels.unique()] if names else range(len(labels))
    batch = codes[list(chosen)[:EDITED]]
    height, width = generator.layout.image_size
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    outer = ((2 * row + 1 - height).abs() > height / 2) | ((2 * column + 1 - width).abs() > width / 2)
    finer = CodeMask.of_prefix(CodePrefix.of_grains(batch.codes, 1))
    upper = CodeMask.of_pixels(batch.codes, row < height / 2)
    others = (batch.labels + 1) % generator.classes if generator.classes else batch.labels
    edits = (
        ("The middle is sampled anew", CodeMask.of_pixels(batch.codes, outer), batch.labels),
        (f"The lower half is sampled anew{' as another class' if generator.classes else ''}", upper, others),
        ("The codes of all finer grains are sampled anew", finer, batch.labels),
    )
    originals = to_uint8(tokenizer.detokenize(batch.codes))
    settings = {"steps": 16, "guidance_scale": 2.0 if generator.classes else 1.0}
    blocks = [("", [("from their codes", _strip(originals))])]
    for title, given, classes in edits:
        known = F.interpolate(given.known_cells[:, None].float(), (height, width)).bool()
        captions = [names[label] for label in classes] if names else ()
        strips = [("kept", _strip(torch.where(known, originals, 160), captions))]
        for seed in range(EDITS_OF_EACH):
            edited = tokenizer.detokenize(generator.sample(classes, seed=seed, given=given, **settings))
            strips.append((f"sample {seed + 1}", _strip(to_uint8(edited))))
        blocks.append((title, strips))
    return blocks


def _strip(images: Tensor, captions: Sequence[str] = ()) -> list[tuple[str, str]]:
    return [(_uri(image), captions[index] if captions else "") for index, image in enumerate(images)]


def _curve(
    entries: Sequence[dict[str, float]], title: str, training: str, validation: str, log: bool
) -> tuple[str, str] | None:
    """A chart of a log: training values as a line, validation values as points; nothing if the log has neither."""
    line, points = (
        np.array([(entry["step"], entry[key]) for entry in entries if key in entry], float).reshape(-1, 2)
        for key in (training, validation)
    )
    if not len(line) + len(points):
        return None
    figure, axes = chart()
    if len(line):
        draw_curve(axes, line, BLUE)
    axes.plot(*points.T, "o", color=ORANGE, markersize=5)
    axes.set(xlabel="step", xlim=(0, None))
    if log and (line[:, 1] > 0).all():
        logarithmic(axes)
    return title, Markup(to_svg(figure, title))


def _metrics(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of a record: their names without the network's and the grain, these two, values and uncertainties."""
    networks = "|".join(re.escape(f"_{network}") for network in record["features"])
    return [
        re.fullmatch(rf"(?P<name>.*?)(_(?P<grain>\d))?(?P<network>{networks})?", key).groupdict()
        | {"value": value, "spread": record["uncertainty"].get(key)}
        for key, value in record["metrics"].items()
    ]


def _outlined(images: Tensor, grains: Tensor, layout: CodeLayout, side: int) -> Tensor:
    """Grain maps to be shown `side` pixels wide: small ones at twice that size, so that lines survive scaling."""
    width = images.shape[-1]
    maps = grain_maps(images, grains, layout.grains, max(1, side // width))
    return maps.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1) if width <= side else maps


def _uri(image: Tensor) -> str:
    """A (3, H, W) uint8 image as an address that holds its pixels."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "png", optimize=True)
    return png_address(buffer.getvalue())
