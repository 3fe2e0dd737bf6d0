"""Entropy of regions, against the same written out over pixels times bins."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from timing import Result, paired
from torch import Tensor

from graincode.core.density import grey, region_entropy

SIGMAS, REGION, BINS = (0.01, 0.03, 0.065, 0.1), (16, 16), 32


def written_out(images: Tensor, region: tuple[int, int], bins: int, sigma: float) -> Tensor:
    """The same in float32 as published code of this kind does it: every pixel's weight at every bin."""
    pixels = rearrange(grey(images), "b (h i) (w j) -> b h w (i j)", i=region[0], j=region[1])
    residuals = pixels[..., None] - torch.linspace(-1, 1, bins)
    histogram = torch.exp(-0.5 * (residuals / sigma) ** 2).mean(dim=-2)
    return torch.special.entr(histogram / histogram.sum(dim=-1, keepdim=True)).sum(dim=-1)


def pictures() -> Tensor:
    """16 images of 256x256."""
    return torch.rand(16, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1


def entropy_time(sigma: float) -> Result:
    """Of 16 images of 256x256, in regions of 16x16."""
    images = pictures()
    ways = [partial(way, images, REGION, BINS, sigma) for way in (region_entropy, written_out)]
    torch.testing.assert_close(*(way() for way in ways), rtol=0, atol=1e-4)
    seconds, ratio = paired(*ways, 9)
    goal = ">= 30" if sigma == SIGMAS[0] else ""
    return Result(f"entropy, sigma {sigma}", seconds * 1e3, "ms / 16 images", "pixels x bins", ratio, goal)


def entropy_memory() -> Result:
    """What the process grows by at its peak, in a fresh process for each way."""
    ours, reference = (
        int(subprocess.run([sys.executable, __file__, way], check=True, capture_output=True, text=True).stdout)
        for way in ("region_entropy", "written_out")
    )
    return Result("entropy, memory", ours / 2**20, "MiB", f"pixels x bins: {reference / 2**20:.0f} MiB",
                  reference / ours, ">= 10")  # fmt: skip


def _status(field: str) -> int:
    """Bytes that Linux tells of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _grown(way: str) -> int:
    """Bytes that the process has at the peak of a call, beyond those before; a first, small call loads code."""
    torch.set_num_threads(1)
    call, images = globals()[way], pictures()
    call(images[:1, :, :32, :32], REGION, BINS, SIGMAS[0])
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = _status("VmRSS")
    call(images, REGION, BINS, SIGMAS[0])
    return _status("VmHWM") - before


if __name__ == "__main__":
    print(_grown(sys.argv[1]))
