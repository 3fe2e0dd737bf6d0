"""Quantisers built from the modules of vector-quantize-pytorch (Phil Wang), which the extra `vq` installs.

Codebooks, projections and code tables are the library's; choosing, gradients and losses are done here, for the sake of
`Quantizer`'s law. The library gives a batch's mean loss, which parts of a batch cannot share, computes some quantisers
in float32 alone, moves averages within `forward`, and refuses a cosine codebook that learns by gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core.errors import GraincodeError, check
from graincode.core.precision import products
from graincode.distributed import collectives
from graincode.tokenizer.quantizer import Quantized, Quantizer, nearest_entries, random_entries


def _library() -> Any:
    """The library, which takes seconds to import."""
    try:
        import vector_quantize_pytorch
    except ImportError:
        raise GraincodeError("vector-quantize-pytorch is missing: pip install graincode[vq]") from None
    return vector_quantize_pytorch


class _LearnedQuantizer(Quantizer):
    """A codebook that learns by gradients from the per-code loss |p - sg e|^2 + w |sg p - e|^2 (sg: no gradient),
    reported as the mean square of p - e, whatever w is."""

    def __init__(self, codebook_size: int, codebook_weight: float) -> None:
        super().__init__(codebook_size)
        check("codebook_weight", codebook_weight, "a number above 0, or the codebook never learns", codebook_weight > 0)
        self.codebook_weight = codebook_weight

    def forward(self, vectors: Tensor, keys: Tensor | None = None) -> Quantized:
        with products("float32", vectors.device.type):
            points, entries = self._points(vectors.to(self.dtype)), self._entries()
            indices = nearest_entries(points.detach(), entries.detach())
            chosen = F.embedding(indices, entries)
            weighted = chosen.detach() + self.codebook_weight * (chosen - chosen.detach())
            error = (points - weighted).square().mean(dim=1)
            return Quantized(self._vectors(points + (chosen - points).detach()), indices, error)

    def _points(self, vectors: Tensor) -> Tensor:
        """(N, D) vectors to (N, d) points in the codebook's space."""
        return vectors

    def _entries(self) -> Tensor:
        return self.library.codebook


class SimVQuantizer(_LearnedQuantizer):
    """A frozen random codebook under one learned linear map, so that every entry moves with those that are in use.

    Args:
        codebook_weight: of the codebook's term relative to the commitment's; 4 is the published 1 : 0.25.
    Source: SimVQ (Zhu et al., 2024), arXiv 2411.02038.
    """

    def __init__(self, codebook_size: int, code_dim: int, codebook_weight: float = 4.0) -> None:
        super().__init__(codebook_size, codebook_weight)
        self.library = _library().SimVQ(dim=code_dim, codebook_size=codebook_size)


class CosineQuantizer(_LearnedQuantizer):
    """A low-dimensional codebook on the unit sphere: vectors are projected to it, and the nearest entry back.

    Args:
        projected_dim: dimension of the codebook, 2 or more; without projections if it is D.
        codebook_weight: as of `SimVQuantizer`.
    Source: ViT-VQGAN (Yu et al., 2021), arXiv 2110.04627, section 3.2.
    """

    def __init__(self, codebook_size: int, code_dim: int, projected_dim: int = 8, codebook_weight: float = 4.0) -> None:
        super().__init__(codebook_size, codebook_weight)
        check("projected_dim", projected_dim, "2 or more", projected_dim >= 2)  # a line has but two directions
        self.library = _library().VectorQuantize(
            code_dim, codebook_size, codebook_dim=projected_dim, learnable_codebook=True, ema_update=False
        )

    @torch.no_grad()
    def initialize(self, vectors: Tensor, keys: Tensor | None = None) -> None:
        chosen = random_entries(self._points(vectors.to(self.dtype)), self.codebook_size, keys)
        self.library.codebook.copy_(F.normalize(chosen, dim=-1))

    def _points(self, vectors: Tensor) -> Tensor:
        return F.normalize(self.library.project_in(vectors), dim=-1)

    def _entries(self) -> Tensor:
        return F.normalize(self.library.codebook, dim=-1)

    def _vectors(self, points: Tensor) -> Tensor:
        return self.library.project_out(points)


class _ScalarQuantizer(Quantizer):
    """Codes of a few numbers that vectors are projected to."""

    @torch.no_grad()
    def initialize(self, vectors: Tensor, keys: Tensor | None = None) -> None:
        """Let the projection, if there is one, give numbers of mean 0 and variance 1, alike on all processes: else most
        vectors of an untrained encoder, whose mean is large, start with the same signs."""
        projection, vectors = self.library.project_in, vectors.to(self.dtype)
        if isinstance(projection, nn.Linear) and len(vectors) > 1:
            std, mean = torch.std_mean(projection(vectors), dim=0)
            std, mean = collectives.broadcast_(torch.stack([torch.where(std > 1e-6, std, 1.0), mean]))
            projection.weight.div_(std[:, None])
            projection.bias.sub_(mean).div_(std)

    def _vectors(self, points: Tensor) -> Tensor:
        return self.library.project_out(points)


class FSQuantizer(_ScalarQuantizer):
    """Finite scalar quantisation: a few bounded numbers, each rounded to a level; `commitment` has no effect.

    Args:
        codebook_size: number of codes V, the product of the levels.
        code_dim: dimension D of the vectors, which are projected to one number for each level, and back.
        levels: of each number, 3 or more.
    Source: FSQ (Mentzer et al., 2023), arXiv 2309.15505.
    """

    def __init__(self, codebook_size: int, code_dim: int, levels: Sequence[int]) -> None:
        super().__init__(codebook_size)
        levels, product = list(levels), math.prod(levels)
        check("levels", levels, "whole numbers of 3 or more", bool(levels) and min(levels) >= 3)
        check("levels", levels, f"the product {codebook_size}, not {product}", product == codebook_size)
        self.library = _library().FSQ(levels=levels, dim=code_dim, allowed_dtypes=(torch.float32, torch.float64))

    def forward(self, vectors: Tensor, keys: Tensor | None = None) -> Quantized:
        with products("float32", vectors.device.type):
            chosen, indices = self.library(vectors.to(self.dtype)[None])
            return Quantized(chosen[0], indices[0].long(), chosen.new_zeros(len(vectors)))

    def _entries(self) -> Tensor:
        return self.library.implicit_codebook


class LFQuantizer(_ScalarQuantizer):
    """Lookup-free quantisation: a code is the signs of log2 V numbers; entropies keep all codes in use.

    `Quantized.error` is, for each code, the mean square of x - sign(x), plus `entropy_weight` times
    H(p) - `diversity` C(p, q): the entropy of p = softmax(2 <x, codes> / temperature) falls, so that choices are clear,
    and the cross entropy to the average choice q of the updates before rises, so that they differ. The published second
    term is the entropy of the batch's average, which is no sum over codes but has the same gradient for q = average.

    Args:
        codebook_size: number of codes V, a power of two.
        code_dim: dimension D of the vectors, which are projected to log2 V numbers, and back.
        entropy_weight: of the entropies, relative to the distance.
        diversity: of the second entropy, relative to the first.
        temperature: of the probabilities p; above 0.
        decay: of the average choice, in [0, 1).
    Source: MAGVIT-v2 (Yu et al., 2023), arXiv 2310.05737, section 3.1.
    """

    def __init__(
        self, codebook_size: int, code_dim: int, entropy_weight: float = 0.1, diversity: float = 1.0,
        temperature: float = 0.1, decay: float = 0.9,
    ) -> None:  # fmt: skip
        super().__init__(codebook_size)
        bits = codebook_size.bit_length() - 1
        check("codebook_size", codebook_size, "a power of two, from 2", codebook_size == 2**bits and bits > 0)
        check("temperature", temperature, "a number above 0", temperature > 0)
        check("decay", decay, "0 to below 1", 0 <= decay < 1)
        self.entropy_weight, self.diversity, self.temperature, self.decay = (
            entropy_weight,
            diversity,
            temperature,
            decay,
        )
        self.library = _library().LFQ(dim=code_dim, codebook_size=codebook_size)
        self.register_buffer("average", torch.full((codebook_size,), 1 / codebook_size))

    def forward(self, vectors: Tensor, keys: Tensor | None = None) -> Quantized:
        with products("float32", vectors.device.type):
            points = self.library.project_in(vectors.to(self.dtype))
            indices = ((points > 0) * self.library.mask).sum(dim=-1)
            signs = F.embedding(indices, self.library.codebook)
            error, seen = (points - signs).square().mean(dim=1), ()
            if self.entropy_weight:
                logs = (points @ self.library.codebook.T * (2 / self.temperature)).log_softmax(dim=1)
                shares = logs.exp()
                entropies = (shares * (self.diversity * self.average.clamp(min=1e-5).log() - logs)).sum(dim=1)
                error = error + self.entropy_weight * entropies
                seen = (torch.cat([shares.sum(dim=0), shares.new_full((1,), len(points))]).detach(),)
            return Quantized(self._vectors(points + (signs - points).detach()), indices, error, seen)

    def _entries(self) -> Tensor:
        return self.library.codebook

    @torch.no_grad()
    def update(self, seen: Sequence[tuple[Tensor | None, ...]]) -> None:
        """Move the average choice towards that of the step."""
        if self.entropy_weight:
            shares, count = collectives.sum_(sum(part for (part,) in seen)).split([self.codebook_size, 1])
            moved = self.average.lerp(shares / count.clamp(min=1), 1 - self.decay)
            self.average.copy_(torch.where(count > 0, moved, self.average))
