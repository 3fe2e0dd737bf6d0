"""Figures of samples, reconstructions or any images. `graincode-evaluate --help` shows the configuration."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from graincode.config.job import build, job_main, open_run, resolve_path
from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.prompts import CodePrefix
from graincode.data.images import ImageDataset, ImageSource
from graincode.data.loader import in_order
from graincode.distributed import collectives
from graincode.distributed.hardware import Hardware
from graincode.evaluation.comparison import Comparison, RealImages, Reference
from graincode.evaluation.keep import keep_images
from graincode.evaluation.modes import Against, Distances, Likelihood, Mode, Reconstruction, Summary, What, check_modes
from graincode.evaluation.samples import SampleStream, chosen_labels
from graincode.evaluation.statistics import Statistics, measure, read_npz, write_npz
from graincode.evaluation.streams import (
    DatasetStream,
    ImageStream,
    LikelihoodStream,
    PairStream,
    ReconstructionStream,
    check_image_size,
)
from graincode.evaluation.subjects import (
    Folder,
    Originals,
    Reconstructions,
    Samples,
    Split,
    StatisticsFile,
    check_pairs,
    is_lossy,
)
from graincode.export import Export, load_export, load_pair
from graincode.files import write_json
from graincode.jobs.dry import dry_run
from graincode.networks.distances import PerceptualDistance
from graincode.networks.features import FeatureNetwork
from graincode.runs.table import update_table
from graincode.tokenizer import DQVAE


def run(cfg: DictConfig) -> float:
    """Measure, write `metrics.json`, and give the first Fréchet distance, or else the first figure."""
    mode: Mode = build(cfg.evaluation, features=build(cfg.features))
    what, against = build(cfg.images), build(cfg.reference)
    check_modes(mode, what, against)
    hardware = build(cfg.hardware)
    device = hardware.machine().device
    wanted = mode.features if isinstance(mode, Summary) or getattr(mode, "in_features", False) else {}
    networks = {name: network.to(device) for name, network in wanted.items()}
    source: ImageSource = build(cfg.data)
    if cfg.debug.dry:
        return _dry(networks, source.image_size)
    for network in networks.values():
        network.load()
    reference = None if not isinstance(mode, Distances) else _open_reference(what, against, source, networks)
    images, inputs, about = _open_images(cfg, mode, what, source, reference, hardware, device)
    subset = mode.subset if isinstance(mode, Distances) else 0
    inputs |= {f"features_{name}": network.identity for name, network in networks.items()}
    warnings = about.pop("warnings", [])
    comparison = None
    if reference is not None:
        real = RealImages(networks, subset, cfg.cache_dir, cfg.batch_size, hardware.workers)
        comparison = Comparison(mode, real, source, cfg.seed, images, reference, warnings=warnings)
        comparison.check()
        inputs |= {"reference": reference.identity, **comparison.inputs}
    _drop_unused(cfg, mode, what, against)
    with open_run("evaluate", cfg, **inputs) as run:
        if (result := run.result) is not None:
            return run.report_finished(result)
        began, clock = time.perf_counter(), _Clock()
        if comparison is not None:
            comparison.gather()
        gathered = time.perf_counter()
        stream = clock.waiting(keep_images(images, run.path, cfg.keep))
        splits = mode.splits(images.count) if isinstance(mode, Distances) else 0
        mine = collectives.items(images.count, images.batch_size)
        progress = None if isinstance(images, SampleStream) else images.name  # which shows its own
        made = measure(networks, stream, images.count, mine, splits, cfg.seed, subset, progress)
        measured = time.perf_counter()
        if comparison is not None:
            comparison.run(made)
        else:
            collectives.on_main(lambda: _write_statistics(run.path, networks, made, images.name, inputs))
        figures = (comparison.figures if comparison is not None else {}) | images.metrics()
        done = time.perf_counter()
        record = {
            "mode": mode.mode,
            "images": images.name,
            "count": images.count,
            "image_size": list(images.image_size),
            **about,
            "seed": cfg.seed,
            "batch_size": cfg.batch_size,
            "reference": reference and reference.name,
            "reference_count": reference and reference.count,
            "reference_hash": reference and reference.identity,
            **{f"{name}_hash": digest for name, digest in (comparison.inputs if comparison else {}).items()},
            "features": {network.name: network.identity for network in networks.values()},
            "settings": _settings(mode, images, reference),
            "metrics": {name: figure.value for name, figure in figures.items()},
            "uncertainty": {
                name: {"std": figure.std, "is": figure.over}
                for name, figure in figures.items()
                if figure.std is not None
            },
            "warnings": warnings,
            "seconds": {
                "real_images": gathered - began,
                "images": clock.seconds,
                "features": measured - gathered - clock.seconds,
                "metrics": done - measured,
                "all": done - began,
            },
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "device": str(device),
            "processes": collectives.count(),
            "versions": {name: version(name) for name in ("graincode", "torch", "torch-fidelity", "timm")},
        }
        collectives.on_main(lambda: write_json(run.path / "metrics.json", record))
        if collectives.is_main():
            print(table(record))
            print(f"metrics: {run.path / 'metrics.json'}")
        distances = {network.label(f"{prefix}fd") for network in networks.values() for prefix in ("", "r")}
        objective = next((f.value for name, f in figures.items() if name in distances), None)
        if objective is None:
            objective = next((f.value for f in figures.values()), float(images.count))
        finished = run.finish(objective, metrics=record["metrics"])
        collectives.on_main(lambda: update_table(run.path.parent))
        return finished


def table(record: dict[str, Any]) -> str:
    """The figures as lines of text, with what they depend on and what is to be said of them."""
    against = f" against {record['reference']}" if record["reference"] else ""
    lines = [f"{record['mode']}: {record['count']:,} images ({record['images']}){against}"]
    for name, value in record["metrics"].items():
        spread = record["uncertainty"].get(name)
        lines.append(f"  {name:<44}{value:>12.5g}" + (f" ± {spread['std']:.2g}" if spread else ""))
    return "\n".join(lines + [f"  note: {warning}" for warning in record["warnings"]])


class _Clock:
    """Adds up the seconds that are spent waiting for the next batch."""

    seconds = 0.0

    def waiting(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch


def _open_reference(
    what: What, against: Against, source: ImageSource, networks: Mapping[str, FeatureNetwork]
) -> Reference:
    if isinstance(against, StatisticsFile):
        known = {name: read_npz(against.path, network) for name, network in networks.items()}
        path = Path(against.path).expanduser()
        return Reference(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), known=known)
    if isinstance(against, Folder):
        images = against.open("reference")
        return Reference(images.name, images.content_hash(), images)
    images = Split(what.split if isinstance(against, Originals) else against.split).open(source)
    return Reference(f"{images.name} {images.split}", images.content_hash(), images, split=images.split)


def _open_images(
    cfg: DictConfig,
    mode: Mode,
    what: What,
    source: ImageSource,
    reference: Reference | None,
    hardware: Hardware,
    device: torch.device,
) -> tuple[ImageStream, dict[str, str], dict[str, Any]]:
    """What is measured, the identities of what it depends on, and what the record says of it."""
    workers = hardware.workers
    likeness = mode.likeness(device) if isinstance(mode, Reconstruction) else {}
    others = {
        name: one.measure.identity for name, one in likeness.items() if isinstance(one.measure, PerceptualDistance)
    }
    if isinstance(what, Samples):
        made, decodes = _load_pair(cfg, device)
        count = what.num_samples or (reference and reference.count)
        if not count:
            raise GraincodeError(
                "images.num_samples is not set, and the reference does not say how many images it has: "
                "type images.num_samples=50000"
            )
        sampler, classes = build(cfg.sampler), made.module.classes
        if hardware.compile:
            made.module.compile_sampling()
        sampler = made.module.resolve(sampler)
        labels = chosen_labels(what.labels, count, classes, cfg.seed, reference and reference.labels)
        inputs, given, whose = {"generator": made.identity, "tokenizer": decodes.identity}, None, what.labels
        if made.module.needs_prompt:
            if what.labels != "balanced":
                raise GraincodeError(
                    f"images.labels={what.labels}, but the generator draws contents for grain maps of training images, "
                    "and takes their labels: leave images.labels=balanced"
                )
            dataset = Split("train").open(source) if reference and reference.images is not None else None
            given, labels = _maps(made, decodes.module, dataset, count, cfg.batch_size)
            inputs["maps"], whose = dataset.content_hash(), "of the training images whose maps are given"
        images = SampleStream(made.module, decodes.module, sampler, labels, cfg.seed, cfg.batch_size, given)
        return (
            images,
            inputs,
            {
                **inputs,
                "sampler": asdict(sampler),
                "precision": cfg.precision,
                "labels": whose if classes else None,
            },
        )
    if isinstance(what, Reconstructions):
        decodes = load_export(resolve_path(cfg, "tokenizer_path", "train_tokenizer", "export"), "tokenizer", device)
        check_image_size(source, decodes.module)
        dataset = Split(what.split).open(source) if reference is None else reference.images
        others["originals"] = dataset.content_hash()
        images = ReconstructionStream(
            decodes.module, dataset, cfg.batch_size, None, what.ratios, device, workers, likeness, what.psnr
        )
        inputs = {"tokenizer": decodes.identity} | others
        return images, inputs, {**inputs, "ratios": what.ratios, "psnr": what.psnr}
    dataset = what.open("images") if isinstance(what, Folder) else what.open(source)
    if isinstance(mode, Likelihood):
        made, decodes = _load_pair(cfg, device)
        check_image_size(source, decodes.module)
        how = {name: made.provenance.get(name) for name in ("ratios", "psnr")}
        images = LikelihoodStream(made.module, decodes.module, dataset, cfg.batch_size, workers, **how, device=device)
        inputs = {"generator": made.identity, "tokenizer": decodes.identity, "images": dataset.content_hash()}
        return images, inputs, {**inputs, **how}
    inputs = {"images": dataset.content_hash()} | others
    about: dict[str, Any] = {"images_hash": dataset.content_hash()} | others
    if isinstance(what, Folder) and is_lossy(dataset):
        about["warnings"] = ["the images were kept as JPEG, which changes them and every figure; keep them as PNG"]
    if isinstance(mode, Reconstruction):
        check_pairs(dataset, reference.images)
        return PairStream(dataset, reference.images, likeness, cfg.batch_size, workers), inputs, about
    return DatasetStream(dataset, cfg.batch_size, workers), inputs, about


def _maps(
    made: Export, tokenizer: DQVAE, dataset: ImageDataset | None, count: int, batch_size: int
) -> tuple[CodePrefix, Tensor]:
    """Grain maps of the first training images, not those that samples are measured against, and their labels, for a
    generator that needs maps."""
    if dataset is None or count > len(dataset):
        raise GraincodeError(
            f"the generator draws contents for grain maps of training images, of which there are "
            f"{'none without reference=split' if dataset is None else len(dataset)}, and {count} are asked for: type "
            "reference=split, or images.num_samples= fewer"
        )
    how = [made.provenance.get(name) for name in ("ratios", "psnr")]
    parts, labels = [], []
    for batch in in_order(dataset, batch_size, count):
        parts.append(tokenizer.tokenize(batch.images.to(tokenizer.device), *how).to("cpu"))
        labels.append(batch.labels)
    codes = GrainCodes.cat(parts)
    return made.module.prompt_of(GrainCodes(codes.grains, codes.indices, made.module.layout)), torch.cat(labels)


def _load_pair(cfg: DictConfig, device: torch.device) -> tuple[Export, Export]:
    """The generator and its tokenizer."""
    return load_pair(
        resolve_path(cfg, "generator_path", "train_generator", "export"),
        resolve_path(cfg, "tokenizer_path", "train_tokenizer", "export"),
        device,
        cfg.precision,
    )


def _drop_unused(cfg: DictConfig, mode: Mode, what: What, against: Against) -> None:
    """Take out of the configuration what is not read, so that it does not tell two runs apart."""
    if not isinstance(what, Samples):
        cfg.sampler = None
        if cfg.precision != "float32":
            raise GraincodeError(
                f"precision={cfg.precision} is of samples alone: type precision=float32, or images=samples"
            )
    if not isinstance(mode, Distances):
        cfg.reference = None
    elsewhere = isinstance(what, Folder | Samples) and (
        cfg.reference is None or isinstance(against, Folder | StatisticsFile)
    )
    if elsewhere and not getattr(mode, "floor", None):
        cfg.data = None


def _settings(mode: Mode, images: ImageStream, reference: Reference | None) -> dict[str, Any]:
    """What the figures were computed with."""
    values = {one.name: getattr(mode, one.name) for one in fields(mode) if one.name != "features"}
    if isinstance(mode, Distances):
        values["inception_splits"] = mode.splits(images.count)
        if reference is not None and reference.images is not None:
            values["kid_subset_size"] = mode.kid_size(min(images.count, len(reference.images), mode.subset))
    return values


def _write_statistics(
    folder: Path,
    networks: Mapping[str, FeatureNetwork],
    made: Mapping[str, Statistics],
    name: str,
    inputs: Mapping[str, str],
) -> None:
    for key, network in networks.items():
        path = folder / f"statistics-{network.name}.npz"
        write_npz(path, made[key], images=name, **{f"{what}_identity": value for what, value in inputs.items()})
        print(f"statistics: {path}")


def _dry(networks: Mapping[str, FeatureNetwork], size: tuple[int, int]) -> float:
    images = torch.zeros(1, 3, *size, dtype=torch.uint8)
    modules = {network.name: network.module for network in networks.values()}
    return dry_run(lambda: [network(images) for network in networks.values()], modules, "features of one image", False)


def main() -> None:
    """Console entry."""
    job_main("evaluate")


if __name__ == "__main__":
    main()
