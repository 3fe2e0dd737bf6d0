"""Whether a device computes what the CPU computes: numbers, samples, trainings, and in which precision and kernels."""

from __future__ import annotations

import collections
import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import helpers_training as small
import torch
from report import Report
from torch import nn

from graincode.core import density
from graincode.core.images import from_uint8
from graincode.core.precision import products
from graincode.core.rng import SampleRng
from graincode.distributed.hardware import Hardware
from graincode.runs.run import Run
from graincode.training.loop import Training
from graincode.training.trackers import read_log

KINDS = ("gan", "tokenizer", "feature", "generator", "windowed", "masked")
WAITS = {"gan": 2, "tokenizer": 2, "generator": 0, "masked": 0}  # of the host for a GPU, in a step, at most


def numbers(report: Report) -> None:
    """Random numbers, pixels, densities and quantiles have the same bits as on the CPU."""
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    levels = torch.arange(256, dtype=torch.uint8)
    same = {}
    for name, call, given in [
        ("random numbers", lambda ids: SampleRng(7, ids).uniforms(3, 5), torch.arange(64)),
        ("pixels", from_uint8, levels),
        *((kind, lambda x, kind=kind: getattr(density, f"region_{kind}")(x, (8, 8)), images)
          for kind in ("entropy", "gradient", "variance", "hash")),
        ("quantiles", density.quantile_table, density.region_entropy(images, (8, 8)).flatten()),
    ]:  # fmt: skip
        same[name] = torch.equal(call(given), call(given.to(report.device)).cpu())
    differing = [name for name, equal in same.items() if not equal]
    report.say("numbers", f"differing: {', '.join(differing) or 'none'} of {', '.join(same)}", not differing)


def codes(report: Report) -> None:
    """Codes of images: equal in float64; how many differ in other precisions."""
    stage, _ = small.tokenizer_stage(True, "gan")
    module, images = stage.trainables[0].module, stage.dataset[range(24)].images
    module.initialize([images], SampleRng(0, torch.arange(24)))
    module.calibrate([images])
    expected = module.eval().tokenize(images)
    for precision in ("float64", "float32", "tf32", "bfloat16"):
        module.to(report.device, torch.float64 if precision == "float64" else torch.float32)
        with products("float32" if precision == "float64" else precision, report.device.type):
            found = module.tokenize(images.to(report.device)).to("cpu")
        grains = float((found.grains != expected.grains).double().mean())
        entries = float((found.indices != expected.indices).double().mean())
        text = (
            f"{100 * grains:.2f} % of the regions have another grain, {100 * entries:.2f} % of the cells another code"
        )
        report.say(f"codes in {precision}", text, None if precision != "float64" else grains == entries == 0,
                   grains=grains, entries=entries)  # fmt: skip


def samples(report: Report) -> None:
    """In float64 samples are those of the CPU, code by code, with guidance too."""
    labels = torch.arange(6) % 2
    for masked in (False, True):
        module = small.generator_stage(True, 1, masked).trainables[0].module.eval()
        for scale in (1.0, 1.5):
            one, other = (
                module.to(device).sample(labels, seed=3, batch_size=4, guidance_scale=scale)
                for device in ("cpu", report.device)
            )
            same = torch.equal(one.grains, other.grains) and torch.equal(one.indices, other.indices)
            name = "masked" if masked else "autoregressive"
            report.say(f"samples, {name}, guidance {scale}", "in float64, against the CPU's", same)


def train(report: Report, kind: str, device: str, precise: bool, **settings: object) -> tuple[nn.Module, float]:
    """A small training of ten steps; returns the module on the CPU and the last loss."""
    machine = Hardware(device="gpu" if device == "cuda" else "cpu", threads=1, **{"tf32": False} | settings).machine()
    with tempfile.TemporaryDirectory() as folder, Run(Path(folder) / "run", {}, {"case": kind}) as run:
        module = small.train_case(run, machine, kind, precise, "whole")
        losses = [line["train/loss"] for line in read_log(run.path) if "train/loss" in line]
    return module.cpu(), losses[-1]


def trainings(report: Report) -> None:
    """Ten steps of every kind of training in float64 end with the CPU's weights."""
    for kind in KINDS if not report.quick else ("gan", "generator"):
        there, here = (train(report, kind, device, True)[0] for device in ("cpu", report.device.type))
        distances = {
            name: float((one - other).norm() / one.norm().clamp(min=1e-9))
            for (name, one), other in zip(there.state_dict().items(), here.state_dict().values(), strict=True)
            if one.is_floating_point() and bool(one.isfinite().all())
        }
        worst = max(distances, key=distances.get)
        text = f"furthest from the CPU's weights: {distances[worst]:.1e} ({worst})"
        report.say(f"training, {kind}", text, distances[worst] < 1e-6, distance=distances[worst])


def precisions(report: Report) -> None:
    """Trainings in other precisions, divided, recomputed and compiled have finite losses near that in float32."""
    plain = {kind: train(report, kind, report.device.type, False)[1] for kind in ("gan", "generator", "masked")}
    for name, kind, settings in [
        ("bf16", "gan", {"mixed_precision": "bf16", "tf32": True}),
        ("bf16, two micro-batches", "generator", {"mixed_precision": "bf16", "gradient_accumulation": 2}),
        ("bf16, recomputed", "masked", {"mixed_precision": "bf16", "gradient_checkpointing": True}),
        ("bf16, compiled", "generator", {"mixed_precision": "bf16", "compile": True}),
        ("compiled", "gan", {"compile": True}),
        ("fp16", "generator", {"mixed_precision": "fp16"}),
    ]:
        if settings.get("mixed_precision") == "fp16" and not report.is_gpu:
            continue
        loss = train(report, kind, report.device.type, False, **settings)[1]
        near = math.isfinite(loss) and abs(loss / plain[kind] - 1) < 0.1
        report.say(f"training, {kind}, {name}", f"last loss {loss:.4f}, in float32 {plain[kind]:.4f}", near, loss=loss)


@contextmanager
def counted_waits(report: Report) -> Iterator[collections.Counter[str]]:
    """Counts in which lines the host waits for a GPU, by torch's own debug mode."""
    found: collections.Counter[str] = collections.Counter()

    def note(message: Warning | str, category: type[Warning], file: str, line: int, *_: object) -> None:
        if "called a synchronizing" in str(message):
            found[f"{file.rpartition('graincode/')[2]}:{line}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if report.is_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if report.is_gpu:
                torch.cuda.set_sync_debug_mode("default")


def waits(report: Report) -> None:
    """How often the host waits for the device in a step of training that is neither logged nor saved."""
    for kind, most in WAITS.items():
        counts: list[collections.Counter[str]] = []

        class Watched(Training):
            def _step(self, number: int, *rest: object, counts: list = counts) -> bool:
                if number != 8:
                    return super()._step(number, *rest)
                with counted_waits(report) as found:
                    stop = super()._step(number, *rest)
                counts.append(found)
                return stop

        small.Training = Watched
        try:
            train(report, kind, report.device.type, False, mixed_precision="bf16")
        finally:
            small.Training = Training
        (found,) = counts
        lines = ", ".join(f"{line} x{count}" for line, count in found.most_common())
        report.say(f"waits, {kind}", f"{found.total()} in a step, goal {most}; {lines or 'none'}",
                   found.total() <= most, waits=found.total())  # fmt: skip
