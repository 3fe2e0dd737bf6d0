"""Images for training and evaluation: batch, data set and source; splits by hash."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from graincode.core.codes import Rows
from graincode.core.errors import check
from graincode.core.images import from_uint8
from graincode.core.rng import permutation

SPLITS = ("train", "val", "test")
# What folders and files are called that are splits, in small letters.
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_HASH_CHUNK = 256


@dataclass(frozen=True)
class ImageBatch(Rows):
    """A batch of images.

    Attributes:
        pixels: (B, 3, H, W) uint8, which travels to a GPU in a quarter of the time, or floating point in [-1, 1].
        labels: (B,) long, 0 without classes.
        indices: (B,) long, in the split.
    """

    pixels: Tensor
    labels: Tensor
    indices: Tensor

    @property
    def images(self) -> Tensor:
        """(B, 3, H, W) floating point in [-1, 1], made where the pixels are."""
        return from_uint8(self.pixels) if self.pixels.dtype == torch.uint8 else self.pixels


class ImageDataset(ABC):
    """One split of a data set, indexed by batches: `DataLoader(dataset, sampler=index_lists, batch_size=None)`.

    Attributes:
        name: of the data set, as it stands in result files.
        split: "train", "val" or "test".
        image_size: (height, width) in pixels.
        class_names: name of each label; empty if there are no labels.
        labels: (N,) long, of all images.
        skipped: how many corrupt images others stand in for; without a cache, those found so far.
    """

    name: str
    split: str
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    labels: Tensor
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        """Whether labels tell images apart."""
        return len(self.class_names) > 1

    def __getitem__(self, indices: Sequence[int] | int) -> ImageBatch:
        """The images at B indices, or at one, in this order; an IndexError if one is outside [0, len)."""
        chosen = torch.as_tensor(indices, dtype=torch.long).reshape(-1)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(f"index {chosen.tolist()} outside a split of {len(self)} images")
        images, labels = self.load(chosen)
        return ImageBatch(images, labels, chosen)

    @abstractmethod
    def load(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) uint8 images and (B,) long labels at (B,) indices; the same at every call."""

    def content_hash(self) -> str:
        """Hex SHA-256 of image size, uint8 images and labels in order; reads the whole split at the first call."""
        return self._content_hash

    def fingerprint(self) -> str:
        """16 hex digits that change with images, labels and class names, as far as can be seen without decoding.

        Images on disk count by name, size and time of change, so one that is written anew changes it, though it may be
        the same. A data set that says nothing else is read as a whole (see `content_hash`).
        """
        return fingerprint_of(self.content_hash(), *self.class_names)

    def summary(self) -> str:
        """How many images of how many classes, with the fingerprint, in words."""
        classes = f" of {len(self.class_names)} classes" if self.class_names else ""
        return f"{len(self)} images{classes} ({self.fingerprint()})"

    @cached_property
    def _content_hash(self) -> str:
        digest = hashlib.sha256(f"{len(self)} images of {self.image_size[0]}x{self.image_size[1]}".encode())
        shown = []
        for indices in torch.arange(len(self)).split(_HASH_CHUNK):
            images, labels = self.load(indices)
            digest.update(images.numpy().tobytes())
            shown += labels.tolist()
        digest.update(np.array(shown, dtype="<i8").tobytes())
        return digest.hexdigest()


def fingerprint_of(*parts: str) -> str:
    """16 hex digits of some texts in order."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class ImageSource(Protocol):
    """A data set before it is read, as `conf/data` says; its attributes are those of all its splits."""

    @property
    def image_size(self) -> tuple[int, int]: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    def split(self, name: str) -> ImageDataset:
        """The split "train", "val" or "test", which is read now."""


def summaries(source: ImageSource, splits: Sequence[str]) -> dict[str, str]:
    """What identifies the images of some splits, in words, had without filling a cache."""
    return {name: getattr(source, "undecoded", source.split)(name).summary() for name in splits}


@dataclass(frozen=True, eq=False)
class TensorImages(ImageDataset):
    """A split held in memory: (N, C, H, W) uint8 images, gray (C = 1) or RGB (C = 3), and (N,) long labels."""

    name: str
    split: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()

    @property
    def image_size(self) -> tuple[int, int]:
        return self.images.shape[-2], self.images.shape[-1]

    def load(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[indices].expand(-1, 3, -1, -1).contiguous(), self.labels[indices]

    def fingerprint(self) -> str:
        """Of what is in memory: a moment for 100 MB."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        content = (hashlib.sha256(part.contiguous().numpy().data).hexdigest() for part in (self.images, self.labels))
        return fingerprint_of(*content, str(self.image_size), *self.class_names)


class DerivedImages(ImageDataset):
    """The images of another split in an order (N,) long, which may leave some out or repeat them."""

    def __init__(self, dataset: ImageDataset, split: str, order: Tensor) -> None:
        self.name, self.split, self.labels = dataset.name, split, dataset.labels[order]
        self.image_size, self.class_names = dataset.image_size, dataset.class_names
        self._dataset, self._order = dataset, order

    @property
    def skipped(self) -> int:
        return self._dataset.skipped

    def load(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self._dataset.load(self._order[indices])

    def fingerprint(self) -> str:
        """Of the other split and the order."""
        order = hashlib.sha256(self._order.numpy().tobytes()).hexdigest()
        return fingerprint_of(self._dataset.fingerprint(), order, *self.class_names)


class Subset(DerivedImages):
    """The first `count` images of a fixed permutation of a split, so that a part is not one class."""

    def __init__(self, dataset: ImageDataset, count: int) -> None:
        order = torch.from_numpy(permutation(0, 0, len(dataset))[:count])
        super().__init__(dataset, f"{dataset.split} (part)", order)


def split_by_hash(names: Sequence[str], fractions: Mapping[str, float]) -> dict[str, list[str]]:
    """The sorted names of each part; that of a name depends on the name alone, and "train" has the rest.

    Args:
        names: distinct.
        fractions: share of each part but "train", in [0, 1); a part with a positive share gets one name at least
            (while there are any), the one whose hash comes next.
    """
    # 53 bits of the hash are what a float in [0, 1) holds: with more, the largest would round to 1
    digests = ((int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big"), name) for name in names)
    ranked = sorted(((digest >> 11) / 2**53, name) for digest, name in digests)
    parts, start, bound = {}, 0, 0.0
    for part, fraction in fractions.items():
        bound += fraction
        end = max(bisect_left(ranked, (bound, "")), start + (fraction > 0))
        parts[part], start = sorted(name for _, name in ranked[start:end]), end
    return parts | {"train": sorted(name for _, name in ranked[start:])}


def check_image_size(value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels of a size that may be the side of a square; refuses what is no size."""
    sides = (value, value) if isinstance(value, int) else value
    # a Hydra list is a Sequence but no tuple or list, and True is an int
    is_size = isinstance(sides, Sequence) and len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)
    check("image_size", value, "a positive number of pixels or [height,width]", is_size)
    return sides[0], sides[1]
