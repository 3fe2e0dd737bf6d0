"""Data sets that are published as a few files: CIFAR-10 and Fashion-MNIST, found on disk or downloaded once."""

from __future__ import annotations

import gzip
import logging
import os
import tempfile
import zlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from graincode.core.errors import GraincodeError, check_choice
from graincode.core.rng import permutation
from graincode.data.encoded import read_file
from graincode.data.images import SPLITS, TensorImages
from graincode.files import cache_root, network_timeout

_SPLIT_KEY = 0xFA5410

_logger = logging.getLogger(__name__)


def validation_mask(count: int, one_in: int) -> Tensor:
    """Which training images are for validation: the same in every run and on every machine.

    Args:
        count: number of training images in the files.
        one_in: how many images there are for each one of validation.
    Returns:
        (count,) bool with count // one_in true: those with the smallest of the random 64-bit numbers that Philox
        draws under a fixed key, a stream that does not change with numpy's version.
    """
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.from_numpy(permutation(_SPLIT_KEY, 0, count)[: count // one_in])] = True
    return mask


class PublishedImages(ABC):
    """A data set of a few files in 10 classes.

    The test split is the published one. The validation split is 5,000 of the training images, drawn once and for all
    (see `validation_mask`); the train split is the others.

    Args:
        root: a directory with the files in it or in the usual folder below it. Without one they are taken from where
            a package has installed them or from the cache, $GRAINCODE_CACHE or ~/.cache/graincode, into which they
            are downloaded once.
    """

    image_size = (32, 32)
    class_names: ClassVar[tuple[str, ...]]

    name: ClassVar[str]
    cache: ClassVar[str]
    """Name of the folder in the cache."""
    installed: ClassVar[tuple[Path, ...]] = ()
    """Folders in which packages have the files."""
    below: ClassVar[str]
    """The usual folder below a root."""
    files: ClassVar[tuple[str, ...]]
    """What a folder must have; each may have .gz after its name."""
    url: ClassVar[str]
    """Of the folder at the publisher's, over https."""
    downloads: ClassVar[dict[str, str]]
    """MD5 of the files or archives there."""
    one_in: ClassVar[int]
    """How many training images there are for each one of validation."""
    elsewhere: ClassVar[str] = ""
    """What else to do if they cannot be downloaded."""

    def __init__(self, root: str | None = None):
        self._root = root

    def split(self, name: str) -> TensorImages:
        """Read the split "train", "val" or "test", which downloads the files if need be.

        Raises:
            GraincodeError: there is no such split, or files are missing, corrupt or cannot be downloaded.
        """
        check_choice("split", name, SPLITS)
        images, labels = self._read(self.found(self._folder()), name == "test")
        if name != "test":
            chosen = validation_mask(len(images), self.one_in)
            chosen = chosen if name == "val" else ~chosen
            images, labels = images[chosen], labels[chosen]
        return TensorImages(self.name, name, images, labels, self.class_names)

    @abstractmethod
    def _read(self, paths: dict[str, Path], test: bool) -> tuple[Tensor, Tensor]:
        """(N, C, 32, 32) uint8 images and (N,) long labels of the published test or training images."""

    def _labels(self, path: Path, labels: np.ndarray) -> Tensor:
        """(N,) long of a file's labels.

        Raises:
            GraincodeError: one has no class.
        """
        if labels.max(initial=0) >= len(self.class_names):
            raise _corrupt(path, f"expected labels from 0 to {len(self.class_names) - 1}, found {labels.max()}")
        return torch.from_numpy(labels.astype(np.int64))

    def _folder(self) -> Path:
        """The directory that holds the files, downloaded into the cache if they are nowhere else."""
        cache = cache_root() / self.cache
        places = (*self.installed, cache) if self._root is None else (Path(self._root).expanduser(),)
        for folder in (place / below for place in places for below in ("", self.below)):
            if len(self.found(folder)) == len(self.files):
                _logger.info("%s is read from %s", self.name, folder)
                return folder
        if self._root is not None:
            raise GraincodeError(
                f"root={self._root}: expected {', '.join(self.files)} in it or in its {self.below}; null downloads them"
            )
        try:
            self._download(cache)
        except (OSError, RuntimeError) as error:
            raise GraincodeError(
                f"{self.name} is not in {cache} and cannot be downloaded ({' '.join(str(error).split())}): connect to "
                f"the network, set GRAINCODE_CACHE to a directory that can be written{self.elsewhere}, or give its root"
            ) from error
        return cache

    @classmethod
    def found(cls, folder: Path) -> dict[str, Path]:
        """The files that a folder has, by their names."""
        paths = ((file, folder / f"{file}{suffix}") for file in cls.files for suffix in ("", ".gz"))
        return {file: path for file, path in paths if path.is_file()}

    def _download(self, cache: Path) -> None:
        from torchvision.datasets.utils import download_url, extract_archive  # seconds, and only once

        _logger.info("%s is downloaded from %s into %s", self.name, self.url, cache)
        cache.mkdir(parents=True, exist_ok=True)
        # a temporary directory, from which whole files are moved, so that other processes never see half of one
        with tempfile.TemporaryDirectory(dir=cache, prefix="downloading-") as scratch, network_timeout():
            for file, md5 in self.downloads.items():
                download_url(f"{self.url}/{file}", scratch, file, md5)
                if file.endswith(".tar.gz"):
                    extract_archive(os.path.join(scratch, file), scratch)
            found = self.found(Path(scratch)) or self.found(Path(scratch) / self.below)
            if len(found) < len(self.files):
                raise OSError(f"files are missing in what {self.url} has")
            for path in found.values():
                os.replace(path, cache / path.name)


class CIFAR10(PublishedImages):
    """CIFAR-10 (Krizhevsky, 2009): 60,000 colour images of 32x32 in 10 classes, 10,000 of them the test split.

    It is read from its binary version: the other one is of pickles, which are never loaded.
    """

    name, cache, below = "cifar10", "cifar10", "cifar-10-batches-bin"
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    files = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
    url = "https://www.cs.toronto.edu/~kriz"
    downloads: ClassVar = {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}
    one_in = 10

    def _read(self, paths: dict[str, Path], test: bool) -> tuple[Tensor, Tensor]:
        parts = [self._records(paths[file]) for file in (self.files[5:] if test else self.files[:5])]
        images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return images, labels

    def _records(self, path: Path) -> tuple[Tensor, Tensor]:
        """Images and labels of a file of records: a byte of label and three planes of bytes."""
        content, record = np.fromfile(path, dtype=np.uint8), 1 + 3 * 32 * 32
        if len(content) == 0 or len(content) % record:
            raise _corrupt(path, f"expected records of {record} bytes, found {len(content)} bytes")
        records = content.reshape(-1, record)
        return torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32)), self._labels(path, records[:, 0])


class FashionMNIST(PublishedImages):
    """Fashion-MNIST (Xiao et al., 2017): 70,000 gray images of clothes in 10 classes, 10,000 of them the test split.

    The images of 28x28 are padded with black to 32x32. The files are those of IDX, gzipped or not.
    """

    name, cache, below = "fashion_mnist", "fashion-mnist", "FashionMNIST/raw"
    class_names = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip
    installed = (Path("/usr/share/datasets/fashion-mnist"),)
    files = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    url = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"
    downloads: ClassVar = {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }
    one_in = 12
    elsewhere = ", run experiments/data/fashion_mnist.py, which takes it from a Debian package"

    def _read(self, paths: dict[str, Path], test: bool) -> tuple[Tensor, Tensor]:
        files = [paths[file] for file in (self.files[2:] if test else self.files[:2])]
        images, labels = map(read_idx, files)
        if images.shape[1:] != (28, 28):
            raise _corrupt(files[0], f"expected images of 28x28, found shape {images.shape}")
        if labels.shape != images.shape[:1]:
            raise _corrupt(files[1], f"expected {len(images)} labels, found shape {labels.shape}")
        padded = functional.pad(torch.from_numpy(images), (2, 2, 2, 2)).unsqueeze(1)
        return padded, self._labels(files[1], labels)


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes.

    Args:
        path: the file, gzipped if its name ends in .gz.
    Returns:
        uint8 array (writable) of the shape that the file's header gives.
    Raises:
        GraincodeError: the file is damaged or of another kind.
    """
    try:
        content = gzip.decompress(read_file(path)) if path.suffix == ".gz" else read_file(path)
    except (OSError, EOFError, zlib.error) as error:
        raise _corrupt(path, str(error)) from error
    # header: two zero bytes, 8 for "unsigned byte", the number of dimensions, and each of these in 32 bits
    dimensions = content[3] if content[:3] == b"\x00\x00\x08" and len(content) > 3 else 0
    start = 4 + 4 * dimensions
    if dimensions == 0 or len(content) < start:
        raise _corrupt(path, f"its first bytes are {content[:4].hex(' ') or 'missing'}, not an IDX header")
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">u4"))
    expected = start + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise _corrupt(path, f"expected {expected} bytes, found {len(content)}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()


def _corrupt(path: Path, reason: str) -> GraincodeError:
    return GraincodeError(f"{path} is corrupt ({reason}): remove it, to download it again, or give another root")
