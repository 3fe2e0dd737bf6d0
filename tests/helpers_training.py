"""Small trainings of both stages, for any number of processes: `torchrun tests/helpers_training.py FOLDER NAME ...`."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from graincode.core.codes import GrainCodes
from graincode.core.layout import CodeLayout
from graincode.core.rng import SampleRng
from graincode.data import Augmentation, CodeBatch, ImageBatch, TensorImages
from graincode.distributed import collectives
from graincode.distributed.hardware import Hardware, Machine
from graincode.distributed.signals import Stopped
from graincode.generator import (
    AutoregressiveObjective,
    ClassConditioning,
    DGiTAR,
    DGiTNAR,
    HeterogeneousEmbedding,
    InformationMasking,
    MaskedObjective,
    Transformer,
)
from graincode.networks.features import Loaded
from graincode.networks.perceptual import PerceptualDistance
from graincode.runs.run import Run
from graincode.tokenizer import (
    DQVAE,
    Adversary,
    CodingDensity,
    EMAQuantizer,
    EntropyDensity,
    FeatureRouter,
    GrainDecoder,
    GrainEncoder,
    PatchDiscriminator,
    QuantileRouter,
    ReconstructionObjective,
    TrunkSize,
)
from graincode.training.generator_stage import GeneratorStage
from graincode.training.loop import Training
from graincode.training.settings import TrainerConfig
from graincode.training.stage import Evaluation
from graincode.training.tokenizer_stage import TokenizerStage
from graincode.training.trackers import LogSettings, read_log

STEPS, BATCH = 10, 8
LAYOUT = CodeLayout((32, 32), ((8, 8), (4, 4)), 32, 2)
TRAINER = TrainerConfig(
    steps=STEPS, batch_size=BATCH, warmup_steps=2, clip_grad_norm=1.0, ema_decay=0.9, log_every=3, eval_every=4,
    eval_images=8, checkpoint_every=100,
)  # fmt: skip


class Precise(TensorImages):
    """Images in float64."""

    def __getitem__(self, indices):
        batch = super().__getitem__(indices)
        return ImageBatch(batch.images.double(), batch.labels, batch.indices)


def images(precise: bool) -> TensorImages:
    """Half of them nearly flat, so that there are batches without any fine code."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 3, 32, 32))
    pixels[::2] = rng.integers(8, 248, (12, 3, 1, 1)) + rng.integers(-8, 9, (12, 3, 32, 32))
    made = torch.from_numpy(pixels.astype(np.uint8))
    return (Precise if precise else TensorImages)("made", "train", made, torch.arange(24) % 2, ("flat", "busy"))


class EdgeFilters(nn.Conv2d):
    """A network with one stage."""

    network = SimpleNamespace(feature_info=[{"reduction": 3}])

    def stages(self, images, chosen):
        return [self(images)]


class Edges(PerceptualDistance):
    """A distance in a few features that no file is needed for."""

    def __init__(self, weight):
        super().__init__("edges", weight)

    def _load(self, size):
        network = EdgeFilters(3, 4, 3).requires_grad_(False)
        for parameter in network.parameters():
            parameter.copy_(torch.arange(parameter.numel()).sin().view_as(parameter))
        return Loaded(network, "")


def tokenizer_stage(precise: bool, kind: str) -> tuple[TokenizerStage, object]:
    """A published tokenizer with a discriminator, one that routes by its errors, or one that learns to route."""
    torch.manual_seed(0)
    adversary, layout = kind == "gan", LAYOUT if kind == "gan" else replace(LAYOUT, codebook="per_grain")
    router = {
        "gan": lambda: QuantileRouter(layout, EntropyDensity(), [0.75, 0.25]),
        "tokenizer": lambda: QuantileRouter(layout, CodingDensity(), [0.75, 0.25], elastic=True),
        "feature": lambda: FeatureRouter(layout, 8, [0.75, 0.25]),
    }[kind]()
    size = TrunkSize(8, [1, 2], blocks=1, attention=[], patch=2)
    module = DQVAE(
        layout, GrainEncoder(layout, size, 8), router, EMAQuantizer(32, 8, restart_below=0.5, max_restarts=0.2),
        GrainDecoder(layout, size, 8, expand=True, coarse_blocks=1),
    )  # fmt: skip
    adversary = Adversary(PatchDiscriminator(8, 2), start_step=3, ramp_steps=4, lecam=0.3) if adversary else None
    objective = ReconstructionObjective(perceptual=Edges(0.2) if adversary else None)
    if precise:
        module.double()
        if adversary is not None:
            adversary.double()
    dataset = images(precise)

    def start() -> None:
        batch = dataset[range(24)].to(module.device)
        share = collectives.items(24)
        module.initialize([batch.images], SampleRng(0, torch.arange(24)))
        # turned, so that no region's density is just a threshold, which rounding would decide
        others = batch.images.flip(2) if module.router.is_learned else batch.images
        module.calibrate([others[share.start : share.stop]])

    augmentation = Augmentation(flip=True)
    stage = TokenizerStage(module, objective, adversary, dataset, images(False), augmentation, 0, list)
    stage.evaluate = lambda module, limit, draw: Evaluation({"objective": 1.0})  # compared by other tests
    return stage, start


class Codes:
    """A data set of codes; those of even index are all coarse."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        grains = torch.randint(0, 2, (24, 4, 4), generator=generator)
        grains[::2] = 0
        indices = torch.randint(0, 32, (24, 8, 8), generator=generator)
        coarse = grains.repeat_interleave(2, 1).repeat_interleave(2, 2) == 0
        own = indices[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2)
        self.codes = GrainCodes(grains, torch.where(coarse, own, indices), LAYOUT)

        self.lengths = self.codes.lengths.numpy()

    def __len__(self) -> int:
        return 24

    def __getitem__(self, indices) -> CodeBatch:
        chosen = torch.as_tensor(list(indices))
        return CodeBatch(self.codes[chosen], chosen % 2)


def generator_stage(precise: bool, bucketing_window: int, masked: bool = False) -> GeneratorStage:
    torch.manual_seed(0)
    make = partial(DGiTNAR, masking=InformationMasking(beta=2.0, elastic=True)) if masked else DGiTAR
    module = make(
        LAYOUT, 16, HeterogeneousEmbedding(LAYOUT, 16, index=not masked), ClassConditioning(LAYOUT, 16, dropout=0.3),
        *(Transformer(16, 1, 2, causal=not masked) for _ in range(2)),
    )  # fmt: skip
    if precise:
        module.double()
    objective = MaskedObjective() if masked else AutoregressiveObjective()
    stage = GeneratorStage(module, objective, Codes(), Codes(), None, bucketing_window)
    stage.evaluate = lambda module, limit, draw: Evaluation({"objective": 1.0})
    return stage


def make_stage(precise: bool, kind: str) -> tuple[GeneratorStage | TokenizerStage, object]:
    """The stage of a kind of case, and what is done before its step 1."""
    if kind in ("generator", "windowed", "masked"):
        return generator_stage(precise, 3 if kind == "windowed" else 1, kind == "masked"), lambda: None
    return tokenizer_stage(precise, kind)


def train_cases(folder: Path, names: list[str]) -> None:
    """Train cases, STAGE-PRECISION-WAY such as `gan-64-whole`, as one of the processes that there are."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name in names:
        kind, precision, way = name.split("-")
        hardware = Hardware(
            num_processes=world, gradient_accumulation=1 if way in ("whole", "compiled") else 2, tf32=False, threads=1,
            gradient_checkpointing=way == "parts", compile=way == "compiled",
            strategy="fsdp" if way.startswith("sharded") else "ddp",
            mixed_precision="bf16" if precision == "16" else "no",
        )  # fmt: skip
        machine = hardware.machine()
        with Run(folder / f"{name}-{world}", {}, {"case": name}) as run:
            module = train_case(run, machine, kind, precision == "64", way)
        if module is None:
            continue
        weights = {key: value.contiguous() for key, value in module.state_dict().items()}
        save_file(weights, folder / f"{name}-{world}-{collectives.rank()}.safetensors")
        if collectives.is_main():
            lines = [line for line in read_log(run.path) if "train/loss" in line]
            (folder / f"{name}-{world}.json").write_text(json.dumps(lines))


def go_on(folder: Path, name: str, world: int) -> list[dict[str, float]]:
    """The log of a case that was stopped half-way by `world` processes and goes on in this one."""
    with Run(folder / f"{name}-{world}", {}, {"case": name}) as run:
        train_case(run, Hardware(tf32=False, threads=1).machine(), name.split("-")[0], "-64-" in name, "whole")
        return [line for line in read_log(run.path) if "train/loss" in line]


def train_case(run: Run, machine: Machine, kind: str, precise: bool, way: str) -> nn.Module | None:
    """Train a case as a run; returns what it exports, or None if it was stopped half-way."""
    # not Adam: where a gradient is zero but for rounding, as of a bias before a norm, it divides noise by noise
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    if way in ("straight", "resumed", "shardedresumed"):  # of which the second must be bit-equal to the first
        optimizer = partial(torch.optim.Adam, lr=1e-3)
    stage, start = make_stage(precise, kind)
    again = partial(Training, machine=machine, make_optimizer=optimizer, trainer=TRAINER, seed=5, run=run,
                    logs=LogSettings())  # fmt: skip
    if way.endswith(("resumed", "half")):
        first, update, calls = stage.trainables[0], stage.trainables[0].update, []

        def interrupt(trained: nn.Module, outputs: list) -> None:
            update(trained, outputs)
            calls.append(0)
            if len(calls) == STEPS // 2 and collectives.rank() == collectives.count() - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        first.update = interrupt
        with suppress(Stopped):
            again(stage, start=start).run()
            raise AssertionError("the signal was not obeyed")
        if way == "half":
            return None
        stage, start = make_stage(precise, kind)[0], partial(_fail, "a resumed run starts anew")
    return again(stage, start=start).run()[0]


def _fail(message: str) -> None:
    raise AssertionError(message)


if __name__ == "__main__":
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")  # all but the compiler
    train_cases(Path(sys.argv[1]), sys.argv[2:])
    torch.distributed.destroy_process_group()
