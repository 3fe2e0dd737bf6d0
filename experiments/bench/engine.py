"""The training engine against a bare loop of the same step, and the loader with and without its cache."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from timing import Result
from timm.utils import ModelEmaV3

from graincode.config.job import build, with_layout
from graincode.config.validate import check
from graincode.core.layout import CodeLayout
from graincode.core.losses import weighted_sum
from graincode.core.rng import SampleRng
from graincode.core.schedules import warmup_cosine
from graincode.data import Augmentation, ImageDataset, ImageFolder, TensorImages
from graincode.data.loader import Schedule, load_batches
from graincode.distributed.hardware import Hardware
from graincode.runs.run import Run
from graincode.tokenizer import DQVAE, ReconstructionObjective
from graincode.training.loop import Training
from graincode.training.stage import Evaluation, parameter_groups
from graincode.training.tokenizer_stage import TokenizerStage
from graincode.training.trackers import LogSettings

STEPS, BATCH, ROUNDS = 60, 16, 6
JPEGS = 192


def demo_tokenizer(layout: CodeLayout, images: torch.Tensor) -> DQVAE:
    """The demo's tokenizer, ready to train."""
    torch.manual_seed(0)
    cfg = check("train_tokenizer", ["experiment=tok_fashion"])
    module: DQVAE = build(with_layout(cfg.tokenizer.model, layout))
    module.initialize([images], SampleRng(0, torch.arange(len(images))))
    module.calibrate([images])
    return module


def _trainer(steps: int) -> object:
    cfg = check("train_tokenizer", ["experiment=tok_fashion"]).trainer
    never = {"eval_every": steps + 1, "checkpoint_every": steps + 1, "log_every": 20}
    return OmegaConf.merge(cfg, {"steps": steps, "batch_size": BATCH, **never})


def _stage(module: DQVAE, dataset: ImageDataset) -> TokenizerStage:
    stage = TokenizerStage(module, ReconstructionObjective(), None, dataset, dataset, Augmentation(), 0, list)
    stage.evaluate = lambda module, limit, draw: Evaluation({"objective": 0.0})  # only steps are timed
    return stage


def made_images() -> TensorImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (512, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images[:, :, :, :16] = images[:, :, :1, :1]
    return TensorImages("made", "train", images, torch.zeros(512).long())


class _Clock:
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def seconds(self) -> float:
        """Of a step, median; the first ten are left out."""
        return statistics.median(b - a for a, b in zip(self.times[10:], self.times[11:], strict=False))


def _by_engine(module: DQVAE, dataset: ImageDataset, optimizer: partial) -> float:
    clock, stage = _Clock(), _stage(module, dataset)
    prepare = stage.prepare

    def timed(batch, rng):
        clock.times.append(time.perf_counter())
        return prepare(batch, rng)

    stage.prepare = timed
    with tempfile.TemporaryDirectory() as folder, Run(Path(folder) / "run", {}, {}) as run:
        machine = Hardware(tf32=False, threads=torch.get_num_threads()).machine()
        Training(stage, machine, optimizer, _trainer(STEPS), 0, run, LogSettings()).run()
    return clock.seconds()


def _by_hand(module: DQVAE, dataset: ImageDataset, optimizer: partial) -> float:
    """Data, forward, loss, backward, clipping, Adam, codebook, moving average: what a step is, and nothing else."""
    clock, objective = _Clock(), ReconstructionObjective()
    adam = optimizer(parameter_groups(module))
    average = ModelEmaV3(module, decay=0.999, use_warmup=True, exclude_buffers=True)
    module.train()
    schedule = Schedule(len(dataset), BATCH, 0)
    for step, batch in enumerate(load_batches(dataset, schedule.batches(0, STEPS)), start=1):
        clock.times.append(time.perf_counter())
        for group in adam.param_groups:
            group["lr"] = 4e-3 * warmup_cosine(step, STEPS, 100)
        places, images = schedule.positions(step, 0), batch.images
        made = module(images, rng=SampleRng(0, torch.arange(places.start, places.stop)))
        weighted_sum(objective(images, made, module.router)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        module.update([made.quantized], [made.routing])
        average.update(module, step=step)
    return clock.seconds()


def engine_overhead() -> Result:
    """The demo's stage 1, 32 px, batch 16: the median step of the engine and of a bare loop, in turn."""
    layout, dataset = CodeLayout((32, 32), ((8, 8), (4, 4)), 256), made_images()
    optimizer = partial(torch.optim.Adam, lr=4e-3, betas=(0.9, 0.99), fused=True)
    seconds, ratios = [], []
    for index in range(ROUNDS):
        took = {}
        for way in (_by_engine, _by_hand)[:: 1 if index % 2 else -1]:  # the second of two finds a warmer machine
            took[way] = way(demo_tokenizer(layout, dataset[range(64)].images), dataset, optimizer)
        seconds.append(took[_by_engine])
        ratios.append(took[_by_hand] / took[_by_engine])
    ratio = statistics.median(ratios)
    return Result("engine, a step", 1000 * statistics.median(seconds), "ms", "bare loop of the same step", ratio,
                  ">= 0.97")  # fmt: skip


@contextmanager
def _photographs() -> Iterator[Path]:
    """A folder of JPEG files of 500 x 375 pixels, and an empty cache."""
    rng, before = np.random.default_rng(0), os.environ.get("GRAINCODE_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        root.mkdir()
        for index in range(JPEGS):
            small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            small.resize((500, 375), Image.Resampling.BICUBIC).save(root / f"{index}.jpg", quality=92)
        os.environ["GRAINCODE_CACHE"] = f"{folder}/cache"
        try:
            yield root
        finally:
            os.environ.pop("GRAINCODE_CACHE")
            if before is not None:
                os.environ["GRAINCODE_CACHE"] = before


def _train_split(root: Path, size: int, cache: bool) -> ImageDataset:
    return ImageFolder(str(root), image_size=size, cache=cache, val_fraction=0, test_fraction=0).split("train")


def cached_loader() -> Result:
    """JPEG files of 500 x 375 pixels to batches at 256 pixels, in one process."""
    with _photographs() as root:
        rates = []
        for cache in (True, False):
            dataset = _train_split(root, 256, cache)
            steps = 2 * len(dataset) // BATCH
            schedule = Schedule(len(dataset), BATCH, 0)
            for timed in (False, True):
                began = time.perf_counter()
                for _ in load_batches(dataset, schedule.batches(0, steps if timed else 2)):
                    pass
            rates.append(steps * BATCH / (time.perf_counter() - began))
    return Result("loader with cache", rates[0], "images/s", "decoding each time", rates[0] / rates[1], "")


def data_wait() -> Result:
    """Share of stage 1's step that waits for data: the demo's tokenizer at 64 px on the same files, without workers."""
    layout = CodeLayout((64, 64), ((8, 8), (4, 4)), 256)
    with _photographs() as root:
        shares = []
        for cache in (True, False):
            dataset = _train_split(root, 64, cache)
            module = demo_tokenizer(layout, dataset[range(32)].images)
            with tempfile.TemporaryDirectory() as folder, Run(Path(folder) / "run", {}, {}) as run:
                machine = Hardware(tf32=False, threads=torch.get_num_threads()).machine()
                optimizer = partial(torch.optim.Adam, lr=4e-3)
                Training(_stage(module, dataset), machine, optimizer, _trainer(STEPS), 0, run, LogSettings()).run()
                lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            shares.append(statistics.median(x["speed/data_wait_share"] for x in lines if "train/loss" in x))
    return Result("step waits for data", 100 * shares[0], "% with cache", f"{100 * shares[1]:.1f} % without",
                  shares[1] / shares[0], "")  # fmt: skip
