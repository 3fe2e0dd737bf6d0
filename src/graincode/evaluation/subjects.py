"""What can be measured, and what it can be compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from graincode.core.errors import GraincodeError, check, check_choice
from graincode.data.encoded import EncodedImages, Files
from graincode.data.folders import image_files
from graincode.data.images import SPLITS, ImageDataset, ImageSource, TensorImages, check_image_size, open_image
from graincode.files import open_npz

SplitName = Literal["train", "val", "test"]

_LOSSY = (".jpg", ".jpeg")


@dataclass(frozen=True)
class Samples:
    """Samples of a generator, `images=samples`.

    Attributes:
        num_samples: None for as many as the reference has images.
        labels: "balanced" takes all classes in turn, "drawn" draws each uniformly, "reference" takes those of the
            reference images, for data sets whose classes differ in size.
    """

    num_samples: int | None = None
    labels: Literal["balanced", "drawn", "reference"] = "balanced"

    def __post_init__(self) -> None:
        check("num_samples", self.num_samples, "1 or more", self.num_samples is None or self.num_samples >= 1)


@dataclass(frozen=True)
class Reconstructions:
    """Reconstructions of a split by a tokenizer, `images=reconstructions`.

    Attributes:
        split: of the data set.
        ratios: share of regions at each grain; None for the tokenizer's own.
        psnr: in dB, instead of ratios: as few codes as reach it, for each image.
    Raises:
        GraincodeError: both are given.
    """

    split: SplitName = "test"
    ratios: Sequence[float] | None = None
    psnr: float | None = None

    def __post_init__(self) -> None:
        if self.ratios is not None and self.psnr is not None:
            raise GraincodeError(
                f"images.ratios={list(self.ratios)} and images.psnr={self.psnr}: type one of them, the other follows"
            )


@dataclass(frozen=True)
class Split:
    """A split of the data set: `images=split`, or a generation's usual reference, `reference=split`.

    Attributes:
        split: which.
    """

    split: SplitName = "test"

    def open(self, source: ImageSource) -> ImageDataset:
        """Its images."""
        check_choice("split", self.split, SPLITS)
        return source.split(self.split)


@dataclass(frozen=True)
class Folder:
    """Images in a directory or in an .npz file, `images=folder` or `reference=folder`.

    Attributes:
        path: of a directory, in which all image files at any depth are taken in the order of their paths, or of an
            .npz with uint8 images (N, H, W, 3) as `arr_0`, as the field shares samples, or as `images`.
        image_size: side of a square or (height, width) in pixels that files are resized and cropped to; None takes
            them as they are, which must be of one size.
    """

    path: str
    image_size: int | Sequence[int] | None = None

    def open(self, key: str) -> ImageDataset:
        """Its images.

        Args:
            key: "images" or "reference", for errors.
        Raises:
            GraincodeError: there is nothing at the path, or no images.
        """
        path = Path(self.path).expanduser()
        if path.is_dir():
            return self._files(path, key)
        if not path.is_file():
            raise GraincodeError(f"{key}.path={self.path}: there is nothing; type {key}.path=/path/to/images")
        try:
            with open_npz(path) as arrays:
                name = next((name for name in ("arr_0", "images") if name in arrays.files), None)
                found = arrays[name] if name else None
        except ValueError as error:
            raise GraincodeError(
                f"{key}.path={self.path} is no directory, and {error}: type {key}.path=/path/to/images"
            ) from None
        if found is None or found.dtype != np.uint8 or found.ndim != 4 or found.shape[3] != 3 or not len(found):
            shape = "none of them" if found is None else f"{found.dtype} {found.shape}"
            raise GraincodeError(
                f"{key}.path={self.path} has {shape}: expected arr_0 or images, uint8 of (N, H, W, 3)"
                + (f"; for a file of mu and sigma type {key}=statistics" if found is None else "")
            )
        if self.image_size is not None and check_image_size(self.image_size) != found.shape[1:3]:
            raise GraincodeError(
                f"{key}.image_size={self.image_size}, but the images of an .npz are not resized: "
                f"type {key}.image_size=null"
            )
        images = torch.from_numpy(found).permute(0, 3, 1, 2)
        return TensorImages(path.name, "images", images, torch.zeros(len(images), dtype=torch.long))

    def _files(self, path: Path, key: str) -> ImageDataset:
        files = Files(path.resolve(), tuple(image_files(path)))
        if self.image_size is not None:
            size, crop = check_image_size(self.image_size), "center"
        else:
            size, crop = open_image(files.name(0)).size[::-1], "exact"
        return EncodedImages(path.name, "images", size, files, torch.zeros(len(files), dtype=torch.long), crop=crop)


@dataclass(frozen=True)
class StatisticsFile:
    """Means and covariances that someone published, `reference=statistics`: only Fréchet distances can be had.

    Attributes:
        path: of an .npz with `mu` (D,) and `sigma` (D, D).
    """

    path: str


@dataclass(frozen=True)
class Originals:
    """The images that reconstructions were made from, `reference=originals`."""


def check_pairs(made: ImageDataset, originals: ImageDataset) -> None:
    """Refuse folders that are not pairs of images of equal names.

    Raises:
        GraincodeError: naming what differs.
    """
    if len(made) != len(originals) or tuple(made.image_size) != tuple(originals.image_size):
        raise GraincodeError(
            f"{len(made)} reconstructions of {tuple(made.image_size)} pixels and {len(originals)} originals of "
            f"{tuple(originals.image_size)}: expected pairs of equal size; type reference.path= the images that they "
            "were made from"
        )
    if isinstance(made, EncodedImages) and isinstance(originals, EncodedImages):
        for a, b in zip(made.encoded.paths, originals.encoded.paths, strict=True):
            if Path(a).with_suffix("") != Path(b).with_suffix(""):
                raise GraincodeError(
                    f"images.path has {a} where reference.path has {b}: expected pairs of equal names; type "
                    "reference.path= the images that they were made from"
                )


def is_lossy(images: ImageDataset) -> bool:
    """Whether images were kept in a format that changes them."""
    return isinstance(images, EncodedImages) and any(
        path.lower().endswith(_LOSSY) for path in getattr(images.encoded, "paths", ())
    )
