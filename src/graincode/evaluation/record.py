"""One evaluation from its plan to its record."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from graincode.distributed import collectives
from graincode.evaluation.keep import keep_images
from graincode.evaluation.modes import Mode, Plan
from graincode.evaluation.statistics import cached_statistics, measure
from graincode.evaluation.streams import DatasetStream
from graincode.files import write_json


def evaluate(mode: Mode, plan: Plan, folder: Path, keep: str | None) -> dict[str, Any]:
    """Measure; write `metrics.json` and what the mode and `keep_images` leave into a folder; gives the record."""
    context, images, reference, clock = plan.context, plan.images, plan.reference, time.perf_counter
    networks, subset, began, waits = context.networks, mode.subset, clock(), []
    real = {
        name: cached_statistics(networks, DatasetStream(dataset, *context.loading), subset, context.cache_dir)
        for name, dataset in plan.real.items()
    }
    ready, stream = clock(), _timed(keep_images(images, folder, keep), waits)
    progress = None if images.shows_progress else images.name
    how = mode.splits(images.count), context.seed, subset, progress
    found = measure(networks, stream, images.count, images.mine, *how)
    measured, waited = clock(), sum(waits)
    estimates = mode.estimates(plan, found, real) | images.metrics()
    collectives.on_main(lambda: mode.write(plan, found, folder))
    ended = clock()
    record = {
        "mode": mode.name,
        "images": images.name,
        "count": images.count,
        "image_size": list(images.image_size),
        **images.facts,
        "seed": context.seed,
        "batch_size": context.batch_size,
        "reference": reference and reference.name,
        "reference_count": reference and reference.count,
        "reference_hash": None,
        **plan.inputs,
        "features": {network.name: network.identity for network in networks.values()},
        "settings": mode.settings(plan),
        "metrics": {name: estimate.value for name, estimate in estimates.items()},
        "uncertainty": {
            name: {"std": estimate.std, "is": estimate.over}
            for name, estimate in estimates.items()
            if estimate.std is not None
        },
        "warnings": plan.warnings,
        "seconds": {
            "real_images": ready - began,
            "images": waited,
            "features": measured - ready - waited,
            "metrics": ended - measured,
            "all": ended - began,
        },
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": str(context.device),
        "processes": collectives.count(),
        "versions": {name: version(name) for name in ("graincode", "torch", "torch-fidelity", "timm")},
    }
    collectives.on_main(lambda: write_json(folder / "metrics.json", record))
    return record


def _timed(batches: Iterator[Tensor], waits: list[float]) -> Iterator[Tensor]:
    """Batches, and into a list the seconds that were spent waiting for each."""
    began = time.perf_counter()
    for batch in batches:
        waits.append(time.perf_counter() - began)
        yield batch
        began = time.perf_counter()


def table(record: dict[str, Any]) -> str:
    """The metrics as lines of text, with what they depend on and what is to be said of them."""
    against = f" against {record['reference']}" if record["reference"] else ""
    lines = [f"{record['mode']}: {record['count']:,} images ({record['images']}){against}"]
    for name, value in record["metrics"].items():
        spread = record["uncertainty"].get(name)
        lines.append(f"  {name:<44}{value:>12.5g}" + (f" ± {spread['std']:.2g}" if spread else ""))
    return "\n".join(lines + [f"  note: {warning}" for warning in record["warnings"]])
