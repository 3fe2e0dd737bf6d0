"""One transformer for every generator: pre-norm blocks over fused attention, with a static key/value cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from graincode.core.errors import GraincodeError
from graincode.recompute import Recomputable


class KeyValueCache:
    """Keys and values of the tokens so far, in one buffer made once; attention sees the filled part alone.

    Args:
        transformer: whose layers are cached.
        batch: number of sequences.
        capacity: tokens of the longest sequence.
    """

    def __init__(self, transformer: Transformer, batch: int, capacity: int) -> None:
        weight = transformer.blocks[0].attention.qkv.weight
        heads = transformer.blocks[0].attention.heads
        shape = (len(transformer.blocks), 2, batch, heads, capacity, weight.shape[1] // heads)
        self.store = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.length = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token's (B, heads, 1, d) keys and values, and give views of all so far, (B, heads, length, d)."""
        self.store[layer, 0, :, :, self.length] = keys[:, :, 0]
        self.store[layer, 1, :, :, self.length] = values[:, :, 0]
        filled = self.store[layer, :, :, :, : self.length + 1]
        return filled[0], filled[1]


class SelfAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool, layer: int, cache: KeyValueCache | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.heads)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal and cache is None)
        return self.out(rearrange(x, "b h l d -> b l (h d)"))


class Block(Recomputable):
    """Attention and a two-layer perceptron, each behind a layer norm and around a skip."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), SelfAttention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, causal: bool, layer: int, cache: KeyValueCache | None) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), causal, layer, cache))
        return x + self.drop(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """A stack of blocks and a last norm: (B, L, width) to the same.

    Args:
        width: of each token.
        layers: number of blocks.
        heads: attention heads; divides the width.
        dropout: in [0, 1), on attention and on each block's branches.
        causal: whether a token sees only itself and those before it.
    Raises:
        GraincodeError: the heads do not divide the width.
    """

    def __init__(self, width: int, layers: int, heads: int, dropout: float = 0.0, causal: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise GraincodeError(
                f"a width of {width} has no {heads} equal heads: type generator.size.heads that divides it"
            )
        self.causal = causal
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "mlp.2.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5)
            elif name.endswith("weight") and parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """All tokens at once; or, with a cache, one token (B, 1, width) behind those that it holds."""
        for layer, block in enumerate(self.blocks):
            x = block(x, self.causal, layer, cache)
        if cache is not None:
            cache.length += 1
        return self.norm(x)
