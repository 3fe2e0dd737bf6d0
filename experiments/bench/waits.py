"""How often the host waits for a GPU in a training step, counted on a pretended one."""

from __future__ import annotations

import itertools
import tempfile
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState
from engine import demo_tokenizer, made_images
from pretended import CUDA, Seen, pretended
from timing import Result

from graincode.config.job import build, with_layout
from graincode.config.validate import check
from graincode.core.layout import CodeLayout
from graincode.data import Augmentation, CodeBatch
from graincode.distributed.hardware import Hardware
from graincode.runs.run import Run
from graincode.tokenizer import ReconstructionObjective
from graincode.training.generator_stage import GeneratorStage
from graincode.training.loop import Training
from graincode.training.settings import TrainerConfig
from graincode.training.tokenizer_stage import TokenizerStage
from graincode.training.trackers import LogSettings

GOALS = {"stage 1": 2, "DGiT-AR": 0, "DGiT-NAR": 0}


class _Enough(Exception):
    """All steps that count are done."""


def counted_step(stage: TokenizerStage | GeneratorStage, batch_size: int, **hardware: object) -> Seen:
    """What the third step of a training does on the pretended device, from behind the copy of its data to behind that
    of the next step's."""
    numbers, parts, prepare = itertools.count(1), hardware.get("gradient_accumulation", 1), stage.prepare
    trainer = TrainerConfig(
        steps=10, batch_size=batch_size, warmup_steps=2, clip_grad_norm=1.0, ema_decay=0.9, log_every=10, eval_every=10,
        eval_images=8, checkpoint_every=10,
    )  # fmt: skip

    def watched(batch, rng):
        number = next(numbers)
        if number == 2 * parts + 1:
            seen.clear()
        if number == 3 * parts + 1:
            raise _Enough
        return prepare(batch, rng)

    stage.prepare = watched
    without_flops = mock.patch("graincode.training.loop._training_flops", return_value=0.0)
    with pretended() as seen, without_flops, tempfile.TemporaryDirectory() as folder, suppress(_Enough):
        machine = Hardware(tf32=False, threads=1, **hardware).machine()
        for state in (PartialState(), machine.accelerator.state, machine):
            state.device = CUDA
        optimizer = partial(torch.optim.AdamW, lr=1e-3, fused=True)
        with Run(Path(folder) / "run", {}, {"case": "pretended"}) as run:
            Training(stage, machine, optimizer, trainer, 0, run, LogSettings()).run()
    return seen


def host_waits(kind: str) -> Result:
    """The demo's stage 1, or its stage 2 by one of both generators, batch 16."""
    stage = _generator_stage(kind) if kind in ("DGiT-AR", "DGiT-NAR") else _tokenizer_stage()
    seen = counted_step(stage, 16)
    waits, launches = (sum(counts.values()) for counts in (seen.waits, seen.launches))
    reference, ratio = f"{launches} kernels started", launches / max(waits, 1)
    return Result(f"host waits, {kind}", waits, "for each step", reference, ratio, f"<= {GOALS[kind]} waits")


def _tokenizer_stage() -> TokenizerStage:
    images = made_images()
    module = demo_tokenizer(CodeLayout((32, 32), ((8, 8), (4, 4)), 256), images[range(64)].images)
    return TokenizerStage(module, ReconstructionObjective(), None, images, images, Augmentation(), 0, list)


class _Codes:
    """Codes in memory."""

    def __init__(self, codes) -> None:
        self.codes, self.lengths = codes, codes.lengths.numpy()

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, indices) -> CodeBatch:
        return CodeBatch(self.codes[list(indices)], torch.zeros(len(indices), dtype=torch.long))


def _generator_stage(kind: str) -> GeneratorStage:
    images, layout = made_images()[range(64)].images, CodeLayout((32, 32), ((8, 8), (4, 4)), 256, 10)
    codes = _Codes(replace(demo_tokenizer(layout, images).eval().tokenize(images), layout=layout))
    cfg = check("train_generator", [f"experiment={kind[5:].lower()}_fashion"])
    with_layout(cfg.generator.model, layout)
    return GeneratorStage(build(cfg.generator.model), build(cfg.generator.objective), codes, codes, None)
