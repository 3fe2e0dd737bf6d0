"""Where does a dual tokenizer lose against fixed-length ones, and what could its router gain?

    .venv/bin/python experiments/rate_distortion/analysis.py

On Fashion-MNIST validation images, with tokenizers of `run.py wide`. Writes analysis.md here. Cost: two minutes.

1. The error of the dual tokenizer and of the fixed-length ones in the regions that it codes coarse and fine.
2. What the codes of flat cells say: entropies, by how far the next textured cell is. A fixed-length tokenizer spends
   codes of flat cells on their textured neighbours, so its error in a region cannot be had with that region's codes.
3. The error under other routings of the same weights: among them the gain of each region measured by flipping its grain
   alone, its neighbours as they are coded, which is the most that a router of single regions can know.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from graincode.api import load_tokenizer
from graincode.core.density import region_entropy, region_gradient
from graincode.core.images import to_uint8
from graincode.data import FashionMNIST
from graincode.evaluation.pairs import structural_similarity
from graincode.files import replacing
from graincode.networks.perceptual import Lite0Distance
from graincode.tokenizer import DQVAE, Routing

sys.path.insert(0, str(Path(__file__).parents[1]))
from sweep import start

HERE, RUNS = Path(__file__).parent, Path("runs/rate_distortion/train_tokenizer")
BATCH, IMAGES = 250, 2000
SECTIONS = (
    (
        "In which regions",
        "Of the dual tokenizer of 28 codes and the fixed-length ones of 16 and 64, in the regions that the first codes "
        "coarse and fine. Its coarse regions are better than those of the model of coarse codes alone, whose codes "
        "must do for busy regions, too; its fine ones are worse than those of the model of fine codes alone. The next "
        "table says why.",
    ),
    (
        "What the codes of flat cells say",
        "Entropy of the codes of cells that are flat, and of those that are not. A tokenizer of fine codes alone "
        "spends those of flat cells, beside a textured one and even two cells away, on that neighbour. So its error in "
        "a region cannot be had with that region's codes, and the two fixed-length errors put together are a bound "
        "that no variable-length tokenizer reaches with as few codes.",
    ),
    (
        "What a better router could gain",
        "The error under other routings of the same weights, a third of the regions fine: among them the gain of each "
        "region measured by flipping its grain alone, its neighbours as they are coded, which is the most that a "
        "router of single regions can know. It takes sixteen decodes.",
    ),
)


def open_row(name: str) -> DQVAE:
    """A tokenizer of the wide table."""
    return load_tokenizer(RUNS / f"wide-{name}-0" / "export")


@torch.no_grad()
def coded(tokenizer: DQVAE, images: Tensor, grains: Tensor) -> Tensor:
    """Images of given grain maps."""
    made = []
    for part, chosen in zip(images.split(BATCH), grains.split(BATCH), strict=True):
        probe = tokenizer.probe(part)
        made.append(tokenizer.detokenize(tokenizer.codes_at(probe, Routing(chosen, torch.zeros(chosen.shape)))))
    return torch.cat(made)


def errors(images: Tensor, made: Tensor) -> Tensor:
    """(N, 4, 4) mean squared errors of regions, of pixels in [0, 1]."""
    return F.avg_pool2d(((made - images) / 2).square().mean(dim=1, keepdim=True), 8)[:, 0]


def all_at(tokenizer: DQVAE, images: Tensor, grain: int) -> Tensor:
    """Errors with all regions at one grain, on a grid of 4 x 4."""
    grid = tokenizer.layout.grids[0]
    return errors(images, coded(tokenizer, images, torch.full((len(images), *grid), grain)))


def densest(density: Tensor, share: float) -> Tensor:
    """Grain maps with so large a share of all regions fine."""
    return (density > density.flatten().quantile(1 - share)).long()


def sides(images: Tensor) -> list[str]:
    """Part 1."""
    dual, coarse, fine = (open_row(name) for name in ("dual-coding-28", "fixed-16-8x8", "fixed-64-4x4"))
    grains = torch.cat([dual.route(part).grains for part in images.split(BATCH)])
    found = {
        "dual, as routed": errors(images, coded(dual, images, grains)),
        "dual, all coarse": all_at(dual, images, 0), "dual, all fine": all_at(dual, images, 1),
        "fixed length, 16 codes": all_at(coarse, images, 0), "fixed length, 64 codes": all_at(fine, images, 0),
    }  # fmt: skip
    lines = ["| squared error | in coarse regions | in fine regions | everywhere |", "|---|---|---|---|"]
    for name, values in found.items():
        cells = (values[grains == 0], values[grains == 1], values)
        lines.append(f"| {name} | " + " | ".join(f"{cell.mean():.5f}" for cell in cells) + " |")
    both = torch.where(grains == 1, found["fixed length, 64 codes"], found["fixed length, 16 codes"]).mean()
    return [*lines, "", f"The fixed-length errors put together by the dual tokenizer's maps: {both:.5f}."]


@torch.no_grad()
def flat_cells(images: Tensor) -> list[str]:
    """Part 2."""
    flat = F.max_pool2d(images.amax(dim=1, keepdim=True), 4)[:, 0] < -0.98
    near, further = (F.max_pool2d((~flat).float()[:, None], size, 1, size // 2)[:, 0] > 0 for size in (3, 5))
    kinds = {"textured": ~flat, "flat, beside a textured one": flat & near, "flat, two away": flat & ~near & further}
    lines = ["| codes of 4 x 4 pixels | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name in ("fixed-64-4x4", "dual-coding-28"):
        tokenizer = open_row(name)
        codes = [tokenizer.tokenize(part) for part in images.split(BATCH)]
        layout = tokenizer.layout
        fine = torch.cat([layout.expand(part.grains, 0) for part in codes]) == layout.num_grains - 1
        indices, cells = torch.cat([part.indices for part in codes]), []
        for chosen in kinds.values():
            counts = torch.bincount(indices[chosen & fine], minlength=256).double()
            entropy = torch.special.entr(counts / counts.sum()).sum() / torch.tensor(2.0).log()
            cells.append(f"{entropy:.2f} bits ({int(counts.sum()):,} codes)" if counts.sum() else "none")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def flipped(tokenizer: DQVAE, images: Tensor, grains: Tensor) -> Tensor:
    """(N, 4, 4) what coding each region fine takes off the image's error, all others being as they are."""
    before, found = errors(images, coded(tokenizer, images, grains)).sum(dim=(1, 2)), torch.zeros(grains.shape)
    for row in range(4):
        for column in range(4):
            other = grains.clone()
            other[:, row, column] = 1 - other[:, row, column]
            change = before - errors(images, coded(tokenizer, images, other)).sum(dim=(1, 2))
            found[:, row, column] = torch.where(grains[:, row, column] == 0, change, -change)
    return found


def routings(images: Tensor) -> list[str]:
    """Part 3."""
    distance = Lite0Distance()
    lines = [
        "| trained with | routed by | squared error | SSIM | perceptual distance (lite0) |", "|---" * 5 + "|"
    ]  # fmt: skip
    for name in ("dual-coding-32", "dual-entropy-32"):
        tokenizer = open_row(name)
        low, high = (all_at(tokenizer, images, grain) for grain in (0, 1))
        by: dict[str, Callable[[], Tensor]] = {
            "error": lambda low=low: low,
            "gain": lambda low=low, high=high: low - high,
            "gain, flipped": lambda low=low, high=high, it=tokenizer: flipped(it, images, densest(low - high, 1 / 3)),
            "entropy": lambda: region_entropy(images, (8, 8)),
            "gradient": lambda: region_gradient(images, (8, 8)),
        }
        for kind, density in by.items():
            made = coded(tokenizer, images, densest(density(), 1 / 3))
            pair = to_uint8(made), to_uint8(images)
            metrics = errors(images, made).mean(), structural_similarity(*pair).mean(), distance(*pair).mean()
            lines.append(f"| {name} | {kind} | {metrics[0]:.5f} | {metrics[1]:.4f} | {metrics[2]:.4f} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    """All three parts."""
    start()
    images = FashionMNIST().split("val")[range(IMAGES)].images
    lines = [f"# Where a dual tokenizer loses\n\nOn the first {IMAGES:,} validation images; one seed.", ""]
    for (title, about), part in zip(SECTIONS, (sides, flat_cells, lambda all_: routings(all_[:1000])), strict=True):
        lines += [f"## {title}", "", about, "", *part(images), ""]
    with replacing(HERE / "analysis.md") as partial:
        partial.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
