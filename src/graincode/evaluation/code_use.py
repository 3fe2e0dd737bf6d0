"""How many codes images take, and which."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graincode.core.codes import GrainCodes
from graincode.core.layout import CodeLayout
from graincode.distributed import collectives
from graincode.evaluation.estimate import Estimate, mean_of


class CodeMetrics:
    """Lengths of codes of one layout and use of codebooks; the grouping into batches does not change a bit of it."""

    def __init__(self, layout: CodeLayout) -> None:
        self._layout = layout
        self._entries = torch.zeros(layout.num_grains, layout.codebook_size, dtype=torch.long)
        self._grains = torch.zeros(layout.num_grains, *layout.grids[0], dtype=torch.long)
        self._lengths: list[Tensor] = []

    def update(self, codes: GrainCodes) -> None:
        """Add the codes of some images."""
        layout, first = self._layout, codes.first_cells
        entries = layout.expand(codes.grains, 0)[first] * layout.codebook_size + codes.indices[first]
        self._entries += torch.bincount(entries, minlength=self._entries.numel()).view_as(self._entries).cpu()
        self._grains += torch.stack([(codes.grains == g).sum(dim=0) for g in range(layout.num_grains)]).cpu()
        self._lengths.append(codes.lengths.cpu())

    def metrics(self) -> dict[str, Estimate]:
        """Over the codes of all processes so far; each of them must ask.

        `codebook_usage` and `codebook_perplexity` are of all codebooks together, with `_g` of the codes of grain g.
        `grain_map_bits` is what the grain map costs an ideal coder that knows how often each region has each grain;
        `bits_per_image` adds log2 of the codebook's size for each code.
        """
        layout, entries = self._layout, collectives.sum_(self._entries.clone())
        length, grains = mean_of(self._lengths), collectives.sum_(self._grains.clone()).double()
        map_bits = torch.special.entr(grains / grains.sum(dim=0)).sum().item() / math.log(2)
        usage, perplexity = codebook_use(entries.flatten() if layout.num_codebooks > 1 else entries.sum(dim=0))
        found = {
            "codebook_usage": Estimate(usage),
            "codebook_perplexity": Estimate(perplexity),
            "codes_per_image": length,
            "grain_map_bits": Estimate(map_bits),
            "bits_per_image": Estimate(length.value * math.log2(layout.codebook_size) + map_bits),
        }
        for g, counts in enumerate(entries if layout.num_grains > 1 else ()):
            if bool(counts.any()):
                both = map(Estimate, codebook_use(counts))
                found[f"codebook_usage_{g}"], found[f"codebook_perplexity_{g}"] = both
        return found


def codebook_use(counts: Tensor) -> tuple[float, float]:
    """The share of a codebook's entries that are used, in (0, 1], and exp of their frequencies' entropy, in [1, size].

    `counts`, (size,) long, says how often each entry is used.
    """
    frequencies = counts[counts > 0].double() / counts.sum()
    return len(frequencies) / len(counts), math.exp(torch.special.entr(frequencies).sum().item())
