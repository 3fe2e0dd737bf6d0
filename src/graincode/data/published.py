"""Data sets that are published as a few files: CIFAR-10 and Fashion-MNIST, found on disk or downloaded once."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import logging
import math
import os
import struct
import tarfile
import urllib.request
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from graincode.core.errors import GraincodeError, check, check_choice
from graincode.core.rng import permutation
from graincode.data.encoded import MAX_BYTES, read_file
from graincode.data.images import SPLITS, TensorImages
from graincode.files import cache_root, network_timeout, scratch_directory

_SPLIT_KEY = 0xFA5410
_LARGEST = 2**26  # bytes of a file, decompressed
_logger = logging.getLogger(__name__)


def validation_mask(count: int, one_in: int) -> Tensor:
    """(count,) bool, one in so many training images that are for validation: the same in every run."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.from_numpy(permutation(_SPLIT_KEY, 0, count)[: count // one_in])] = True
    return mask


class PublishedImages(ABC):
    """A data set of a few files of 32x32 images in 10 classes.

    The test split is the published one, the validation split 5,000 of the training images, drawn once and for all.

    Args:
        root: a directory with the files in it or in the usual folder below it, gzipped or not. Without one they are
            taken from where a package has installed them, or from `cache_root()`, into which they are downloaded once.
    """

    image_size = (32, 32)
    class_names: ClassVar[tuple[str, ...]]
    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]]  # test's begin with "test" or "t10k"
    folder: ClassVar[str]  # where they usually are below a root
    installed: ClassVar[tuple[Path, ...]] = ()  # where packages have them
    url: ClassVar[str]  # of the folder at the publisher's, over https
    downloads: ClassVar[dict[str, str]]  # SHA-256 of the files or archives there
    advice: ClassVar[str] = ""  # if they cannot be downloaded
    one_in: ClassVar[int]

    def __init__(self, root: str | None = None):
        self._root = root

    def split(self, name: str) -> TensorImages:
        """Read the split "train", "val" or "test", which downloads the files if need be."""
        check_choice("split", name, SPLITS)
        found, is_test = self._paths(), name == "test"
        paths = [found[file] for file in self.files if file.startswith(("test", "t10k")) == is_test]
        images, labels = self._join([self._parsed(path) for path in paths])
        if len(images) != len(labels):
            raise _corrupt(paths[-1], f"expected {len(images)} labels, found {len(labels)}")
        if not is_test:
            mask = validation_mask(len(images), self.one_in) == (name == "val")
            images, labels = images[mask], labels[mask]
        return TensorImages(self.name, name, images, labels, self.class_names)

    def _parsed(self, path: Path) -> np.ndarray:
        content = read_file(path)
        try:
            if path.suffix == ".gz":
                content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(_LARGEST + 1)
            if len(content) > _LARGEST:
                raise ValueError(f"more than {_LARGEST} bytes")
            return self._parse(bytearray(content), path.name)
        except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
            raise _corrupt(path, str(error)) from error

    @abstractmethod
    def _parse(self, content: bytearray, file: str) -> np.ndarray:
        """The uint8 array in a file; an error if it is damaged."""

    @abstractmethod
    def _join(self, arrays: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """(N, C, 32, 32) uint8 images and long labels in the arrays of a split's files."""

    @classmethod
    def cache(cls) -> Path:
        """Where downloaded files are."""
        return cache_root() / cls.name.replace("_", "-")

    @classmethod
    def found(cls, folder: Path) -> dict[str, Path]:
        """The files that a folder has, by their names."""
        paths = ((file, folder / f"{file}{suffix}") for file in cls.files for suffix in ("", ".gz"))
        return {file: path for file, path in paths if path.is_file()}

    def _paths(self) -> dict[str, Path]:
        """The files by their names, downloaded into the cache if they are nowhere else."""
        cache, root = self.cache(), self._root
        given = (*self.installed, cache) if root is None else (Path(root).expanduser(),)
        for folder in (base / below for base in given for below in ("", self.folder)):
            if len(found := self.found(folder)) == len(self.files):
                _logger.info("%s is read from %s", self.name, folder)
                return found
        check("root", root, f"{', '.join(self.files)} in it or in its {self.folder}", root is None)
        try:
            self._download(cache)
        except (OSError, tarfile.TarError) as error:
            reason = f"{self.name} is not in {cache} and cannot be downloaded ({' '.join(str(error).split())})"
            ways = f"connect to the network, set GRAINCODE_CACHE to another folder{self.advice}, or give its root"
            raise GraincodeError(f"{reason}: {ways}") from error
        return self.found(cache)

    def _download(self, cache: Path) -> None:
        cache.mkdir(parents=True, exist_ok=True)
        # whole files are moved out of a temporary directory, so that other processes never see half of one
        with scratch_directory(cache, "downloading") as scratch, network_timeout():
            for file, sha256 in self.downloads.items():
                content = _fetched(f"{self.url}/{file}", sha256)
                if not file.endswith(".tar.gz"):
                    (scratch / file).write_bytes(content)
                    continue
                with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                    for member in tar:
                        if (name := member.name.rpartition("/")[2]) in self.files and member.isreg():
                            (scratch / name).write_bytes(tar.extractfile(member).read())
            found = self.found(scratch)
            if len(found) < len(self.files):
                raise OSError(f"files are missing in what {self.url} has")
            for path in found.values():
                os.replace(path, cache / path.name)


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Follows no server to an address that is not https."""

    def redirect_request(self, *request: Any) -> urllib.request.Request | None:
        if not request[-1].startswith("https://"):
            raise OSError(f"sent on to {request[-1]}, which is not https")
        return super().redirect_request(*request)


def _fetched(url: str, sha256: str) -> bytes:
    """What a server has; an OSError if that is another file."""
    with urllib.request.build_opener(_OnlyHttps).open(url) as answer:
        chunks = itertools.islice(iter(lambda: answer.read(2**20), b""), MAX_BYTES // 2**20)
        content = b"".join(tqdm(chunks, url.rpartition("/")[2], unit=" MiB", leave=False))
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f"{url} has another file than was published")
    return content


class CIFAR10(PublishedImages):
    """60,000 colour images (Krizhevsky, 2009), of the binary version: the other is of pickles, never loaded."""

    name, folder, one_in = "cifar10", "cifar-10-batches-bin", 10
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    files = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
    url = "https://www.cs.toronto.edu/~kriz"
    downloads: ClassVar = {"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"}

    def _parse(self, content: bytearray, file: str) -> np.ndarray:
        return _labelled(np.frombuffer(content, np.uint8).reshape(-1, 3073))  # a byte of label, three planes of bytes

    def _join(self, arrays: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        records = torch.from_numpy(np.concatenate(arrays))
        return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()


class FashionMNIST(PublishedImages):
    """70,000 gray images of clothes (Xiao et al., 2017), padded with black from 28x28."""

    name, folder, one_in = "fashion_mnist", "FashionMNIST/raw", 12
    class_names = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip
    files = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    installed = (Path("/usr/share/datasets/fashion-mnist"),)
    url = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"
    downloads: ClassVar = {
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    }
    advice = ", run experiments/data/fashion_mnist.py, which takes it from a Debian package"

    def _parse(self, content: bytearray, file: str) -> np.ndarray:
        item = (28, 28) if "images" in file else ()
        start = 8 + 4 * len(item)
        count = (len(content) - start) // math.prod(item)
        # of IDX: two zero bytes, 8 for "unsigned byte", the number of dimensions, and each of these in 32 bits
        if content[:start] != struct.pack(f">4B{1 + len(item)}I", 0, 0, 8, 1 + len(item), count, *item):
            raise ValueError(f"expected {count} items of shape {item} as IDX, by its size")
        array = np.frombuffer(content, np.uint8, offset=start).reshape(count, *item)
        return array if item else _labelled(array[:, None])[:, 0]

    def _join(self, arrays: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        images, labels = map(torch.from_numpy, arrays)
        return functional.pad(images, (2, 2, 2, 2)).unsqueeze(1), labels.long()


def _labelled(records: np.ndarray) -> np.ndarray:
    """The same records, whose first bytes are labels."""
    if records[:, 0].max() > 9:
        raise ValueError(f"expected labels from 0 to 9, found {records[:, 0].max()}")
    return records


def _corrupt(path: Path, reason: str) -> GraincodeError:
    return GraincodeError(f"{path} is corrupt ({reason}): remove it, to download it again, or give another root")
