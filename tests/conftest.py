import json
import os
from pathlib import Path

import pytest
import torch
from helpers import TINY_GENERATOR, TINY_TOKENIZER, TINY_TRAINER, command, write_images


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A directory in which all of stage 1 and 2 has been run on a few images."""
    root = tmp_path_factory.mktemp("workspace")
    images = write_images(root / "images")
    cache = os.environ.get("GRAINCODE_CACHE")
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
        del os.environ["GRAINCODE_CACHE"]
        if cache is not None:
            os.environ["GRAINCODE_CACHE"] = cache
    return root


@pytest.fixture
def inside(workspace, monkeypatch):
    """The workspace as the current directory; gives the overrides that name its data."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("GRAINCODE_CACHE", str(workspace / "cache"))
    return json.loads((workspace / "data.json").read_text())
