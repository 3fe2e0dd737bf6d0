"""Figures of reconstructions or samples. `graincode-evaluate --help` shows the configuration."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from graincode import processes
from graincode.core.images import to_uint8
from graincode.data.images import ImageDataset, ImageSource, Subset
from graincode.data.loader import in_order
from graincode.engine.config import build, job_main, open_run, resolve_path
from graincode.engine.dry import dry_run
from graincode.export import load_export, load_pair
from graincode.files import write_json
from graincode.metrics import (
    FeatureNetwork,
    Features,
    Generation,
    Reconstruction,
    cached_features,
    class_consistency,
    frechet_distance,
    inception_score,
)
from graincode.passes import ReconstructionPass, SampleBatch, balanced_labels, check_image_size, draw


@dataclass(frozen=True)
class RealImages:
    """Features of real images, computed once and kept under a hash of the images' content."""

    network: FeatureNetwork
    cache_dir: str | None
    batch_size: int
    workers: int

    def features(self, dataset: ImageDataset) -> Features:
        """Features of a whole split."""

        def batches() -> Iterator[Tensor]:
            return (to_uint8(b.images) for b in in_order(dataset, self.batch_size, workers=self.workers, shared=True))

        name = f"{dataset.name} {dataset.split}"
        return cached_features(self.network, dataset.content_hash(), batches, self.cache_dir, name)


def run(cfg: DictConfig) -> float:
    """Measure, write `metrics.json`, and give the Fréchet distance."""
    settings: Generation | Reconstruction = build(cfg.evaluation)
    generation = isinstance(settings, Generation)
    hardware = build(cfg.hardware)
    device = hardware.machine().device
    network = settings.features.to(device)
    source: ImageSource = build(cfg.data)
    if cfg.debug.dry:
        return _dry(network, source.image_size)
    tokenizer_path = resolve_path(cfg, "tokenizer_path", "train_tokenizer", "export")
    if generation:
        made, decodes = load_pair(
            resolve_path(cfg, "generator_path", "train_generator", "export"), tokenizer_path, device
        )
        sampler, inputs = build(cfg.sampler), {"tokenizer": decodes.identity, "generator": made.identity}
    else:  # no sampler is used, so none may tell two runs apart
        decodes = load_export(tokenizer_path, "tokenizer", device)
        cfg.sampler, inputs = None, {"tokenizer": decodes.identity}
    check_image_size(source, decodes.module)
    network.load()
    reference = source.split(settings.split)
    real = RealImages(network, cfg.cache_dir, cfg.batch_size, hardware.workers)
    began = time.perf_counter()
    with open_run("evaluate", cfg, **inputs, features=network.identity, reference=reference.content_hash()) as run:
        if (result := run.result) is not None:
            return run.report_finished(result)
        if isinstance(settings, Generation):
            labels = balanced_labels(settings.num_samples or len(reference), made.module.classes, None)
            batches = draw(made.module, decodes.module, sampler, labels, cfg.seed, cfg.batch_size)
            features, figures = _generation(settings, batches, labels, made.module.classes, source, reference, real)
            details = {"sampler": asdict(sampler), "seed": cfg.seed, "batch_size": cfg.batch_size}
        else:
            passed = ReconstructionPass(
                decodes.module, reference, cfg.batch_size, None, settings.ratios, device, hardware.workers
            )
            features = network.extract(passed, "reconstructions")
            figures = {"frechet_distance": frechet_distance(features, real.features(reference)), **passed.figures()}
            details = {"ratios": settings.ratios}
        splits = settings.inception_splits or min(10, len(features))
        score = inception_score(features, splits, cfg.seed)
        record = {
            "mode": "generation" if generation else "reconstruction",
            "images": len(features),
            "features": network.name,
            "features_identity": network.identity,
            "reference": f"{reference.name} {reference.split}",
            "reference_images": len(reference),
            "reference_hash": reference.content_hash(),
            **inputs,
            **details,
            "inception_splits": splits,
            "figures": figures | {"inception_score": score.mean, "inception_score_std": score.std},
            "seconds": time.perf_counter() - began,
            "device": str(device),
            "versions": {name: version(name) for name in ("graincode", "torch", "torch-fidelity", "timm")},
        }
        processes.on_main(lambda: write_json(run.path / "metrics.json", record))
        if processes.is_main():
            print(table(record))
            print(f"metrics: {run.path / 'metrics.json'}")
        return run.finish(figures["frechet_distance"], figures=record["figures"])


def _generation(
    settings: Generation,
    batches: Iterator[SampleBatch],
    labels: Tensor,
    classes: int,
    source: ImageSource,
    reference: ImageDataset,
    real: RealImages,
) -> tuple[Features, dict[str, float]]:
    lengths: list[Tensor] = []

    def images() -> Iterator[Tensor]:
        for batch in batches:
            lengths.append(batch.codes.lengths)
            yield batch.images

    features, reals = real.network.extract(images()), real.features(reference)
    train = source.split("train")
    # as many real images of the training split: what a perfect generator would score
    floor = real.features(Subset(train, min(len(labels), len(train))))
    figures = {
        "frechet_distance": frechet_distance(features, reals),
        "frechet_distance_of_real_images": frechet_distance(floor, reals),
        "codes_per_image": float(processes.gather_rows(torch.cat([torch.zeros(0).long(), *lengths])).double().mean()),
    }
    if settings.class_images and classes > 1:
        part = Subset(train, min(settings.class_images, len(train)))
        consistency = class_consistency(real.features(part), part.labels, reals, reference.labels, features, labels)
        figures |= {
            "class_accuracy": consistency.accuracy,
            "class_accuracy_of_real_images": consistency.real_accuracy,
            "class_accuracy_ratio": consistency.ratio,
        }
    return features, figures


def table(record: dict[str, Any]) -> str:
    """The figures as lines of text, each with what it depends on."""
    labels = {
        "frechet_distance": f"FD ({record['features']})",
        "frechet_distance_of_real_images": f"FD ({record['features']}) of as many real images",
        "inception_score": f"IS ({record['features']})",
    }
    lines = [f"{record['mode']}: {record['images']} images against {record['reference']}"]
    lines += [f"  {labels.get(name, name):<44}{value:>12.5g}" for name, value in record["figures"].items()]
    return "\n".join(lines)


def _dry(network: FeatureNetwork, size: tuple[int, int]) -> float:
    network.load()
    images = torch.zeros(1, 3, *size, dtype=torch.uint8)
    return dry_run(lambda: network.extract([images]), {network.name: network.module}, "features of one image", False)


def main() -> None:
    """Console entry."""
    job_main("evaluate", run)


if __name__ == "__main__":
    main()
