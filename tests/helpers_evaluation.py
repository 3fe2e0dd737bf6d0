"""A network whose features are known beforehand, and what else tests of metrics share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import get_data_path
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageFilter
from torch import Tensor, nn

from graincode.core.errors import GraincodeError
from graincode.evaluation.estimate import Estimate
from graincode.evaluation.statistics import SUBSET, Statistics, measure
from graincode.networks.features import FeatureNetwork, Loaded


class Rows(nn.Module):
    """Gives the rows of three tables whose numbers the first pixels of images spell."""

    def __init__(self, features: Tensor, logits: Tensor, spatial: Tensor) -> None:
        super().__init__()
        self.features, self.logits, self.spatial, self.seen = features, logits, spatial, 0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.seen += len(images)
        rows = images[:, :, 0, 0].long() @ torch.tensor([1, 256, 65536])
        return self.features[rows], self.logits[rows], self.spatial[rows]


class LookedUp(FeatureNetwork):
    """Features, logits and spatial features of the image with number i are row i of these tables."""

    def __init__(
        self,
        features: Tensor,
        logits: Tensor | None = None,
        batch_size: int = 16,
        weights_hash: str = "0" * 64,
        spatial: Tensor | None = None,
    ) -> None:
        super().__init__("table", batch_size)
        self.rows = Rows(features, *(features[:, :0] if one is None else one for one in (logits, spatial)))
        self.hash = weights_hash

    def _load(self, size: object = None) -> Loaded:
        sizes = [table.shape[1] for table in (self.rows.features, self.rows.logits, self.rows.spatial)]
        return Loaded(self.rows, self.hash, *sizes, "rows of tables")


def numbered(count: int, first: int = 0, size: int = 1) -> Tensor:
    """Images that `LookedUp` knows by their number."""
    numbers = torch.arange(first, first + count)
    pixels = torch.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], 1)
    return pixels.to(torch.uint8)[:, :, None, None].repeat(1, 1, size, size)


def statistics_of(
    features: Tensor,
    logits: Tensor | None = None,
    splits: int = 0,
    seed: int = 0,
    subset: int = SUBSET,
    weights_hash: str = "0" * 64,
) -> Statistics:
    """Statistics of images that have these features and logits."""
    network, count = LookedUp(features, logits, weights_hash=weights_hash), len(features)
    return measure({"it": network}, [numbered(count)], count, splits=splits, seed=seed, subset=subset)["it"]


def drawn(count: int, dimension: int = 8, seed: int = 0, shift: float = 0.0) -> Tensor:
    """Standard normal numbers, moved."""
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed)) + shift


def photographs(side: int = 64, step: int = 32) -> Tensor:
    """Square parts of a photograph."""
    with Image.open(get_data_path() + "/sample_data/grace_hopper.jpg") as photograph:
        windows = sliding_window_view(np.asarray(photograph), (side, side), (0, 1))[::step, ::step]
    return torch.from_numpy(windows.reshape(-1, 3, side, side).copy())


def each(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    changed = [np.asarray(change(Image.fromarray(image.permute(1, 2, 0).numpy()))) for image in images]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2)


def blurred(images: Tensor, radius: float) -> Tensor:
    return each(images, lambda image: image.filter(ImageFilter.GaussianBlur(radius)))


def noisy(images: Tensor, deviation: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * deviation
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def values_of(found: dict[str, Estimate]) -> dict[str, float]:
    return {name: estimate.value for name, estimate in found.items()}


def message_of(error: pytest.ExceptionInfo[GraincodeError]) -> str:
    """The message, which is one line."""
    message = str(error.value)
    assert "\n" not in message
    return message


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
