"""Figures of reconstructions or samples. `graincode-evaluate --help` shows the configuration."""

from __future__ import annotations

import dataclasses
import time
from importlib.metadata import version
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.core.images import to_uint8
from graincode.core.rng import permutation
from graincode.data.images import ImageDataset, ImageSource
from graincode.data.loader import in_order
from graincode.engine.config import build, job_main, open_run, resolve_path
from graincode.engine.dry import dry_run
from graincode.export import Export, load_export, load_pair
from graincode.files import write_json
from graincode.jobs.extract_codes import check_image_size
from graincode.jobs.sample import balanced_labels, draw
from graincode.metrics import (
    FeatureNetwork,
    Features,
    cached_features,
    class_consistency,
    frechet_distance,
    inception_score,
)
from graincode.reconstruction import ReconstructionPass

MODES = ("generation", "reconstruction")


@dataclasses.dataclass(frozen=True)
class RealImages:
    """Real images as the metrics take them: their features are computed once and kept under a hash of their content."""

    network: FeatureNetwork
    cache_dir: str | None
    batch_size: int

    def features(self, dataset: ImageDataset) -> Features:
        """Features of a whole split."""
        batches = lambda: (to_uint8(b.images) for b in in_order(dataset, self.batch_size))  # noqa: E731
        return cached_features(
            self.network, dataset.content_hash(), batches, self.cache_dir, f"{dataset.name} {dataset.split}"
        )

    def labels(self, dataset: ImageDataset) -> Tensor:
        """(N,) labels of a whole split."""
        return torch.cat([batch.labels for batch in in_order(dataset, self.batch_size)])


class Subset(ImageDataset):
    """The first `count` images of a fixed permutation of a split, so that a part is not one class."""

    def __init__(self, dataset: ImageDataset, count: int) -> None:
        self.name, self.split = dataset.name, f"{dataset.split} (part)"
        self.image_size, self.class_names = dataset.image_size, dataset.class_names
        self._dataset, self._order = dataset, permutation(0, 0, len(dataset))[:count]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, indices: Any) -> Any:
        return self._dataset[self._order[torch.as_tensor(indices).reshape(-1).numpy()].tolist()]


def run(cfg: DictConfig) -> float:
    """Measure, write `metrics.json`, and give the Fréchet distance."""
    if cfg.evaluation.mode not in MODES:
        raise GraincodeError(f"evaluation.mode={cfg.evaluation.mode}: type evaluation={' or evaluation='.join(MODES)}")
    generation = cfg.evaluation.mode == "generation"
    cfg.tokenizer_path = str(resolve_path(cfg, "tokenizer_path", "train_tokenizer", "export"))
    if generation:
        cfg.generator_path = str(resolve_path(cfg, "generator_path", "train_generator", "export"))
    else:  # neither is used, so neither may tell two runs apart
        OmegaConf.update(cfg, "generator_path", "unused")
        OmegaConf.update(cfg, "sampler", {}, merge=False)
    source: ImageSource = build(cfg.data)
    device = build(cfg.hardware).accelerator().device
    network: FeatureNetwork = build(cfg.evaluation.features).to(device)
    if cfg.debug.dry:
        return _dry(network, source.image_size)
    network.load()
    reference = source.split(cfg.evaluation.split)
    real = RealImages(network, cfg.cache_dir, cfg.batch_size)
    began = time.perf_counter()
    with open_run("evaluate", cfg) as run:
        if (result := run.result) is not None:
            return run.report_finished(result)
        if generation:
            made, decodes = load_pair(cfg.generator_path, cfg.tokenizer_path, device)
            check_image_size(source, decodes.module)
            figures, settings = _generation(cfg, made, decodes, source, reference, real)
        else:
            decodes = load_export(cfg.tokenizer_path, "tokenizer", device)
            check_image_size(source, decodes.module)
            figures, settings = _reconstruction(cfg, decodes, reference, real, device)
        record = {
            "mode": cfg.evaluation.mode,
            "features": network.name,
            "features_identity": network.identity,
            "reference": f"{reference.name} {reference.split}",
            "reference_images": len(reference),
            "reference_hash": reference.content_hash(),
            "inception_splits": cfg.evaluation.inception_splits,
            "tokenizer": decodes.identity,
            **settings,
            "figures": figures,
            "seconds": time.perf_counter() - began,
            "versions": {name: version(name) for name in ("graincode", "torch", "torch-fidelity", "timm")},
        }
        write_json(run.path / "metrics.json", record)
        print(table(record))
        print(f"metrics: {run.path / 'metrics.json'}")
        return run.finish(figures["frechet_distance"], figures=figures)


def _reconstruction(
    cfg: DictConfig, decodes: Export, reference: ImageDataset, real: RealImages, device: torch.device
) -> tuple[dict[str, float], dict[str, Any]]:
    passed = ReconstructionPass(decodes.module, reference, cfg.batch_size, ratios=cfg.evaluation.ratios, device=device)
    features = real.network.extract(passed, "reconstructions")
    figures = {
        "frechet_distance": frechet_distance(features, real.features(reference)),
        **_score(features, cfg),
        **passed.figures(),
    }
    return figures, {"images": len(features), "ratios": cfg.evaluation.ratios and list(cfg.evaluation.ratios)}


def _generation(
    cfg: DictConfig, made: Export, decodes: Export, source: ImageSource, reference: ImageDataset, real: RealImages
) -> tuple[dict[str, float], dict[str, Any]]:
    count = cfg.evaluation.num_samples or len(reference)
    labels = balanced_labels(count, made.module.layout.classes, None)
    lengths = []

    def images() -> Any:
        for batch in draw(made.module, decodes.module, build(cfg.sampler), labels, cfg.seed, cfg.batch_size):
            lengths.append(batch.codes.lengths)
            yield batch.images

    features, reals = real.network.extract(images()), real.features(reference)
    train = source.split("train")
    # the same number of real images from the training split: what a perfect generator would score
    floor = real.features(Subset(train, min(count, len(train))))
    figures = {
        "frechet_distance": frechet_distance(features, reals),
        "frechet_distance_of_real_images": frechet_distance(floor, reals),
        **_score(features, cfg),
        "codes_per_image": float(torch.cat(lengths).double().mean()),
    }
    if cfg.evaluation.class_images and made.module.layout.classes > 1:
        part = Subset(train, min(cfg.evaluation.class_images, len(train)))
        consistency = class_consistency(
            real.features(part), real.labels(part), reals, real.labels(reference), features, labels
        )
        figures |= {
            "class_accuracy": consistency.accuracy,
            "class_accuracy_of_real_images": consistency.real_accuracy,
            "class_accuracy_ratio": consistency.ratio,
        }
    sampler = {key: value for key, value in OmegaConf.to_container(cfg.sampler).items() if key != "_target_"}
    return figures, {"images": count, "generator": made.identity, "sampler": sampler, "seed": cfg.seed}


def _score(features: Features, cfg: DictConfig) -> dict[str, float]:
    score = inception_score(features, cfg.evaluation.inception_splits, cfg.seed)
    return {"inception_score": score.mean, "inception_score_std": score.std}


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
