"""Images for training and evaluation: the batch, the data set, the source, and any folder of images as a source."""

from __future__ import annotations

import hashlib
import logging
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

from graincode.core.errors import GraincodeError
from graincode.core.images import from_uint8, to_uint8
from graincode.core.rng import permutation

SPLITS = ("train", "val", "test")
EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

_HASH_CHUNK = 256

_logger = logging.getLogger(__name__)


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
    """

    name: str
    split: str
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    labels: Tensor

    @abstractmethod
    def __len__(self) -> int:
        """Number of images in the split."""

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

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Sequence[int] | int) -> ImageBatch:
        chosen = _index_tensor(indices, len(self))
        images = from_uint8(self.images[chosen]).expand(-1, 3, -1, -1).contiguous()
        return ImageBatch(images, self.labels[chosen], chosen)


class Subset(ImageDataset):
    """The first `count` images of a fixed permutation of a split, so that a part is not one class."""

    def __init__(self, dataset: ImageDataset, count: int) -> None:
        self.name, self.split = dataset.name, f"{dataset.split} (part)"
        self.image_size, self.class_names = dataset.image_size, dataset.class_names
        self._dataset, self._order = dataset, torch.from_numpy(permutation(0, 0, len(dataset))[:count])
        self.labels = dataset.labels[self._order]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, indices: Sequence[int] | int) -> ImageBatch:
        batch = self._dataset[self._order[_index_tensor(indices, len(self))].tolist()]
        return ImageBatch(batch.images, batch.labels, _index_tensor(indices, len(self)))


@dataclass(frozen=True, eq=False)
class FolderImages(ImageDataset):
    """A split of image files, decoded when they are asked for.

    Args:
        name, split, image_size, class_names: as in `ImageDataset`.
        files: N image files.
        labels: (N,) long.
        crop: as in `read_image`.
    """

    name: str
    split: str
    image_size: tuple[int, int]
    files: tuple[str, ...]
    labels: Tensor
    class_names: tuple[str, ...] = ()
    crop: Literal["center", "none"] = "center"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Sequence[int] | int) -> ImageBatch:
        chosen = _index_tensor(indices, len(self))
        images = torch.empty(len(chosen), 3, *self.image_size, dtype=torch.uint8)
        for row, index in enumerate(chosen.tolist()):
            images[row] = read_image(self.files[index], self.image_size, self.crop)
        return ImageBatch(from_uint8(images), self.labels[chosen], chosen)


class ImageFolder:
    """A directory of images as a data set, with the classes and splits that its sub-directories show.

    Files with a known extension count, at any depth, except those whose name or directory begins with a dot.

    Splits. If the root has train/ and also val/ or test/, or train/ and no other directory, these are the splits, and
    those of val and test that are missing are taken out of train/. Otherwise all three are taken out of the root. What
    is taken out is decided by a hash of each file's relative path, so a file keeps its split when others come and go;
    only a split that would have no file at all, as in small folders, gets the one with the nearest hash.

    Classes. The first-level directories (of each split), sorted by name; images that lie in none are unlabelled.

    Args:
        root: the directory; `~` is expanded.
        image_size: side of a square or (height, width) in pixels.
        crop: "center" scales until the image covers the size and crops its centre; "none" changes the aspect ratio.
        val_fraction: share of the images to validate on, in [0, 1); unused if the root has val/.
        test_fraction: share of the images to test on, in [0, 1); unused if the root has test/.
        classes: "folders", or "none" for images that are unlabelled whatever directories they lie in.
    Raises:
        GraincodeError: an argument is not as above. Whether the root exists is found out on the first use.
    """

    def __init__(
        self,
        root: str | None,
        image_size: int | Sequence[int] = 64,
        crop: Literal["center", "none"] = "center",
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        classes: Literal["folders", "none"] = "folders",
    ):
        if not root:
            raise GraincodeError("data.root is not set: type data.root=/path/to/images")
        _check_choice("crop", crop, ("center", "none"))
        _check_choice("classes", classes, ("folders", "none"))
        fractions = (val_fraction, test_fraction)
        if not (all(isinstance(f, int | float) and f >= 0 for f in fractions) and sum(fractions) < 1):
            raise GraincodeError(
                f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction}: expected two numbers from 0 "
                "whose sum is below 1: type data.val_fraction=0.05 data.test_fraction=0.05"
            )
        self.image_size = _image_size(image_size)
        self._root = Path(os.path.abspath(os.path.expanduser(root)))
        self._crop = crop
        self._classes = classes
        self._fractions = {"test": test_fraction, "val": val_fraction}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label; empty if there are no labels.

        Raises:
            GraincodeError: as `split` does.
        """
        if self._classes == "none":
            return ()
        example = {_top_folder(file): base / file for base, files in self._splits.values() for file in files}
        names = tuple(sorted(example))
        if names == ("",):
            return ()
        if "" in example:
            raise GraincodeError(
                f"{example['']} lies beside the class folders, not in one: "
                "move it into one, or type data.classes=none for unlabelled images"
            )
        return names

    def split(self, name: str) -> FolderImages:
        """The split "train", "val" or "test"; images are in the order of their paths.

        Raises:
            GraincodeError: there is no such split or it has no images, the root is missing, or it has too few images.
        """
        check_split(name)
        base, files = self._splits[name]
        if not files:
            raise GraincodeError(
                f"data.root={self._root} has no {name} images, as data.{name}_fraction=0: "
                f"type data.{name}_fraction=0.05"
            )
        names = self.class_names
        label_of = {folder: label for label, folder in enumerate(names)}
        labels = [label_of[_top_folder(file)] if names else 0 for file in files]
        _logger.info("%s: %d images and %d classes in split %s", self._root, len(files), len(names), name)
        return FolderImages(
            name=self._root.name,
            split=name,
            image_size=self.image_size,
            files=tuple(str(base / file) for file in files),
            labels=torch.tensor(labels),
            class_names=names,
            crop=self._crop,
        )

    @cached_property
    def _splits(self) -> dict[str, tuple[Path, list[str]]]:
        """Of each split, the directory and the relative paths of its files in it."""
        if not self._root.is_dir():
            raise GraincodeError(f"data.root={self._root} is not a directory: type data.root=/path/to/images")
        given = [name for name in SPLITS if (self._root / name).is_dir()]
        folders = [path for path in self._root.iterdir() if path.is_dir() and not path.name.startswith(".")]
        if "train" not in given or (len(given) == 1 and len(folders) > 1):
            given = []
        base = self._root / "train" if given else self._root
        missing = {name: fraction for name, fraction in self._fractions.items() if name not in given}
        split = split_by_hash(_image_files(base), missing)
        if not split["train"]:
            raise GraincodeError(
                f"{base} has too few images for its splits, none is left to train on: add images, or type "
                + " ".join(f"data.{name}_fraction=0" for name in missing)
            )
        found = {name: (base, files) for name, files in split.items()}
        for name in given:
            if name != "train":
                found[name] = (self._root / name, _image_files(self._root / name))
        return found


def check_split(name: str) -> None:
    """Raise a GraincodeError unless `name` is the name of a split."""
    if name not in SPLITS:
        raise GraincodeError(f"there is no split {name!r}: type one of {', '.join(SPLITS)}")


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


def read_image(path: str | Path, size: tuple[int, int], crop: Literal["center", "none"]) -> Tensor:
    """Decode one image file, turn it upright as its EXIF data say, and scale it with an antialiased bicubic filter.

    Args:
        path: any file that Pillow opens with at most 8 bits a channel; alpha is dropped, of an animation the first
            frame is taken.
        size: (height, width) in pixels.
        crop: "center" scales until the image covers the size and crops its centre; "none" changes the aspect ratio.
    Returns:
        (3, height, width) uint8.
    Raises:
        GraincodeError: the file cannot be decoded, or has more than 8 bits a channel.
    """
    height, width = size
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in "IF":
                raise ValueError(f"Pillow mode {image.mode}, more than 8 bits a channel")
            image = image.convert("RGB")
    except Exception as error:  # broken files raise nearly anything, depending on the decoder
        reason = " ".join(str(error).split())
        raise GraincodeError(
            f"{path} cannot be read as an image ({reason}): remove it, or re-save it as an 8-bit PNG or JPEG"
        ) from error
    if crop == "center":
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    else:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _image_files(base: Path) -> list[str]:
    """Relative paths, with forward slashes, of the images below a directory, sorted."""
    files = []
    for folder, folders, names in os.walk(base, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [
            Path(folder, name).relative_to(base).as_posix()
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    if not files:
        raise GraincodeError(
            f"{base} has no images, that is, files that end in {' '.join(EXTENSIONS)}: type data.root=/path/to/images"
        )
    return sorted(files)


def _top_folder(file: str) -> str:
    """First directory of a relative path; empty for a bare file name."""
    return file.rpartition("/")[0].partition("/")[0]


def _unit_hash(name: str) -> float:
    """A fixed hash of a name, uniform in [0, 1)."""
    # 53 bits are what a float holds: with more, the largest hashes would round to 1.
    return (int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") >> 11) / 2**53


def _index_tensor(indices: Sequence[int] | int, length: int) -> Tensor:
    chosen = torch.as_tensor(indices, dtype=torch.long).reshape(-1)
    if len(chosen) and not 0 <= chosen.min() <= chosen.max() < length:
        raise IndexError(f"index {chosen.tolist()} outside a split of {length} images")
    return chosen


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        options = " or ".join(f"data.{key}={choice}" for choice in choices)
        raise GraincodeError(f"data.{key}={value}: expected {' or '.join(choices)}: type {options}")


def _image_size(value: int | Sequence[int]) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, int) else value
    # a Hydra list is a Sequence but no tuple or list, and True is an int
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise GraincodeError(
            f"data.image_size={value}: expected a positive number of pixels or [height,width]: "
            "type data.image_size=64 or data.image_size=[64,96]"
        )
    return sides[0], sides[1]
