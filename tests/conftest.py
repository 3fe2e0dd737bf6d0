import json
import os
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "engine")]

TINY_TOKENIZER = ["tokenizer.size.channels=8", "tokenizer.code_dim=8", "tokenizer.codebook_size=32"]
TINY_GENERATOR = ["generator.size.width=32", "generator.size.position_layers=1", "generator.size.content_layers=1"]
TINY_TRAINER = [
    "trainer.steps=6", "trainer.batch_size=4", "trainer.log_every=2", "trainer.eval_every=3",
    "trainer.checkpoint_every=2", "trainer.warmup_steps=2", "trainer.eval_images=8",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


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


def command(job: str, *overrides: str) -> None:
    """Run a job as its console script does, in this process and in the current directory."""
    before = sys.argv, dict(os.environ)
    sys.argv = [f"graincode-{job}", *overrides]
    GlobalHydra.instance().clear()
    try:
        import_module(f"graincode.jobs.{job}").main()
    finally:
        sys.argv = before[0]
        os.environ.clear()
        os.environ.update(before[1])


def result(run: Path) -> dict:
    """What a finished run recorded."""
    return json.loads((run / "result.json").read_text())


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A directory in which all of stage 1 and 2 has been run on a few images."""
    root = tmp_path_factory.mktemp("workspace")
    images = write_images(root / "images")
    os.environ["GRAINCODE_CACHE"] = str(root / "cache")
    before = Path.cwd()
    os.chdir(root)
    try:
        data = ["data=image_folder", f"data.root={images}", "data.image_size=32", "data.test_fraction=0.3"]
        (root / "data.json").write_text(json.dumps(data))
        command("train_tokenizer", *data, *TINY_TOKENIZER, *TINY_TRAINER, "run_name=tok")
        command("extract_codes", *data, "run_name=codes")
        command("train_generator", *TINY_GENERATOR, *TINY_TRAINER, "run_name=ar")
        command("sample", "num_samples=6", "batch_size=4", "run_name=samples")
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def inside(workspace, monkeypatch):
    """The workspace as the current directory; gives the overrides that name its data."""
    monkeypatch.chdir(workspace)
    return json.loads((workspace / "data.json").read_text())
