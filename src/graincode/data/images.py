"""Images for training and evaluation: the batch, the data set, the source; decoding, and splits by hash."""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from graincode.core.errors import GraincodeError, check
from graincode.core.images import from_uint8, to_uint8
from graincode.core.rng import permutation

SPLITS = ("train", "val", "test")

# What is decoded, by Pillow's names. Others of its decoders start programs, whatever a file is called.
FORMATS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpeg", ".jpg"),
    "PNG": (".png",),
    "PPM": (".ppm",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)

_HASH_CHUNK = 256


@dataclass(frozen=True)
class ImageBatch:
    """A batch of B images.

    Attributes:
        images: (B, 3, H, W) float32 in [-1, 1].
        labels: (B,) long, index into the data set's class names; 0 where it has none.
        indices: (B,) long, index of each image in its split.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor

    def to(self, device: torch.device | str) -> ImageBatch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> ImageBatch:
        """The same batch in memory that a GPU copies from directly."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> ImageBatch:
        return ImageBatch(change(self.images), change(self.labels), change(self.indices))


class ImageDataset(ABC):
    """One split of a data set, indexed by batches: `DataLoader(dataset, sampler=index_lists, batch_size=None)`.

    Attributes:
        name: short name of the data set, as it stands in result files.
        split: "train", "val" or "test".
        image_size: (height, width) in pixels.
        class_names: name of each label; empty if there are no labels.
        labels: (N,) long, the labels of all images.
        skipped: how many corrupt images others stand in for, as far as is known: without a cache, those found so far
            by this process and its loader's workers.
    """

    name: str
    split: str
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    labels: Tensor

    @property
    def skipped(self) -> int:
        return 0

    def __len__(self) -> int:
        """Number of images in the split."""
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, indices: Sequence[int] | int) -> ImageBatch:
        """The images at these indices in this order; the same at every call.

        Args:
            indices: B indices in [0, len), repeats allowed; a single one gives a batch of one.
        Raises:
            IndexError: an index is outside [0, len).
        """

    def content_hash(self) -> str:
        """Hex SHA-256 of what is delivered: image size, uint8 images and labels in order, whatever their names.

        Reads the whole split once, at the first call.
        """
        return self._content_hash

    @cached_property
    def _content_hash(self) -> str:
        digest = hashlib.sha256(f"{len(self)} images of {self.image_size[0]}x{self.image_size[1]}".encode())
        labels: list[int] = []
        for start in range(0, len(self), _HASH_CHUNK):
            batch = self[range(start, min(start + _HASH_CHUNK, len(self)))]
            digest.update(to_uint8(batch.images).numpy().tobytes())
            labels += batch.labels.tolist()
        digest.update(np.array(labels, dtype="<i8").tobytes())
        return digest.hexdigest()


class ImageSource(Protocol):
    """A data set before it is read: what `conf/data` instantiates. Reading starts with `split`."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label, the same in all splits; empty if there are no labels."""

    def split(self, name: str) -> ImageDataset:
        """The split "train", "val" or "test"."""


@dataclass(frozen=True, eq=False)
class TensorImages(ImageDataset):
    """A split held in memory.

    Args:
        name, split, class_names: as in `ImageDataset`.
        images: (N, C, H, W) uint8; with C = 1 the gray channel is repeated on delivery, with C = 3 it is RGB.
        labels: (N,) long.
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()

    @property
    def image_size(self) -> tuple[int, int]:
        return self.images.shape[-2], self.images.shape[-1]

    def __getitem__(self, indices: Sequence[int] | int) -> ImageBatch:
        chosen = index_tensor(indices, len(self))
        images = from_uint8(self.images[chosen]).expand(-1, 3, -1, -1).contiguous()
        return ImageBatch(images, self.labels[chosen], chosen)


class DerivedImages(ImageDataset):
    """A split made of another one, with its name, image size and classes, and other labels."""

    def __init__(self, dataset: ImageDataset, split: str, labels: Tensor) -> None:
        self.name, self.split, self.labels = dataset.name, split, labels
        self.image_size, self.class_names = dataset.image_size, dataset.class_names
        self._dataset = dataset

    @property
    def skipped(self) -> int:
        return self._dataset.skipped


class Subset(DerivedImages):
    """The first `count` images of a fixed permutation of a split, so that a part is not one class."""

    def __init__(self, dataset: ImageDataset, count: int) -> None:
        self._order = torch.from_numpy(permutation(0, 0, len(dataset))[:count])
        super().__init__(dataset, f"{dataset.split} (part)", dataset.labels[self._order])

    def __getitem__(self, indices: Sequence[int] | int) -> ImageBatch:
        chosen = index_tensor(indices, len(self))
        batch = self._dataset[self._order[chosen].tolist()]
        return ImageBatch(batch.images, batch.labels, chosen)


def split_by_hash(names: Sequence[str], fractions: Mapping[str, float]) -> dict[str, list[str]]:
    """Split names so that the part of each depends on that name alone.

    Args:
        names: distinct names.
        fractions: share of each part but "train", in [0, 1); a part with a positive share gets one name at least
            (while there are any), the one whose hash comes next.
    Returns:
        The names of each part, sorted; "train" has the rest.
    """
    ranked = sorted((_unit_hash(name), name) for name in names)
    parts = {}
    start, bound = 0, 0.0
    for part, fraction in fractions.items():
        bound += fraction
        end = max(bisect_left(ranked, (bound, "")), start + (fraction > 0))
        parts[part] = sorted(name for _, name in ranked[start:end])
        start = end
    parts["train"] = sorted(name for _, name in ranked[start:])
    return parts


def read_image(
    file: str | Path | bytes, size: tuple[int, int], crop: Literal["center", "none", "exact"], name: str | None = None
) -> Tensor:
    """Decode one image and scale it with an antialiased bicubic filter.

    Args:
        file, name: as in `open_image`.
        size: (height, width) in pixels.
        crop: "center" scales until the image covers the size and crops its centre; "none" changes the aspect ratio;
            "exact" refuses an image of another size.
    Returns:
        (3, height, width) uint8.
    Raises:
        GraincodeError: the file cannot be decoded, or has another size than the exact one.
    """
    height, width = size
    image = open_image(file, name)
    if crop == "exact" and image.size != (width, height):
        raise GraincodeError(
            f"{name or file}: {image.height} x {image.width} pixels, where the first image has {height} x {width}: "
            "give an image_size to have all resized"
        )
    if crop == "center":
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    else:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def open_image(file: str | Path | bytes, name: str | None = None, mode: str = "RGB") -> Image.Image:
    """Decode one image and turn it upright as its EXIF data say.

    Args:
        file: path or content, in one of the `FORMATS` with at most 8 bits a channel; of an animation the first frame
            is taken.
        name: what to call the file in an error; by default its path.
        mode: of Pillow's; "RGB" drops alpha.
    Raises:
        GraincodeError: the file cannot be decoded, or has more than 8 bits a channel.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=tuple(FORMATS)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode[0] in "IF":
                raise ValueError(f"Pillow mode {image.mode}, more than 8 bits a channel")
            return image.convert(mode)
    except Exception as error:  # broken files raise nearly anything, depending on the decoder
        name = name or ("an image in memory" if isinstance(file, bytes) else str(file))
        raise GraincodeError(
            f"{name} cannot be read as an image ({' '.join(str(error).split())}): remove it, or save it anew as an "
            "8-bit PNG or JPEG; on_corrupt=skip makes data sets pass over it"
        ) from error


def check_image_size(value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels of a size that may be the side of a square.

    Raises:
        GraincodeError: it is no size.
    """
    sides = (value, value) if isinstance(value, int) else value
    # a Hydra list is a Sequence but no tuple or list, and True is an int
    is_size = isinstance(sides, Sequence) and len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)
    check("image_size", value, "a positive number of pixels or [height,width]", is_size)
    return sides[0], sides[1]


def index_tensor(indices: Sequence[int] | int, length: int) -> Tensor:
    """(B,) long, the indices of a batch.

    Raises:
        IndexError: an index is outside [0, length).
    """
    chosen = torch.as_tensor(indices, dtype=torch.long).reshape(-1)
    if len(chosen) and not 0 <= chosen.min() <= chosen.max() < length:
        raise IndexError(f"index {chosen.tolist()} outside a split of {length} images")
    return chosen


def _unit_hash(name: str) -> float:
    """A fixed hash of a name, uniform in [0, 1)."""
    # 53 bits are what a float holds: with more, the largest hashes would round to 1.
    return (int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") >> 11) / 2**53
