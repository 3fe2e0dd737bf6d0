"""One training step of our quantiser against the library's, and against the one product that neither can avoid."""

from __future__ import annotations

import torch
from timing import Result, paired
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from graincode.tokenizer import EMAQuantizer

COUNT, SIZE, DIM, REPEATS = 4096, 1024, 256, 60


def _inputs() -> tuple[EMAQuantizer, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(COUNT, DIM, generator=generator)
    quantizer = EMAQuantizer(SIZE, DIM)
    quantizer.initialize(vectors)
    return quantizer, vectors.requires_grad_(), torch.rand(COUNT, generator=generator).double()


def against_library() -> Result:
    """Forward and update of 4096 vectors, 1024 x 256, with restarts; the library's averages are without restarts."""
    ours, vectors, keys = _inputs()
    theirs = VectorQuantize(
        dim=DIM, codebook_size=SIZE, decay=0.95, kmeans_init=False, threshold_ema_dead_code=0,
        commitment_weight=0.25, rotation_trick=False, sync_codebook=False,
    )  # fmt: skip
    seconds, ratio = paired(lambda: ours.update([ours(vectors, keys).seen]), lambda: theirs(vectors[None]), REPEATS)
    return Result("quantiser, a step", 1000 * seconds, "ms", "vector-quantize-pytorch's", ratio, ">= 2")


def against_product() -> Result:
    """The same step against the product of vectors and codebook and the reading of its smallest entries."""
    ours, vectors, keys = _inputs()
    plain, entries = vectors.detach(), ours.codebook.clone()
    seconds, ratio = paired(
        lambda: ours.update([ours(vectors, keys).seen]), lambda: (plain @ entries.T).argmin(dim=1), REPEATS
    )
    return Result("quantiser, its product", 1000 * seconds, "ms", "its distance product and argmin", ratio, ">= 0.67")
