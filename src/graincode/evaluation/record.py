"""One evaluation from its parts to its record."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from graincode.distributed import collectives
from graincode.evaluation.keep import keep_images
from graincode.evaluation.modes import Mode
from graincode.evaluation.statistics import cached_statistics, measure
from graincode.evaluation.streams import DatasetStream
from graincode.evaluation.subjects import Context, ReferenceChoice, Subject
from graincode.files import write_json


class Evaluation:
    """Loads all that is needed, and finds out what can be computed; `run` does it."""

    def __init__(self, mode: Mode, subject: Subject, reference: ReferenceChoice, context: Context) -> None:
        for network in context.networks.values():
            network.load()
        self._mode, self._context = mode, context
        opened = reference.open_reference(context, subject) if mode.compares else None
        self._opened = mode.open(subject, opened, context)
        self._plan = mode.plan(self._opened.images, opened, context.source)
        self._inputs = self._opened.inputs | {
            f"{k}_hash": images.content_hash() for k, images in self._plan.real.items()
        }
        if opened is not None:
            self._inputs["reference_hash"] = opened.identity

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of all that the result depends on, by name: part of the run's identity."""
        return self._inputs | {f"features_{name}": net.identity for name, net in self._context.networks.items()}

    def run(self, folder: Path, keep: str | None) -> dict[str, Any]:
        """Measure; write `metrics.json` and what mode and `keep_images` leave into a folder; gives the record."""
        mode, plan, context, images = self._mode, self._plan, self._context, self._plan.images
        networks, reference, times = context.networks, plan.reference, [time.perf_counter()]
        real = {
            name: cached_statistics(networks, DatasetStream(dataset, *context.loading), mode.kept, context.cache_dir)
            for name, dataset in plan.real.items()
        }
        times.append(time.perf_counter())
        stream, splits = _Timed(keep_images(images, folder, keep)), mode.splits(images.count)
        mine = collectives.items(images.count, images.batch_size)
        progress = None if images.shows_progress else images.name
        found = measure(networks, stream, images.count, mine, splits, context.seed, mode.kept, progress)
        times.append(time.perf_counter())
        estimates = mode.estimates(plan, found, real, context.seed) | images.metrics()
        collectives.on_main(lambda: mode.write(folder, images.name, found, self.inputs))
        times.append(time.perf_counter())
        names = ("real_images", "features", "metrics")
        seconds = {name: end - start for name, (start, end) in zip(names, pairwise(times), strict=True)}
        seconds |= {"images": stream.seconds, "features": seconds["features"] - stream.seconds}
        record = {
            "mode": mode.name,
            "images": images.name,
            "count": images.count,
            "image_size": list(images.image_size),
            **self._opened.facts,
            "seed": context.seed,
            "batch_size": context.batch_size,
            "reference": reference and reference.name,
            "reference_count": reference and reference.count,
            "reference_hash": None,
            **self._inputs,
            "features": {network.name: network.identity for network in context.networks.values()},
            "settings": mode.settings(plan),
            "metrics": {name: estimate.value for name, estimate in estimates.items()},
            "uncertainty": {
                name: {"std": estimate.std, "is": estimate.over}
                for name, estimate in estimates.items()
                if estimate.std is not None
            },
            "warnings": [*self._opened.warnings, *plan.warnings],
            "seconds": seconds | {"all": times[-1] - times[0]},
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "device": str(context.device),
            "processes": collectives.count(),
            "versions": {name: version(name) for name in ("graincode", "torch", "torch-fidelity", "timm")},
        }
        collectives.on_main(lambda: write_json(folder / "metrics.json", record))
        return record

    def objective(self, record: dict[str, Any]) -> float:
        """The first Fréchet distance, or else the first metric, or else the number of images."""
        metrics = record["metrics"]
        distances = (metrics.get(net.label(f"{self._mode.prefix}fd")) for net in self._context.networks.values())
        first = next((distance for distance in distances if distance is not None), None)
        return next(iter(metrics.values()), float(record["count"])) if first is None else first


class _Timed:
    """Batches, and the seconds that were spent waiting for them."""

    def __init__(self, batches: Iterator[Tensor]) -> None:
        self._batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[Tensor]:
        began = time.perf_counter()
        for batch in self._batches:
            self.seconds += time.perf_counter() - began
            yield batch
            began = time.perf_counter()
        self.seconds += time.perf_counter() - began


def table(record: dict[str, Any]) -> str:
    """The metrics as lines of text, with what they depend on and what is to be said of them."""
    against = f" against {record['reference']}" if record["reference"] else ""
    lines = [f"{record['mode']}: {record['count']:,} images ({record['images']}){against}"]
    for name, value in record["metrics"].items():
        spread = record["uncertainty"].get(name)
        lines.append(f"  {name:<44}{value:>12.5g}" + (f" ± {spread['std']:.2g}" if spread else ""))
    return "\n".join(lines + [f"  note: {warning}" for warning in record["warnings"]])
