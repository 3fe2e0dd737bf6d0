"""What tests of several parts share."""

import json
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_advice import follow
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from torch import nn

from graincode.config.job import job_main, run_job
from graincode.config.validate import check
from graincode.core.errors import GraincodeError

TINY_TOKENIZER = ["tokenizer.size.channels=8", "tokenizer.code_dim=8", "tokenizer.codebook_size=32"]
TINY_GENERATOR = ["generator.size.width=32", "generator.size.position_layers=1", "generator.size.content_layers=1"]
TINY_TRAINER = [
    "trainer.steps=6", "trainer.batch_size=4", "trainer.log_every=2", "trainer.eval_every=3",
    "trainer.checkpoint_every=2", "trainer.warmup_steps=2", "trainer.eval_images=8",
]  # fmt: skip


def write_images(root: Path, count: int = 40, size: int = 24, seed: int = 0) -> Path:
    """A folder of small PNG images in two classes, smooth and busy."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        name = ("busy", "smooth")[index % 2]
        pixels = rng.integers(0, 256, (size, size, 3)) if index % 2 == 0 else np.full((size, size, 3), index * 6)
        pixels[: size // 3] = rng.integers(0, 256, (1, 1, 3))
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index:03d}.png")
    return root


def write_inception(path: Path) -> Path:
    """A file of random weights of torch-fidelity's own class, whose constructor can only load them."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def command(job: str, *overrides: str) -> None:
    """Run a job as its console script does, in this process and in the current directory."""
    before = sys.argv, dict(os.environ)
    sys.argv = [f"graincode-{job}", *overrides]
    GlobalHydra.instance().clear()
    try:
        job_main(job)
    finally:
        sys.argv = before[0]
        os.environ.clear()
        os.environ.update(before[1])


def run_checked(job: str, *overrides: str) -> float:
    """Run a job on overrides in this process, without a command line around it."""
    return run_job(job, check(job, list(overrides)))


def weights_of(run: Path) -> bytes:
    """The weights that a training exported."""
    return (run / "export/weights.safetensors").read_bytes()


def result(run: Path) -> dict:
    """What a finished run recorded."""
    return json.loads((run / "result.json").read_text())


def train_masked(conditioning: str) -> Path:
    """A generator that fills in masks, trained once in the workspace; gives its run."""
    command("train_generator", "generator=dgit_nar", f"generator/conditioning={conditioning}", *TINY_GENERATOR,
            *TINY_TRAINER, "generator.masking.beta=2",
            "codes_path=runs/extract_codes/codes/codes", f"run_name=masked-{conditioning}")  # fmt: skip
    return Path(f"runs/train_generator/masked-{conditioning}")


def refusal(capsys, job, *overrides):
    """The one line of the error; what it says to type is tried."""
    with pytest.raises(SystemExit) as stop:
        command(job, *overrides)
    err = capsys.readouterr().err
    bars = ("step/s", "s/step", "images/s")
    lines = [line for line in err.splitlines() if line.strip() and not any(bar in line for bar in bars)]
    assert stop.value.code == 2
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    follow(job, lines[0].removeprefix("error: "), list(overrides))
    return lines[0]


def refused(job: str, *overrides: str) -> str:
    """The error of a job that is run on overrides in this process, without a command line around it."""
    with pytest.raises(GraincodeError) as error:
        run_checked(job, *overrides)
    return error.value.line


def free_ports() -> int:
    """The first of two ports in a row that are free."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            try:
                two.bind(("127.0.0.1", one.getsockname()[1] + 1))
            except OSError:
                continue
            return one.getsockname()[1]
