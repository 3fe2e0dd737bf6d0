"""One transformer for every generator: pre-norm blocks over fused attention, and its key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from graincode.core.constants import constant
from graincode.core.errors import check, check_choice
from graincode.core.precision import promoted
from graincode.distributed.blocks import CheckpointedBlock

Part = Callable[[int], nn.Module]
Rotation = tuple[Tensor, Tensor]
"""Cosines and sines (B, 1, L, d) of the angles that queries and keys are rotated by, each angle twice: for both halves
of a head, whose sines have opposite signs."""


class Rotary(nn.Module):
    """Rotary positions in two dimensions: half of each head rotates with the row, half with the column.

    Coordinates are (P, 2), `head_dim` is divisible by 4, `base` is the ratio of the slowest to the fastest wavelength.
    Source: RoFormer (Su et al., 2021), eq. 15, for each axis.
    """

    def __init__(self, coordinates: Tensor, head_dim: int, base: float = 100.0) -> None:
        super().__init__()
        frequencies = base ** -torch.linspace(0, 1, head_dim // 4, dtype=torch.float64)
        angles = (coordinates.double()[:, :, None] * frequencies).flatten(1)
        cosines, sines = angles.cos().float(), angles.sin().float()
        self.register_buffer("cosines", torch.cat([cosines, cosines], dim=1), persistent=False)
        self.register_buffer("sines", torch.cat([-sines, sines], dim=1), persistent=False)

    def forward(self, positions: Tensor) -> Rotation:
        """(B, L) long positions to their angles."""
        return self.cosines[positions][:, None], self.sines[positions][:, None]


def rotate(x: Tensor, rotation: Rotation, out: Tensor | None = None) -> Tensor:
    """Rotate (2, B, heads, L, d) queries and keys, into `out` if there is one."""
    cosines, sines = (part.to(x.dtype) for part in rotation)
    exchanged = torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)
    if out is None:  # in two steps, as runs have been trained; one step rounds otherwise
        return x * cosines + exchanged * sines
    return torch.addcmul(x * cosines, exchanged, sines, out=out)


class SelfAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, dropout: float, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width // heads) for _ in range(2)) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        seen: bool | Tensor | Places,
        layer: int,
        cache: KeyValueCache | None,
        rotation: Rotation | None,
    ) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.norms is not None:
            # autocast leaves weights in float32, and the fused norm takes one type alone
            q, k = (
                F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype))
                for x, norm in zip(qkv[:2], self.norms, strict=True)
            )
            qkv = torch.stack([q, k, qkv[2]])
        q, k, v = qkv
        if rotation is not None:
            q, k = rotate(qkv[:2], rotation, None if cache is None else qkv[:2])
        if cache is not None:
            x = cache.attend(layer, q, qkv[1:], seen)
        else:
            mask, is_causal = seen if isinstance(seen, Tensor) else None, seen is True
            x = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0, is_causal)
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


class LayerNorm(nn.LayerNorm):
    """torch's, for weights in bf16, as sharded ones are in a pass, of float32 tokens too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, promoted(self.weight, x), promoted(self.bias, x), self.eps)


class RMSNorm(nn.RMSNorm):
    """Likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, promoted(self.weight, x), self.eps)


_NORMS: dict[str, Part] = {"layer": LayerNorm, "rms": RMSNorm}
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
        around_one = constant((0, 1, 1, 0, 1, 1) * len(self.blocks) + (0, 1), torch.long, found.device)
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
            cache: of the tokens before, which has reached these; L is then 1.
            rotation: of the tokens' positions; needed with `rotary`.
            modulations: of the condition; needed with `adaln`.
            mask: (B, 1, 1 or L, L) bool, which tokens each may see; not with `causal`.
        """
        seen = cache.places() if cache is not None else self.causal if mask is None else mask
        for layer, block in enumerate(self.blocks):
            modulation = None if modulations is None else modulations[layer]
            x = block(x, modulation, seen, layer, cache, rotation)
        if cache is not None:
            cache.advance()
        x = self.norm(x)
        return x if modulations is None else torch.addcmul(modulations[-1][0], x, modulations[-1][1])


class Places(NamedTuple):
    """Where the next token of each row goes, and which keys it sees.

    Attributes:
        at: (batch,) long positions; the one position of all rows where they have one.
        mask: (batch, 1, 1, seen), 0 or -inf for each key; None where all rows see all of them.
    """

    at: Tensor | int
    mask: Tensor | None


class KeyValueCache:
    """Keys and values of sequences in buffers made once: a row for each, at a position of its own.

    Attention sees `seen` keys of every row, up to the longest row's last, under a mask where rows differ. For each
    token: `reach`, which counts on the CPU; then, in code that may be compiled, `places`, `attend` in each layer, and
    `advance`.

    Args:
        batch, capacity: number of rows, and of tokens that each has room for.
        lengths: ascending, the only ones that `seen` may have, and all rows are masked; without them, any.
    Attributes:
        layers: keys and values of each of the transformer's, (2, batch, heads, capacity, d).
        positions: (batch,) long, of each row's next token; a full row stays at its last.
    """

    def __init__(self, transformer: Transformer, batch: int, capacity: int, lengths: Sequence[int] = ()) -> None:
        weight, self.lengths, self.capacity = next(transformer.parameters()), lengths, capacity
        shape = 2, batch, transformer.heads, max(capacity, *lengths, 0), transformer.head_dim
        # zeros, as what is masked is multiplied by 0, and must be finite
        self.layers = [weight.new_zeros(shape) for _ in transformer.blocks]
        self.positions = torch.zeros(batch, dtype=torch.long, device=weight.device)
        self.columns = torch.arange(shape[3], device=weight.device)
        self.rows = torch.arange(batch, device=weight.device)
        self.seen, self._lengths = 0, np.zeros(batch, dtype=np.int64)

    def restart(self, rows: Tensor | None = None) -> None:
        """Forget the tokens of some rows, (n,) long on the CPU, or of all."""
        self._lengths[slice(None) if rows is None else rows.numpy()] = 0
        self.positions[slice(None) if rows is None else rows.to(self.positions.device)] = 0

    def reach(self) -> None:
        """Let attention see each row's next token."""
        np.minimum(self._lengths + 1, self.capacity, out=self._lengths)
        longest = int(self._lengths.max())
        self.seen = next((length for length in self.lengths if length >= longest), longest)
        self._alike = not self.lengths and bool((self._lengths == self._lengths[0]).all())

    def places(self) -> Places:
        """Of the token that is reached."""
        if self._alike or not self.layers:
            return Places(self.seen - 1, None)
        hidden = self.columns[: self.seen] > self.positions[:, None]
        mask = torch.zeros_like(hidden, dtype=self.layers[0].dtype)
        return Places(self.positions, mask.masked_fill_(hidden, -torch.inf)[:, None, None])

    def attend(self, layer: int, queries: Tensor, new: Tensor, places: Places) -> Tensor:
        """Add one token's keys and values, (2, batch, heads, 1, d); returns what (batch, heads, 1, d) queries find."""
        store = self.layers[layer]
        if isinstance(places.at, int):
            store.narrow(3, places.at, 1).copy_(new)
        else:
            store[:, self.rows, :, places.at] = new[:, :, :, 0].transpose(0, 1)
        keys, values = store.narrow(3, 0, self.seen)
        return F.scaled_dot_product_attention(queries, keys, values, places.mask)

    def advance(self) -> None:
        """Count a token that all layers have been extended by."""
        self.positions.add_(1).clamp_(max=self.capacity - 1)


def normalized(tokens: Tensor) -> Tensor:
    """(..., width) tokens of mean 0 and variance 1; embeddings start at std 0.02, and would drown in hidden states."""
    return F.layer_norm(tokens, tokens.shape[-1:])


def refuse_modulation(*transformers: Transformer) -> None:
    """Refuse transformers with `adaln` where there is no condition."""
    check("adaln", True, "false, as there is no condition", all(stack.modulation is None for stack in transformers))
