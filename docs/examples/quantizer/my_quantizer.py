"""A quantizer with a codebook that never moves: the encoder learns to hit it."""

import torch
from torch import Tensor

from graincode.export import register
from graincode.tokenizer import Quantized, Quantizer


class FrozenQuantizer(Quantizer):
    """A codebook of random vectors; vectors are quantised to the nearest one."""

    codebook: Tensor

    def __init__(self, codebook_size: int, code_dim: int, seed: int = 0) -> None:
        super().__init__(codebook_size)
        rng = torch.Generator().manual_seed(seed)
        self.register_buffer("codebook", torch.randn(codebook_size, code_dim, generator=rng))

    def forward(self, vectors: Tensor, keys: Tensor | None = None) -> Quantized:
        indices = self.nearest(vectors)
        entries = self.lookup(indices)
        error = (vectors - entries).square().mean(dim=1)
        return Quantized(vectors + (entries - vectors).detach(), indices, error)  # gradients pass straight through

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        return torch.cdist(vectors.float(), self.codebook).argmin(dim=1)

    def lookup(self, indices: Tensor) -> Tensor:
        return self.codebook[indices]


register("my_quantizer.FrozenQuantizer", FrozenQuantizer)
