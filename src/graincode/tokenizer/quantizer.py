"""Vector quantisation of variable-length codes: each code counts once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core.errors import GraincodeError


@dataclass(frozen=True)
class Quantized:
    """Attributes:
    vectors: (N, D), the chosen codebook entries; gradients pass straight through to the input.
    indices: (N,) long in [0, codebook size).
    error: (N,) mean squared distance between each input and its entry, with a gradient for the input alone.
    """

    vectors: Tensor
    indices: Tensor
    error: Tensor


class EMAQuantizer(nn.Module):
    """One codebook, learned as a moving average of the vectors that choose each entry.

    The first training batch sets the codebook. In later steps, entries whose running count is below `restart_below`
    times what uniform use would give are replaced with vectors of the batch, at most `max_restarts` at once: tying the
    rule to the expected count keeps a step with few vectors from replacing most of the codebook.

    Args:
        codebook_size: number of entries V.
        code_dim: dimension D.
        decay: of the moving averages, in [0, 1).
        restart_below: share of the expected count under which an entry restarts; 0 switches restarts off.
        max_restarts: share of the codebook that one step may replace, in [0, 1].
    Raises:
        GraincodeError: a share or the decay is out of range.
    Source: VQ-VAE (van den Oord et al., 2017), appendix A; restarts after Jukebox (Dhariwal et al., 2020).
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    started: Tensor

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        decay: float = 0.95,
        restart_below: float = 0.05,
        max_restarts: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value in (("decay", decay), ("restart_below", restart_below), ("max_restarts", max_restarts)):
            if not 0 <= value <= 1 or (name == "decay" and value == 1):
                raise GraincodeError(
                    f"{name}={value}: expected 0 to 1; type for example tokenizer.quantizer.{name}=0.1"
                )
        self.decay, self.restart_below = decay, restart_below
        self.max_restarts = max(1, round(max_restarts * codebook_size))
        self.register_buffer("codebook", torch.zeros(codebook_size, code_dim))
        self.register_buffer("counts", torch.zeros(codebook_size))
        self.register_buffer("sums", torch.zeros(codebook_size, code_dim))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def forward(self, vectors: Tensor) -> Quantized:
        """Quantise (N, D) vectors; in training mode the codebook is updated afterwards."""
        with torch.autocast(vectors.device.type, enabled=False):
            return self._quantize(vectors.float())

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """(N,) long, the entry nearest to each of (N, D) vectors; nothing is updated."""
        with torch.autocast(vectors.device.type, enabled=False):
            scores = torch.addmm(self.codebook.square().sum(dim=1), vectors.float(), self.codebook.T, alpha=-2)
        return scores.argmin(dim=1)

    def _quantize(self, vectors: Tensor) -> Quantized:
        if self.training and not self.started:
            self._start(vectors.detach())
        indices = self.nearest(vectors)
        chosen = F.embedding(indices, self.codebook)
        error = (vectors - chosen).square().mean(dim=1)
        quantized = Quantized(vectors + (chosen - vectors).detach(), indices, error)
        if self.training:
            self._update(vectors.detach(), indices)
        return quantized

    def lookup(self, indices: Tensor) -> Tensor:
        """Codebook entries: (...) long to (..., D)."""
        return F.embedding(indices, self.codebook)

    @torch.no_grad()
    def _start(self, vectors: Tensor) -> None:
        size = len(self.codebook)
        self.codebook.copy_(vectors[_choose(len(vectors), size, vectors.device)])
        if len(vectors) < size:  # repeated entries must differ, or all but the first stay unused
            jitter = torch.sin(torch.arange(self.codebook.numel(), device=vectors.device) * 12.9898)
            self.codebook.add_(0.01 * vectors.std() * jitter.view_as(self.codebook))
        self.counts.fill_(len(vectors) / size)
        self.sums.copy_(self.codebook * self.counts[:, None])
        self.started.fill_(True)

    @torch.no_grad()
    def _update(self, vectors: Tensor, indices: Tensor) -> None:
        counts = torch.zeros_like(self.counts).index_add_(0, indices, torch.ones_like(vectors[:, 0]))
        sums = torch.zeros_like(self.sums).index_add_(0, indices, vectors)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        if self.restart_below > 0 and len(vectors):
            expected = self.counts.sum() / len(self.counts)
            rarest = self.counts.topk(self.max_restarts, largest=False).indices
            restart = (self.counts[rarest] < self.restart_below * expected)[:, None]
            fresh = vectors[_choose(len(vectors), self.max_restarts, vectors.device)]
            self.sums[rarest] = torch.where(restart, fresh * expected, self.sums[rarest])
            self.counts[rarest] = torch.where(restart[:, 0], expected, self.counts[rarest])
        used = self.counts > 1e-6
        self.codebook.copy_(torch.where(used[:, None], self.sums / self.counts.clamp(min=1e-6)[:, None], self.codebook))


def _choose(available: int, wanted: int, device: torch.device) -> Tensor:
    """`wanted` random indices below `available`, none twice unless there are too few.

    Random, not evenly spaced: vectors stand in raster order, and an even stride would take them from a few columns.
    """
    order = torch.randperm(available, device=device)
    return order[torch.arange(wanted, device=device) % available]
