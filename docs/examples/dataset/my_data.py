"""A data set that needs no files: discs and squares of random size, place and colour."""

from dataclasses import dataclass

import torch
from torch import Tensor

from graincode.data.images import SPLITS, ImageDataset, TensorImages


@dataclass(frozen=True)
class Shapes:
    """A data source: what `data=` builds; images are made when a split is asked for."""

    count: int = 1000
    side: int = 32

    @property
    def image_size(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def class_names(self) -> tuple[str, ...]:
        return "disc", "square"

    def split(self, name: str) -> ImageDataset:
        rng = torch.Generator().manual_seed(SPLITS.index(name))
        count = self.count if name == "train" else max(self.count // 5, 1)
        labels = torch.arange(count) % 2
        images = torch.stack([self._draw(int(label), rng) for label in labels])
        return TensorImages("shapes", name, images, labels, self.class_names)

    def _draw(self, label: int, rng: torch.Generator) -> Tensor:
        """(3, side, side) uint8."""
        y, x = torch.meshgrid(torch.arange(self.side), torch.arange(self.side), indexing="ij")
        row, column = (torch.rand(2, generator=rng) * 0.5 + 0.25) * self.side
        radius = (torch.rand(1, generator=rng) * 0.2 + 0.1) * self.side
        dy, dx = (y - row).abs(), (x - column).abs()
        inside = torch.maximum(dy, dx) < radius if label else dy**2 + dx**2 < radius**2
        colours = torch.randint(256, (2, 3, 1, 1), generator=rng, dtype=torch.uint8)
        return torch.where(inside, colours[0], colours[1])
