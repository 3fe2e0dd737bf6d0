"""Convolutional blocks that encoder and decoder share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core.precision import products, promoted
from graincode.distributed.blocks import CheckpointedBlock


class GroupNorm(nn.GroupNorm):
    """Group norm by the kernel that takes one channel after the other, where that is faster: torch's kernel for
    channels_last takes 10 times as long on a CPU with one channel in a group, and 4 times with four."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.num_groups, promoted(self.weight, x), promoted(self.bias, x), self.eps
        if x.is_cuda or self.num_channels >= 8 * self.num_groups:
            return F.group_norm(x, *weights)
        return F.group_norm(x.contiguous(), *weights).contiguous(memory_format=torch.channels_last)


class ExactLinear(nn.Linear):
    """A linear map in the precision of its weights, whatever autocast and TF32 say."""

    def forward(self, vectors: Tensor) -> Tensor:
        with products("float32", vectors.device.type):
            return super().forward(vectors.to(self.weight.dtype))


def norm(channels: int) -> nn.GroupNorm:
    """Group norm with 32 groups, or as many as divide the channels."""
    return GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class ResBlock(CheckpointedBlock):
    """Two 3x3 convolutions, each behind norm and SiLU, around a skip: (B, C, h, w) to (B, C', h, w)."""

    def __init__(self, channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class SpatialAttention(CheckpointedBlock):
    """Single-head self-attention over all cells of a feature map, with a skip: (B, C, h, w) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv = norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.out(attended.transpose(1, 2).reshape(x.shape))


class Level(nn.Sequential):
    """The blocks of one resolution: `blocks` residual blocks, each followed by attention if it is asked for."""

    def __init__(self, channels: int, out_channels: int, blocks: int, attention: bool) -> None:
        super().__init__()
        for index in range(blocks):
            self.append(ResBlock(out_channels if index else channels, out_channels))
            if attention:
                self.append(SpatialAttention(out_channels))
