"""CIFAR-10 (Krizhevsky, 2009), read from its binary version: the other one is of pickles, which are never loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.data.images import TensorImages, check_split
from graincode.data.published import corrupt, fetch, first_complete, validation_mask
from graincode.files import cache_root, network_timeout

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILES = ("test_batch.bin",)

_RECORD = 1 + 3 * 32 * 32


class CIFAR10:
    """60,000 colour images of 32x32 in 10 classes.

    The test split is the published one, of 10,000 images. The validation split is 5,000 of the 50,000 training images,
    drawn once and for all (see `validation_mask`); the train split is the other 45,000.

    Args:
        root: a directory with the six .bin files in it or in its cifar-10-batches-bin. Without one they are taken
            from the cache, $GRAINCODE_CACHE or ~/.cache/graincode, into which they are fetched once (170 MB).
    """

    image_size = (32, 32)
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def __init__(self, root: str | None = None):
        self._root = root

    def split(self, name: str) -> TensorImages:
        """Read the split "train", "val" or "test", which fetches the files if need be.

        Raises:
            GraincodeError: there is no such split, or files are missing, corrupt or not to be had.
        """
        check_split(name)
        folder = locate(self._root)
        parts = [read_records(folder / file) for file in (TEST_FILES if name == "test" else TRAIN_FILES)]
        images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        if name != "test":
            chosen = validation_mask(len(images), 10)
            chosen = chosen if name == "val" else ~chosen
            images, labels = images[chosen], labels[chosen]
        return TensorImages("cifar10", name, images, labels, self.class_names)


def read_records(path: Path) -> tuple[Tensor, Tensor]:
    """Read one file, of records of a byte of label and three planes of bytes.

    Returns:
        (N, 3, 32, 32) uint8 images, and (N,) long labels from 0 to 9.
    Raises:
        GraincodeError: the file is damaged.
    """
    content = np.fromfile(path, dtype=np.uint8)
    if len(content) == 0 or len(content) % _RECORD:
        raise corrupt(path, f"expected records of {_RECORD} bytes, found {len(content)} bytes", FOLDER)
    records = torch.from_numpy(content).view(-1, _RECORD)
    labels = records[:, 0].long()
    if labels.max() >= len(CIFAR10.class_names):
        raise corrupt(path, f"expected labels from 0 to 9, found {labels.max()}", FOLDER)
    return records[:, 1:].reshape(-1, 3, 32, 32), labels


def locate(root: str | None) -> Path:
    """The directory that holds the six files, fetched into the cache if they are not there.

    Args:
        root: the directory to take them from, or None for the cache.
    Raises:
        GraincodeError: the root lacks a file, or the files cannot be fetched.
    """
    if root is not None:
        given = Path(root).expanduser()
        if found := first_complete("CIFAR-10", (given, given / FOLDER), _is_complete):
            return found
        raise GraincodeError(
            f"data.root={root} lacks files of CIFAR-10's binary version: expected "
            f"{', '.join(TRAIN_FILES + TEST_FILES)} in it or in its {FOLDER}: "
            "type data.root=/folder/of/these/files, or data.root=null to have them fetched"
        )
    cache = cache_root() / "cifar10"
    if first_complete("CIFAR-10", (cache,), _is_complete) or fetch("CIFAR-10", cache, FETCHERS, _files):
        return cache
    raise GraincodeError(
        f"CIFAR-10 is not in {cache}, and fetching {URL} failed: connect to the network, or set GRAINCODE_CACHE to a "
        f"directory that can be written, or type data.root=/folder/of/{FOLDER}"
    )


def _download(scratch: Path) -> Path:
    """Download and unpack the archive, its checksum verified; return the directory the files are in."""
    from torchvision.datasets.utils import download_and_extract_archive  # seconds, and only once

    with network_timeout():
        download_and_extract_archive(URL, str(scratch), md5=MD5, remove_finished=True)
    return scratch / FOLDER


FETCHERS = {"its download": _download}


def _files(folder: Path) -> list[Path]:
    files = [folder / file for file in TRAIN_FILES + TEST_FILES]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing")
    return files


def _is_complete(folder: Path) -> bool:
    return all((folder / file).is_file() for file in TRAIN_FILES + TEST_FILES)
