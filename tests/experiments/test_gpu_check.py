"""What a GPU is checked for, rehearsed on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "experiments/gpu/check.py"


@pytest.mark.slow
def test_the_checks_of_a_gpu_can_be_rehearsed_on_a_cpu(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found = json.loads((tmp_path / "check.json").read_text())
    assert (found["device"], found["quick"]) == ("a CPU", True)
    lines = {line["name"]: line for line in found["lines"]}
    wanted = [
        "ceilings", "numbers", "codes in float64", "samples, masked, guidance 1.5", "training, gan", "waits, masked",
        "step, ar, eager", "step, tokenizer, eager, kernels", "decode, modern, bfloat16, batch 2",
        "masked samples, bfloat16", "job evaluate", "training, gan, compiled",
    ]  # fmt: skip
    assert not [name for name in wanted if name not in lines]
    assert not any("left out" in line["text"] for line in found["lines"])
    assert lines["decode, gpt, bfloat16, compiled, batch 2"]["values"]["codes_per_second"] > 0
    assert (tmp_path / "check.md").read_text().count("\n") == len(lines) + 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_rehearsal_is_named():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device; --device cpu --quick rehearses" in done.stderr
