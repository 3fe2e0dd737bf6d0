"""Vector quantisation of variable-length codes: each code counts once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core.errors import GraincodeError, check, check_choice
from graincode.core.precision import products
from graincode.distributed import collectives

Start = Literal["vectors", "uniform"]


@dataclass(frozen=True)
class Quantized:
    """N quantised vectors, and what comes with them.

    Attributes:
        vectors: (N, D), the chosen codebook entries; gradients pass straight through to the input.
        indices: (N,) long in [0, codebook size).
        error: (N,) what each code adds to the loss, with weight `commitment`: the mean squared distance between an
            input and its entry, unless the quantiser says otherwise.
        seen: what `Quantizer.update` learns from, without gradients.
    """

    vectors: Tensor
    indices: Tensor
    error: Tensor
    seen: tuple[Tensor | None, ...] = ()

    def detach(self) -> Quantized:
        """The same without gradients."""
        return Quantized(self.vectors.detach(), self.indices, self.error.detach(), self.seen)


class Quantizer(nn.Module):
    """What every quantiser offers: `forward` in training, `nearest` and `lookup` to encode and decode.

    No result depends on how a batch is divided over micro-batches and processes: gradients are of a sum over codes, and
    what is learned otherwise moves in `update` alone, by what all of them have seen.

    Args:
        codebook_size: number of entries V; `code_dim` of each quantiser is the dimension D of the vectors.
    """

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes, in full, whatever autocast and TF32 say."""
        return next(buffer.dtype for buffer in self.buffers() if buffer.is_floating_point())

    def forward(self, vectors: Tensor, keys: Tensor | None = None) -> Quantized:
        """Quantise (N, D) vectors, N >= 0; `keys` are (N,) random numbers for quantisers that choose among them."""
        raise NotImplementedError

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """(N,) long, the indices that `forward` chooses for (N, D) vectors."""
        return self(vectors).indices

    def lookup(self, indices: Tensor) -> Tensor:
        """What the decoder gets for codes: (...) long to (..., D)."""
        with products("float32", indices.device.type):
            return self._vectors(F.embedding(indices, self._entries()))

    @torch.no_grad()
    def check_dimension(self, expected: int) -> None:
        """Raise GraincodeError unless vectors have as many numbers as expected, where entries of our own tell."""
        if type(self).lookup is Quantizer.lookup:
            found = self._vectors(self._entries()[:1]).shape[-1]
            check("code_dim", found, f"{expected}, as of the vectors that are quantised", found == expected)

    def _entries(self) -> Tensor:
        """(V, d), the codebook."""
        return self.codebook

    def _vectors(self, points: Tensor) -> Tensor:
        """(..., d) entries to (..., D) vectors."""
        return points

    @torch.no_grad()
    def initialize(self, vectors: Tensor, keys: Tensor | None = None) -> None:
        """Start from (N, D) vectors of training images, N >= 1, if the quantiser does; alike on all processes."""

    @torch.no_grad()
    def update(self, seen: Sequence[tuple[Tensor | None, ...]]) -> None:
        """Once per optimizer step: learn from what its micro-batches, here and on other processes, have `seen`."""


def nearest_entries(vectors: Tensor, entries: Tensor) -> Tensor:
    """(N,) long, the one of (V, D) entries that is nearest to each of (N, D) vectors."""
    return torch.addmm(entries.square().sum(dim=1), vectors, entries.T, alpha=-2).argmin(dim=1)


def random_entries(vectors: Tensor, size: int, keys: Tensor | None) -> Tensor:
    """(size, D), those of (N, D) vectors with the smallest of (N,) random keys; process 0's on all processes."""
    order = (torch.rand(len(vectors), device=vectors.device) if keys is None else keys).argsort(stable=True)
    chosen = vectors[order[torch.arange(size, device=order.device) % len(order)]]
    if len(vectors) < size:  # repeated entries must differ, or all but the first stay unused
        jitter = torch.sin(torch.arange(chosen.numel(), device=chosen.device) * 12.9898)
        chosen = chosen + 0.01 * vectors.std() * jitter.view_as(chosen)
    return collectives.broadcast_(chosen.contiguous())


class EMAQuantizer(Quantizer):
    """One codebook, learned as a moving average of the vectors that choose each entry.

    Entries whose running count is below `restart_below` times what uniform use would give are replaced with vectors of
    the batch, at most `max_restarts` at once.

    Args:
        decay: of the moving averages, in [0, 1).
        restart_below: share of the expected count under which an entry restarts, in [0, 1]; 0 switches restarts off.
        max_restarts: share of the codebook that one step may replace, in [0, 1]: none at 0, else one at least.
        unit: compare directions: vectors, and entries where they are used, are scaled to length 1.
        start: from "vectors" of training images, or numbers that are "uniform" on +-1 / V (published).
    Source: VQ-VAE (van den Oord et al., 2017), appendix A; restarts after Jukebox (Dhariwal et al., 2020).
    """

    def __init__(
        self, codebook_size: int, code_dim: int, decay: float = 0.95, restart_below: float = 0.05,
        max_restarts: float = 0.1, unit: bool = False, start: Start = "vectors",
    ) -> None:  # fmt: skip
        super().__init__(codebook_size)
        check_choice("start", start, Start)
        check("decay", decay, "0 to below 1", 0 <= decay < 1)
        check("restart_below", restart_below, "0 to 1", 0 <= restart_below <= 1)
        check("max_restarts", max_restarts, "0 to 1", 0 <= max_restarts <= 1)
        self.decay, self.restart_below, self.unit, self.start = decay, restart_below, unit, start
        self.max_restarts = max(int(max_restarts > 0), round(max_restarts * codebook_size))
        self.register_buffer("codebook", torch.zeros(codebook_size, code_dim))
        self.register_buffer("counts", torch.zeros(codebook_size))
        self.register_buffer("sums", torch.zeros(codebook_size, code_dim))
        self._started = False

    def forward(self, vectors: Tensor, keys: Tensor | None = None) -> Quantized:
        """As any quantiser; `keys` decide which vectors entries restart at, and are drawn if not given."""
        if self.training and not self._started:
            self._started = bool(self.counts.any())  # weights may have been loaded
            if not self._started:
                raise GraincodeError("the codebook is empty: call initialize(vectors of training images) first")
        with products("float32", vectors.device.type):
            vectors, entries = self._scaled(vectors.to(self.codebook.dtype)), self._entries()
            indices = nearest_entries(vectors.detach(), entries)
            chosen = F.embedding(indices, entries)
            error = (vectors - chosen).square().mean(dim=1)
            seen = (vectors.detach(), indices, keys)
            return Quantized(vectors + (chosen - vectors).detach(), indices, error, seen)

    def _entries(self) -> Tensor:
        return self._scaled(self.codebook)

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.unit else vectors

    @torch.no_grad()
    def initialize(self, vectors: Tensor, keys: Tensor | None = None) -> None:
        """Set the codebook to vectors chosen at random, or to small random numbers."""
        if self.start == "vectors":
            entries = random_entries(self._scaled(vectors.to(self.codebook.dtype)), self.codebook_size, keys)
            self.counts.fill_(len(vectors) / self.codebook_size)
        else:  # with hardly a count, what the first steps do not choose restarts
            entries = collectives.broadcast_((2 * torch.rand_like(self.codebook) - 1) / self.codebook_size)
            self.counts.fill_(1e-9)
        self.codebook.copy_(entries)
        self.sums.copy_(self.codebook * self.counts[:, None])

    @torch.no_grad()
    def update(self, seen: Sequence[tuple[Tensor | None, ...]]) -> Tensor:
        """Move the codebook; returns the () share of its entries that restart."""
        counts, sums = torch.zeros_like(self.counts), torch.zeros_like(self.sums)
        fresh = sums.new_zeros(self.max_restarts, sums.shape[1])
        smallest = torch.full((self.max_restarts,), torch.inf, dtype=torch.float64, device=sums.device)
        for vectors, indices, keys in seen:
            counts.index_add_(0, indices, torch.ones_like(vectors[:, 0]))
            sums.index_add_(0, indices, vectors)
            # the vectors with the smallest keys are a random choice that does not depend on how a batch is divided
            keys = torch.rand(len(vectors), device=vectors.device).double() if keys is None else keys
            own = keys.topk(min(self.max_restarts, len(keys)), largest=False).indices
            smallest, order = torch.cat([smallest, keys[own]]).topk(self.max_restarts, largest=False, sorted=True)
            fresh = torch.cat([fresh, vectors[own]])[order]
        both = collectives.sum_(torch.cat([counts[:, None], sums], dim=1))
        keys, fresh = (collectives.gather_rows(part, equal=True) for part in (smallest, fresh))
        first = keys.argsort(stable=True)[: self.max_restarts]
        keys, fresh = keys[first], fresh[first]
        self.counts.lerp_(both[:, 0], 1 - self.decay)
        self.sums.lerp_(both[:, 1:], 1 - self.decay)
        expected = self.counts.sum() / len(self.counts)
        rarest = self.counts.topk(self.max_restarts, largest=False).indices
        restart = (self.counts[rarest] < self.restart_below * expected) & keys.isfinite()
        self.sums[rarest] = torch.where(restart[:, None], fresh * expected, self.sums[rarest])
        self.counts[rarest] = torch.where(restart, expected, self.counts[rarest])
        counts = self.counts[:, None]
        self.codebook.copy_(torch.where(counts > 1e-6, self.sums / counts.clamp(min=1e-6), self.codebook))
        return restart.sum() / len(self.counts)
