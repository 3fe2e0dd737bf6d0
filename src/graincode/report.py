"""The page of a finished demo: pictures, charts and metrics in one file that needs no other."""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator
from PIL import Image
from torch import Tensor

from graincode.api import load_generator, load_tokenizer
from graincode.core.errors import GraincodeError
from graincode.core.images import from_uint8, to_uint8
from graincode.core.layout import CodeLayout
from graincode.core.prompts import CodeMask, CodePrefix
from graincode.data.codes import CodeDataset, read_info
from graincode.data.images import ImageDataset
from graincode.data.loader import in_order
from graincode.evaluation.pairs import MSE_FLOOR
from graincode.files import replacing
from graincode.generator import Generator
from graincode.pictures import BLUE, ORANGE, chart, density_maps, grain_maps, length_histogram, to_svg
from graincode.tokenizer import DQVAE
from graincode.training.trackers import read_log

SEARCHED, CARDS, CARD_SIDE = 1000, 12, 128
CLASSES, SAMPLES_OF_CLASS, SAMPLES_WITHOUT, SAMPLE_SIDE = 20, 10, 50, 96
EDITED, EDITS_OF_EACH = 10, 3

# names in metrics.json without the network's: the name on the page, and whether more or less is better
METRICS = {
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
}
for _grain in range(8):
    METRICS |= {
        f"{name}_{_grain}": (f"{title}, grain {_grain}", better)
        for name, (title, better) in {
            "codebook_usage": METRICS["codebook_usage"],
            "codebook_perplexity": METRICS["codebook_perplexity"],
            "bits_content": ("Bits of contents", "↓"),
            "bits_position": ("Bits of positions", "↓"),
        }.items()
    }

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
        GraincodeError: a step has not finished.
    """
    for name, run in runs.items():
        if not (run / "result.json").is_file():
            raise GraincodeError(f"{run / 'result.json'}: missing, {name} has not finished; run the same demo again")
    reconstructions, samples = (_read(runs[f"evaluate_{of}"] / "metrics.json") for of in ("reconstructions", "samples"))
    seconds, codes = _read(folder / "seconds.json"), runs["extract_codes"] / "codes"
    tokenizer = load_tokenizer(runs["train_tokenizer"] / "export")
    layout = tokenizer.layout
    # an unconditional generator is asked for no class, whatever labels the codes have
    names = read_info(codes)["class_names"] if _read(runs["sample"] / "result.json")["classes"] else []
    minutes = {name: f", {seconds[name] / 60:.1f} minutes" if name in seconds else "" for name in commands}
    width = layout.image_size[1]
    text = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{dataset.name} in {reconstructions['metrics']['codes_per_image']:.1f} codes per image"),
        headlines=_headlines(layout, reconstructions, samples),
        side=f"{min(max(CARD_SIDE, width), 2 * CARD_SIDE)}px",
        rendering="pixelated" if width <= SAMPLE_SIDE else "auto",
        **_cards(tokenizer, dataset, reconstructions.get("ratios")),
        **_lengths(codes),
        samples=_samples(runs["sample"] / "samples.npz", layout, names),
        edits=_edits(load_generator(runs["train_masked"] / "export"), tokenizer, CodeDataset(codes, "val"), names),
        curves="".join(_curve(read_log(runs[run]), *rest) for run, *rest in CURVES),
        metrics=_metrics("Reconstructions", reconstructions) + _metrics("Samples", samples),
        commands="\n\n".join(f"<i># {name}{minutes[name]}</i>\n{escape(commands[name])}" for name in commands),
        folder=escape(shlex.quote(str(folder))),
        export=escape(repr(f"{runs['train_tokenizer']}/export")),
        coarse=[1.0] + [0.0] * (layout.num_grains - 1),
        versions=escape(", ".join(f"{name} {number}" for name, number in samples["versions"].items())),
    )
    page = folder / "index.html"
    with replacing(page) as partial:
        partial.write_text(text, encoding="utf-8")
    return page


def _headlines(layout: CodeLayout, reconstructions: dict[str, Any], samples: dict[str, Any]) -> str:
    """The few metrics that matter most, each with what it is to be compared with."""
    of_reconstructions, of_samples = reconstructions["metrics"], {}
    for key, value in samples["metrics"].items():  # of several networks the first counts
        of_samples.setdefault(_parted(key, samples)[0], value)
    longest, count = layout.num_regions * layout.codes_per_region[-1], reconstructions["count"]
    mean, psnr = _number(of_reconstructions["codes_per_image"]), f"{of_reconstructions['psnr_of_mean']:.2f} dB"
    tiles = [
        ("Codes per image", mean, f"on average; {longest} with all regions fine"),
        ("PSNR of reconstructions", psnr, f"mean error of {count:,} images"),
    ]
    network = next(iter(samples["features"]))
    for base, title in (("fid", "FID of samples"), ("fd", "Fréchet distance of samples")):
        if base in of_samples:
            floor = of_samples.get(f"{base}_floor")
            about = f"in {network} features" + (f"; {_number(floor)} of as many real images" if floor else "")
            tiles.append((title, _number(of_samples[base]), about))
    if "class_accuracy_ratio" in of_samples:
        accuracy, real = of_samples["class_accuracy"], of_samples["class_accuracy_of_real_images"]
        about = f"of that of real images ({accuracy:.1%} against {real:.1%})"
        tiles.append(("Class accuracy of samples", f"{of_samples['class_accuracy_ratio']:.1%}", about))
    return "".join(f"<div><dt>{n}</dt><dd>{v} <small>{escape(about)}</small></dd></div>" for n, v, about in tiles)


def _cards(tokenizer: DQVAE, dataset: ImageDataset, ratios: Sequence[float] | None) -> dict[str, str]:
    """Images beside their reconstructions, from few codes to many."""
    layout, names = tokenizer.layout, dataset.class_names
    found = [
        (tokenizer.tokenize(batch.images, ratios).lengths, batch.labels) for batch in in_order(dataset, 250, SEARCHED)
    ]
    lengths, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
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
    cards = ""
    for row, (index, psnr) in enumerate(zip(chosen, (-10 * errors.log10()).tolist(), strict=True)):
        name = names[int(labels[index])] if names else f"image {index}"
        pictures = "".join(
            f"<li>{_img(maps[row], f'{column}: {name}', 'smooth' if column == 'grain map' else '')}{column}</li>"
            for column, maps in columns.items()
        )
        cards += (
            f'<figure class="card"><figcaption><span><strong>{int(lengths[index])} codes</strong>, '
            f"{psnr:.1f} dB</span><span>{escape(name)}{tags.get(index, '')}</span></figcaption>"
            f"<ul>{pictures}</ul></figure>"
        )
    note = (
        f"{len(chosen)} of the first {len(lengths):,} {escape(dataset.split)} images: the shortest, the longest, "
        f"{f'the first of {len(classes)} classes, ' if classes else ''}and some between."
    )
    return {"cards": cards, "cards_note": note, "legend": _legend(layout, density)}


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
    splits = [CodeDataset(codes, split) for split in info["splits"]]
    lengths = np.concatenate([split.lengths for split in splits])
    low, middle, high = np.quantile(lengths, (0.05, 0.5, 0.95))
    views = f"; {info['views']} views of each training image" if info["views"] > 1 else ""
    note = (
        f"{len(lengths):,} images ({escape(', '.join(info['splits']))}{views}) with {lengths.mean():.2f} "
        f"codes on average, standard deviation {lengths.std():.1f}, median {middle:.0f}. Nine in ten have "
        f"between {low:.0f} and {high:.0f}, all of them between {lengths.min()} and {lengths.max()}."
    )
    histogram = length_histogram(torch.from_numpy(lengths), splits[0].layout)
    return {"histogram": to_svg(histogram, "images by number of codes"), "lengths_note": note}


def _samples(file: Path, layout: CodeLayout, names: Sequence[str]) -> str:
    """The first samples of each class, each with its grain map and its number of codes."""
    with np.load(file, allow_pickle=False) as arrays:
        images, grains, labels = (torch.from_numpy(arrays[name]) for name in ("images", "grains", "labels"))
    blocks = ""
    for label in labels.unique()[:CLASSES].tolist():
        chosen = (labels == label).nonzero()[: SAMPLES_OF_CLASS if names else SAMPLES_WITHOUT, 0]
        pixels, regions = images[chosen].permute(0, 3, 1, 2), grains[chosen].long()
        outlined = _outlined(from_uint8(pixels), regions, layout, SAMPLE_SIDE)
        name, items = f"sample of {names[label]}" if names else "sample", ""
        for image, outlines, length in zip(pixels, outlined, layout.lengths(regions).tolist(), strict=True):
            pictures = _img(image, name, "pixels") + _img(outlines, f"grain map: {name}", "smooth")
            items += f'<li title="{length} codes">{pictures}{length}</li>'
        heading = f"<h3>{escape(names[label])}</h3>" if names else ""
        blocks += f"<section>{heading}<ul>{items}</ul></section>"
    return blocks


def _edits(generator: Generator, tokenizer: DQVAE, codes: CodeDataset, names: Sequence[str]) -> str:
    """Validation images, what of their codes is kept, and samples of the rest."""
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
    blocks = _strip("from their codes", originals)
    settings = {"steps": 16, "guidance_scale": 2.0 if generator.classes else 1.0}
    for title, given, classes in edits:
        known = F.interpolate(given.known_cells[:, None].float(), (height, width)).bool()
        captions = [names[label] for label in classes] if names else ()
        blocks += f"<p><strong>{title}</strong></p>" + _strip("kept", torch.where(known, originals, 160), captions)
        for seed in range(EDITS_OF_EACH):
            edited = generator.sample(classes, seed=seed, given=given, **settings)
            blocks += _strip(f"sample {seed + 1}", to_uint8(tokenizer.detokenize(edited)))
    return blocks


def _strip(name: str, images: Tensor, captions: Sequence[str] = ()) -> str:
    """A line of images of equal size, with a name before it, and perhaps one below each."""
    items = ""
    for number, image in enumerate(images):
        items += f"<li>{_img(image, name)}{escape(captions[number]) if captions else ''}</li>"
    return f"<section><h3>{escape(name)}</h3><ul>{items}</ul></section>"


def _curve(entries: Sequence[dict[str, float]], title: str, training: str, validation: str, log: bool) -> str:
    """A chart of a log: training values as a line, validation values as points; nothing if the log has neither."""
    line, points = (
        np.array([(entry["step"], entry[key]) for entry in entries if key in entry]).reshape(-1, 2)
        for key in (training, validation)
    )
    if not len(line) + len(points):
        return ""
    figure, axes = chart()
    if len(line):
        window = np.ones(max(1, len(line) // 20))
        smooth = np.convolve(line[:, 1], window, "same") / np.convolve(np.ones(len(line)), window, "same")
        axes.plot(*line.T, color=BLUE, alpha=0.3, linewidth=1)
        axes.plot(line[:, 0], smooth, color=BLUE, linewidth=2)
    axes.plot(*points.T, "o", color=ORANGE, markersize=5)
    axes.set(xlabel="step", xlim=(0, None))
    if log and (line[:, 1] > 0).all():
        axes.set(yscale="log")
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
    return f'<figure class="box"><h3>{title}</h3>{to_svg(figure, title)}</figure>'


def _metrics(title: str, record: dict[str, Any]) -> str:
    """A table of metrics over one of what they depend on."""
    rows = ""
    for key, value in record["metrics"].items():
        base, network = _parted(key, record)
        name, better = METRICS.get(base, (base, ""))
        spread = record["uncertainty"].get(key)
        about = f' title="{escape(spread["is"])}"' if spread else ""
        plus = f" ± {spread['std']:.2g}" if spread else ""
        name = escape(f"{name} ({network})" if network else name)
        rows += f'<tr><th scope="row">{name}&nbsp;{better}</th>'
        rows += f'<td class="value"{about}>{_number(value)}{plus}</td></tr>'
    facts = {
        "images": f"{record['count']:,}",
        "reference": f"{record['reference']}, {record['reference_count']:,} images",
        "its SHA-256": record["reference_hash"][:16],
        "features": ", ".join(record["features"].values()),
        "IS splits": record["settings"].get("inception_splits"),
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


def _parted(metric: str, record: dict[str, Any]) -> tuple[str, str]:
    """A metric's name without its network's, and that network's; empty if it needs none."""
    network = next((network for network in record["features"] if metric.endswith(f"_{network}")), "")
    return metric.removesuffix(f"_{network}"), network


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
