"""One transformer for every generator: pre-norm blocks over fused attention, and its key/value cache."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from graincode.core.errors import check, check_choice
from graincode.distributed.blocks import CheckpointedBlock

Part = Callable[[int], nn.Module]
Rotation = tuple[Tensor, Tensor]
"""Cosines and sines (B, 1, L, d / 2) of the angles that queries and keys are rotated by."""


class Rotary(nn.Module):
    """Rotary positions in two dimensions: half of each head rotates with the row, half with the column.

    Coordinates are (P, 2), `head_dim` is divisible by 4, `base` is the ratio of the slowest to the fastest wavelength.
    Source: RoFormer (Su et al., 2021), eq. 15, for each axis.
    """

    def __init__(self, coordinates: Tensor, head_dim: int, base: float = 100.0) -> None:
        super().__init__()
        frequencies = base ** -torch.linspace(0, 1, head_dim // 4, dtype=torch.float64)
        angles = (coordinates.double()[:, :, None] * frequencies).flatten(1)
        self.register_buffer("cosines", angles.cos().float(), persistent=False)
        self.register_buffer("sines", angles.sin().float(), persistent=False)

    def forward(self, positions: Tensor) -> Rotation:
        """(B, L) long positions to their angles."""
        return self.cosines[positions][:, None], self.sines[positions][:, None]


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate (B, heads, L, d) queries or keys."""
    cosines, sines = (part.to(x.dtype) for part in rotation)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosines - b * sines, b * cosines + a * sines], dim=-1)


class SelfAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, dropout: float, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width // heads) for _ in range(2)) if qk_norm else None

    def forward(
        self, x: Tensor, mask: bool | Tensor, layer: int, cache: KeyValueCache | None, rotation: Rotation | None
    ) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        if self.norms is not None:
            # autocast leaves weights in float32, and the fused norm takes one type alone
            weights = [norm.weight.to(q.dtype) for norm in self.norms]
            q, k = (F.rms_norm(x, x.shape[-1:], weight) for x, weight in zip((q, k), weights, strict=True))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        seen, is_causal = mask if isinstance(mask, Tensor) else None, mask is True and cache is None
        x = F.scaled_dot_product_attention(q, k, v, seen, self.dropout if self.training else 0.0, is_causal)
        return self.out(x.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """A gated perceptron with as many parameters as one of four times the width. Source: Shazeer, 2020."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-8 * width // 3 // 8) * 8
        self.both, self.out = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


def _perceptron(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Block(CheckpointedBlock):
    """Attention and a perceptron, each with a norm before it and a skip around it."""

    def __init__(self, width: int, heads: int, dropout: float, norm: Part, mlp: Part, qk_norm: bool) -> None:
        super().__init__()
        self.norm1, self.attention = norm(width), SelfAttention(width, heads, dropout, qk_norm)
        self.norm2, self.mlp = norm(width), mlp(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, modulation: Tensor | None, *attention: Any) -> Tensor:
        """(B, L, width) to the same; further arguments are those of the attention."""
        if modulation is None:
            x = x + self.drop(self.attention(self.norm1(x), *attention))
            return x + self.drop(self.mlp(self.norm2(x)))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        y = torch.addcmul(shift1, self.norm1(x), scale1)
        x = torch.addcmul(x, self.drop(self.attention(y, *attention)), gate1)
        y = torch.addcmul(shift2, self.norm2(x), scale2)
        return torch.addcmul(x, self.drop(self.mlp(y)), gate2)


_NORMS: dict[str, Part] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
_MLPS: dict[str, Part] = {"gelu": _perceptron, "swiglu": SwiGLU}


class Transformer(nn.Module):
    """A stack of blocks and a last norm: (B, L, width) to the same.

    Args:
        layers: number of blocks; 0 leaves the norm.
        heads: attention heads; divides the width.
        dropout: in [0, 1), on attention and on each block's branches.
        causal: whether a token sees only itself and those before it.
        norm: "rms" is of Zhang & Sennrich, 2019.
        mlp: "swiglu" has as many parameters as "gelu".
        qk_norm: whether queries and keys are normalised in each head (Henry et al., 2020).
        rotary: whether they are rotated by their positions; `forward` then takes the angles.
        adaln: whether the condition shifts, scales and gates each branch; without effect at first.
        scaled_init: whether the last weights of branches start smaller, by the root of their number, as in GPT-2.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        dropout: float = 0.0,
        causal: bool = True,
        norm: Literal["layer", "rms"] = "layer",
        mlp: Literal["gelu", "swiglu"] = "gelu",
        qk_norm: bool = False,
        rotary: bool = False,
        adaln: bool = False,
        scaled_init: bool = True,
    ) -> None:
        super().__init__()
        check("width", width, "1 or more", width >= 1)
        check("heads", heads, f"a number that divides width={width}", heads >= 1 and width % heads == 0)
        fits = width // heads % 4 == 0 or not rotary
        check("heads", heads, f"width={width} / heads a multiple of 4, for rotary positions", fits)
        check("layers", layers, "0 or more", layers >= 0)
        check("dropout", dropout, "a number from 0 to below 1", 0 <= dropout < 1)
        check_choice("norm", norm, _NORMS)
        check_choice("mlp", mlp, _MLPS)
        self.causal, self.rotary, self.heads, self.head_dim = causal, rotary, heads, width // heads
        parts = width, heads, dropout, _NORMS[norm], _MLPS[mlp], qk_norm
        self.blocks = nn.ModuleList(Block(*parts) for _ in range(layers))
        self.norm = _NORMS[norm](width)
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                last = scaled_init and name.endswith(("out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.modulation = nn.Linear(width, (6 * layers + 2) * width) if adaln else None
        for parameter in self.modulation.parameters() if adaln else ():
            nn.init.zeros_(parameter)

    def modulations(self, condition: Tensor) -> list[Tensor] | None:
        """Shifts, scales and gates of a (B, width) condition: (6, B, 1, width) for each block, and (2, B, 1, width) for
        the last norm; None without `adaln`. They are the same for all tokens."""
        if self.modulation is None:
            return None
        numbers = self.modulation(F.silu(condition.to(self.modulation.weight.dtype)))
        found = rearrange(numbers, "b (n d) -> n b 1 d", d=condition.shape[1])
        around_one = torch.tensor([0, 1, 1, 0, 1, 1] * len(self.blocks) + [0, 1], device=found.device)
        return list((found + around_one[:, None, None, None]).split([6] * len(self.blocks) + [2]))

    def forward(
        self,
        x: Tensor,
        cache: KeyValueCache | None = None,
        rotation: Rotation | None = None,
        modulations: list[Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, L, width) tokens to as many states.

        Args:
            cache: of the tokens before; L is then 1.
            rotation: of the tokens' positions; needed with `rotary`.
            modulations: of the condition; needed with `adaln`.
            mask: (B, 1, 1 or L, L) bool, which tokens each may see; not with `causal`.
        """
        if cache is not None:
            mask = cache.mask
        for layer, block in enumerate(self.blocks):
            modulation = None if modulations is None else modulations[layer]
            x = block(x, modulation, self.causal if mask is None else mask, layer, cache, rotation)
        if cache is not None:
            cache.advance()
        x = self.norm(x)
        return x if modulations is None else torch.addcmul(modulations[-1][0], x, modulations[-1][1])


class KeyValueCache:
    """Keys and values of the `length` tokens so far, in buffers made once; attention sees the filled part alone.

    Attributes:
        layers: keys and values of each of the transformer's, (batch, heads, capacity, d).
        mask: which of the keys attention sees; None for all of them.
    """

    length: int | Tensor
    mask: Tensor | None = None

    def __init__(self, transformer: Transformer, batch: int, capacity: int) -> None:
        weight, shape = next(transformer.parameters()), (batch, transformer.heads, capacity, transformer.head_dim)
        self.layers = [(weight.new_empty(shape), weight.new_empty(shape)) for _ in transformer.blocks]
        self.length = 0

    def advance(self) -> None:
        """Count a token that all layers have been extended by."""
        self.length += 1

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> list[Tensor]:
        """Add one token's (B, heads, 1, d) keys and values; returns views of all so far, (B, heads, length, d)."""
        return [self._extend(store, new) for store, new in zip(self.layers[layer], (keys, values), strict=True)]

    def _extend(self, store: Tensor, new: Tensor) -> Tensor:
        store.narrow(2, self.length, 1).copy_(new)
        return store.narrow(2, 0, self.length + 1)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the sequences, (N,) long and increasing, in the same memory."""
        for store in chain(*self.layers):
            store[: len(rows), :, : self.length] = store[rows, :, : self.length]
        self.layers = [(keys[: len(rows)], values[: len(rows)]) for keys, values in self.layers]


def normalized(tokens: Tensor) -> Tensor:
    """(..., width) tokens of mean 0 and variance 1; embeddings start at std 0.02, and would drown in hidden states."""
    return F.layer_norm(tokens, tokens.shape[-1:])


def refuse_modulation(*transformers: Transformer) -> None:
    """Refuse transformers with `adaln` where there is no condition."""
    check("adaln", True, "false, as there is no condition", all(stack.modulation is None for stack in transformers))
