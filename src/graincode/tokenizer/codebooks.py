"""Quantisers built from the parts of vector-quantize-pytorch (Phil Wang).

Codebooks, projections and code tables are the library's; choosing, gradients and losses are done here, for the sake of
`Quantizer`'s law. The library gives a batch's mean loss, which parts of a batch cannot share (and which is NaN for no
codes), computes some quantisers in float32 alone, moves its averages within `forward`, and refuses a cosine codebook
that learns by gradients. Its defaults are written out, so that none of its versions changes a model; it is imported
by the constructors, since that takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core.errors import GraincodeError
from graincode.distributed import collectives
from graincode.tokenizer.quantizer import Quantized, Quantizer, nearest_entries, random_entries

if TYPE_CHECKING:
    from vector_quantize_pytorch import FSQ, LFQ, SimVQ, VectorQuantize


@torch.no_grad()
def _standardize(projection: nn.Module, vectors: Tensor) -> None:
    """Let a linear projection give numbers of mean 0 and variance 1 for (N, D) vectors, alike on all processes.

    Else most vectors of an untrained encoder, whose mean is large, start with the same signs, and few codes in use.
    """
    if isinstance(projection, nn.Linear) and len(vectors) > 1:
        std, mean = torch.std_mean(projection(vectors), dim=0)
        std, mean = collectives.broadcast_(torch.stack([torch.where(std > 1e-6, std, 1.0), mean]))
        projection.weight.div_(std[:, None])
        projection.bias.sub_(mean).div_(std)


class _LearnedQuantizer(Quantizer):
    """A codebook that learns by gradients from the per-code loss |p - sg e|^2 + w |sg p - e|^2 (sg: no gradient).

    The loss is reported as what it measures, the mean square of p - e, whatever w is.
    """

    def __init__(self, codebook_size: int, codebook_weight: float) -> None:
        super().__init__(codebook_size)
        if codebook_weight <= 0:
            raise GraincodeError(
                f"codebook_weight={codebook_weight}: expected above 0, or the codebook never learns; "
                "type tokenizer.quantizer.codebook_weight=4"
            )
        self.codebook_weight = codebook_weight

    def forward(self, vectors: Tensor, keys: Tensor | None = None) -> Quantized:
        """Quantise (N, D) vectors; gradients pass straight through the choice, and `keys` are not used."""
        with torch.autocast(vectors.device.type, enabled=False):
            points, entries = self._points(vectors.to(self.dtype)), self._entries()
            indices = nearest_entries(points.detach(), entries.detach())
            chosen = F.embedding(indices, entries)
            weighted = chosen.detach() + self.codebook_weight * (chosen - chosen.detach())
            error = (points - weighted).square().mean(dim=1)
            return Quantized(self._vectors(points + (chosen - points).detach()), indices, error)

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """(N,) long, the entry nearest to each of (N, D) vectors."""
        with torch.autocast(vectors.device.type, enabled=False):
            return nearest_entries(self._points(vectors.to(self.dtype)), self._entries())

    def lookup(self, indices: Tensor) -> Tensor:
        """What the decoder gets for codes: (...) long to (..., D)."""
        with torch.autocast(indices.device.type, enabled=False):
            return self._vectors(F.embedding(indices, self._entries()))

    def _points(self, vectors: Tensor) -> Tensor:
        """(N, D) vectors to (N, d) points in the codebook's space."""
        return vectors

    def _entries(self) -> Tensor:
        """(V, d), the codebook."""
        raise NotImplementedError

    def _vectors(self, points: Tensor) -> Tensor:
        """(..., d) points to (..., D) vectors."""
        return points


class SimVQuantizer(_LearnedQuantizer):
    """A frozen random codebook under one learned linear map, so that every entry moves with those that are in use.

    Args:
        codebook_size: number of entries V.
        code_dim: dimension D.
        codebook_weight: of the codebook's term relative to the commitment's; 4 is the published 1 : 0.25.
    Raises:
        GraincodeError: the weight is not positive.
    Source: SimVQ (Zhu et al., 2024), arXiv 2411.02038.
    """

    library: SimVQ

    def __init__(self, codebook_size: int, code_dim: int, codebook_weight: float = 4.0) -> None:
        super().__init__(codebook_size, codebook_weight)
        from vector_quantize_pytorch import SimVQ

        self.library = SimVQ(
            dim=code_dim, codebook_size=codebook_size, codebook_transform=None, init_fn=nn.Identity(),
            channel_first=False, rotation_trick=False, input_to_quantize_commit_loss_weight=0.25,
            commitment_weight=1.0, frozen_codebook_dim=code_dim,
        )  # fmt: skip

    def _entries(self) -> Tensor:
        return self.library.codebook


class CosineQuantizer(_LearnedQuantizer):
    """A low-dimensional codebook on the unit sphere: the entry at the smallest angle is chosen.

    Vectors are projected to few dimensions and normalised, entries are normalised, and what was chosen is projected
    back. `initialize` sets the entries to projected vectors of training images.

    Args:
        codebook_size: number of entries V.
        code_dim: dimension D of the vectors.
        projected_dim: dimension of the codebook, 2 or more; without projections if it is D.
        codebook_weight: of the codebook's term relative to the commitment's; 4 is the published 1 : 0.25.
    Raises:
        GraincodeError: the weight is not positive, or the dimension below 2.
    Source: ViT-VQGAN (Yu et al., 2021), arXiv 2110.04627, section 3.2.
    """

    library: VectorQuantize

    def __init__(self, codebook_size: int, code_dim: int, projected_dim: int = 8, codebook_weight: float = 4.0) -> None:
        super().__init__(codebook_size, codebook_weight)
        if projected_dim < 2:  # a sphere in one dimension has two points
            raise GraincodeError(
                f"projected_dim={projected_dim}: expected 2 or more; type tokenizer.quantizer.projected_dim=8"
            )
        from vector_quantize_pytorch import VectorQuantize

        self.library = VectorQuantize(
            dim=code_dim, codebook_size=codebook_size, codebook_dim=projected_dim, heads=1,
            separate_codebook_per_head=False, freeze_codebook=False, kmeans_init=False, sync_kmeans=False,
            use_cosine_sim=False, layernorm_after_project_in=False, threshold_ema_dead_code=0, channel_last=True,
            accept_image_fmap=False, accept_3d_fmap=False, commitment_weight=0.25,
            commitment_use_cross_entropy_loss=False, orthogonal_reg_weight=0.0, codebook_diversity_loss_weight=0.0,
            stochastic_sample_codes=False, straight_through=False, rotation_trick=False, directional_reparam=False,
            sync_codebook=False, ema_update=False, vq_bridge=None, manual_ema_update=False, learnable_codebook=True,
            in_place_codebook_optimizer=None, affine_param=False, sync_affine_param=False, sync_update_v=0.0,
        )  # fmt: skip

    @torch.no_grad()
    def initialize(self, vectors: Tensor, keys: Tensor | None = None) -> None:
        """Set the codebook to projections of (N, D) vectors chosen at random, N >= 1, alike on all processes."""
        chosen = random_entries(self._points(vectors.to(self.dtype)), self.codebook_size, keys)
        self.library.codebook.copy_(F.normalize(chosen, dim=-1))

    def _points(self, vectors: Tensor) -> Tensor:
        return F.normalize(self.library.project_in(vectors), dim=-1)

    def _entries(self) -> Tensor:
        return F.normalize(self.library.codebook, dim=-1)

    def _vectors(self, points: Tensor) -> Tensor:
        return self.library.project_out(points)


class FSQuantizer(Quantizer):
    """Finite scalar quantisation: a few bounded numbers, each rounded to one of its levels.

    There is no codebook to learn and no loss of its own: `Quantized.error` is 0, and `commitment` has no effect.

    Args:
        codebook_size: number of codes V, the product of the levels.
        code_dim: dimension D of the vectors, which are projected to as many numbers as there are levels, and back.
        levels: of each number, 3 or more.
    Raises:
        GraincodeError: the levels do not make V codes.
    Source: FSQ (Mentzer et al., 2023), arXiv 2309.15505.
    """

    library: FSQ

    def __init__(self, codebook_size: int, code_dim: int, levels: Sequence[int]) -> None:
        super().__init__(codebook_size)
        levels, made = list(levels), math.prod(levels)
        if not levels or min(levels) < 3:
            raise GraincodeError(
                f"levels={levels}: expected whole numbers of 3 or more; type for example "
                "tokenizer.quantizer.levels=[8,8,4] tokenizer.codebook_size=256"
            )
        if made != codebook_size:
            raise GraincodeError(
                f"levels={levels} make {made} codes, expected {codebook_size}: type tokenizer.codebook_size={made}, "
                f"or tokenizer.quantizer.levels with the product {codebook_size}"
            )
        from vector_quantize_pytorch import FSQ

        self.library = FSQ(
            levels=levels, dim=code_dim, num_codebooks=1, keep_num_codebooks_dim=False, scale=None,
            allowed_dtypes=(torch.float32, torch.float64), channel_first=False, projection_has_bias=True,
            return_indices=True, force_quantization_f32=True, preserve_symmetry=False, noise_dropout=0.0,
            bound_hard_clamp=False, orthogonal_rotation=False,
        )  # fmt: skip

    def forward(self, vectors: Tensor, keys: Tensor | None = None) -> Quantized:
        """Quantise (N, D) vectors; gradients pass straight through the rounding, and `keys` are not used."""
        with torch.autocast(vectors.device.type, enabled=False):
            made, indices = self.library(vectors.to(self.dtype)[None])
            return Quantized(made[0], indices[0].long(), made.new_zeros(len(vectors)))

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """(N,) long, the code that each of (N, D) vectors is rounded to."""
        return self(vectors).indices

    def lookup(self, indices: Tensor) -> Tensor:
        """What the decoder gets for codes: (...) long to (..., D)."""
        with torch.autocast(indices.device.type, enabled=False):
            return self.library.project_out(F.embedding(indices, self.library.implicit_codebook))

    @torch.no_grad()
    def initialize(self, vectors: Tensor, keys: Tensor | None = None) -> None:
        """Let the projection of (N, D) vectors of training images have mean 0 and variance 1, if there is one."""
        _standardize(self.library.project_in, vectors.to(self.dtype))


class LFQuantizer(Quantizer):
    """Lookup-free quantisation: a code is the signs of log2 V numbers; entropies keep all codes in use.

    `Quantized.error` is, for each code, the mean square of x - sign(x), plus `entropy_weight` times
    H(p) - `diversity` C(p, q): the entropy of p = softmax(2 <x, codes> / temperature) falls, so that choices are clear,
    and the cross entropy to the average choice q rises, so that they differ. The published second term is the entropy
    of the batch's average, which is no sum over codes. Here q runs along, from the updates before; if q were the
    batch's average, both would have the same gradient. V numbers are computed for each code in training.

    Args:
        codebook_size: number of codes V, a power of two.
        code_dim: dimension D of the vectors, which are projected to log2 V numbers, and back.
        entropy_weight: of the entropies, relative to the distance. The library's values (0.4, at a temperature of 0.01)
            outweigh pixel errors in [-1, 1].
        diversity: of the second entropy, relative to the first.
        temperature: of the probabilities p; above 0.
        decay: of the average choice, in [0, 1).
    Raises:
        GraincodeError: V is not a power of two, or a number is out of range.
    Source: MAGVIT-v2 (Yu et al., 2023), arXiv 2310.05737, section 3.1.
    """

    library: LFQ
    average: Tensor

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        temperature: float = 0.1,
        decay: float = 0.9,
    ) -> None:
        super().__init__(codebook_size)
        bits = codebook_size.bit_length() - 1
        if codebook_size < 2 or codebook_size != 2**bits:
            near = 2 ** max(1, round(math.log2(max(codebook_size, 2))))
            raise GraincodeError(
                f"codebook_size={codebook_size}: expected a power of two; type tokenizer.codebook_size={near}"
            )
        if temperature <= 0 or not 0 <= decay < 1:
            raise GraincodeError(
                f"temperature={temperature} decay={decay}: expected a temperature above 0, and a decay from 0 to below "
                "1; type tokenizer.quantizer.temperature=0.1 tokenizer.quantizer.decay=0.9"
            )
        self.entropy_weight, self.diversity, self.temperature = entropy_weight, diversity, temperature
        self.decay = decay
        from vector_quantize_pytorch import LFQ

        self.library = LFQ(
            dim=code_dim, codebook_size=codebook_size, entropy_loss_weight=0.1, commitment_loss_weight=0.25,
            diversity_gamma=1.0, straight_through_activation=nn.Identity(), num_codebooks=1,
            keep_num_codebooks_dim=False, codebook_scale=1.0, frac_per_sample_entropy=1.0,
            has_projections=code_dim != bits, projection_has_bias=True, soft_clamp_input_value=None,
            cosine_sim_project_in=False, cosine_sim_project_in_scale=None, channel_first=False,
            experimental_softplus_entropy_loss=False, entropy_loss_offset=5.0, spherical=False,
            force_quantization_f32=True, orthogonal_rotation=False,
        )  # fmt: skip
        self.register_buffer("average", torch.full((codebook_size,), 1 / codebook_size))
        # the sum of all p since the last update, and their number
        self.register_buffer("_seen", torch.zeros(codebook_size + 1), persistent=False)

    def forward(self, vectors: Tensor, keys: Tensor | None = None) -> Quantized:
        """Quantise (N, D) vectors; gradients pass straight through the signs, and `keys` are not used."""
        with torch.autocast(vectors.device.type, enabled=False):
            points = self.library.project_in(vectors.to(self.dtype))
            indices = self._indices(points)
            signs = F.embedding(indices, self.library.codebook)
            error = (points - signs).square().mean(dim=1)
            if self.entropy_weight:
                error = error + self.entropy_weight * self._entropies(points)
            made = self.library.project_out(points + (signs - points).detach())
            return Quantized(made, indices, error)

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """(N,) long, the code with the signs of each of (N, D) vectors."""
        with torch.autocast(vectors.device.type, enabled=False):
            return self._indices(self.library.project_in(vectors.to(self.dtype)))

    def lookup(self, indices: Tensor) -> Tensor:
        """What the decoder gets for codes: (...) long to (..., D)."""
        with torch.autocast(indices.device.type, enabled=False):
            return self.library.project_out(F.embedding(indices, self.library.codebook))

    @torch.no_grad()
    def initialize(self, vectors: Tensor, keys: Tensor | None = None) -> None:
        """Let the projection of (N, D) vectors of training images have mean 0 and variance 1, if there is one."""
        _standardize(self.library.project_in, vectors.to(self.dtype))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average choice by what was seen since the last update, here and by all other processes."""
        seen, count = collectives.sum_(self._seen.clone()).split([self.codebook_size, 1])
        moved = self.average.lerp(seen / count.clamp(min=1), 1 - self.decay)
        self.average.copy_(torch.where(count > 0, moved, self.average))
        self.forget()

    @torch.no_grad()
    def forget(self) -> None:
        """Drop what was seen since the last update."""
        self._seen.zero_()

    def _indices(self, points: Tensor) -> Tensor:
        return ((points > 0) * self.library.mask).sum(dim=-1)

    def _entropies(self, points: Tensor) -> Tensor:
        """(N,) from (N, log2 V)."""
        logs = (points @ self.library.codebook.T * (2 / self.temperature)).log_softmax(dim=1)
        shares = logs.exp()
        if self.training:
            with torch.no_grad():
                self._seen += torch.cat([shares.sum(dim=0), shares.new_full((1,), len(points))])
        return (shares * (self.diversity * self.average.clamp(min=1e-5).log() - logs)).sum(dim=1)
