"""Fashion-MNIST (Xiao et al., 2017), read from IDX files that are found or fetched."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from graincode.core.errors import GraincodeError
from graincode.data.images import TensorImages, check_split
from graincode.data.published import corrupt, fetch, first_complete, unpack_debian_package, validation_mask
from graincode.files import cache_root, network_timeout

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class FashionMNIST:
    """70,000 gray images of clothes in 10 classes, padded from 28x28 with black to 32x32.

    The test split is the published one, of 10,000 images. The validation split is 5,000 of the 60,000 training images,
    drawn once and for all (see `validation_mask`); the train split is the other 55,000.

    Args:
        root: a directory with the four IDX files, gzipped or not, in it or in its FashionMNIST/raw. Without one they
            are taken from Debian's package, if it is installed, or from the cache, into which they are fetched
            once; the cache is $GRAINCODE_CACHE or ~/.cache/graincode.
    """

    image_size = (32, 32)
    class_names = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )

    def __init__(self, root: str | None = None):
        self._root = root

    def split(self, name: str) -> TensorImages:
        """Read the split "train", "val" or "test", which fetches the files if need be.

        Raises:
            GraincodeError: there is no such split, or files are missing, corrupt or not to be had.
        """
        check_split(name)
        folder = locate(self._root)
        images, labels = self._read(folder, "t10k" if name == "test" else "train")
        if name != "test":
            chosen = validation_mask(len(images), 12)
            chosen = chosen if name == "val" else ~chosen
            images, labels = images[chosen], labels[chosen]
        return TensorImages("fashion_mnist", name, images, labels, self.class_names)

    def _read(self, folder: Path, part: str) -> tuple[Tensor, Tensor]:
        """(N, 1, 32, 32) uint8 images and (N,) long labels of the part "train" or "t10k"."""
        files = [_find(folder, file) for file in FILES if file.startswith(part)]
        images, labels = (read_idx(file) for file in files)
        if images.shape[1:] != (28, 28):
            raise _corrupt(files[0], f"expected images of 28x28, found shape {images.shape}")
        if labels.shape != images.shape[:1]:
            raise _corrupt(files[1], f"expected {len(images)} labels, found shape {labels.shape}")
        if labels.max(initial=0) >= len(self.class_names):
            raise _corrupt(files[1], f"expected labels from 0 to 9, found {labels.max()}")
        padded = functional.pad(torch.from_numpy(images), (2, 2, 2, 2)).unsqueeze(1)
        return padded, torch.from_numpy(labels).long()


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
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
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


def locate(root: str | None) -> Path:
    """The directory that holds the four files, fetched into the cache if they are nowhere else.

    Args:
        root: the directory to take them from, or None to search.
    Raises:
        GraincodeError: the root lacks a file, or none of the ways to get the files works.
    """
    if root is not None:
        return _in_root(Path(root).expanduser())
    cache = cache_root() / "fashion-mnist"
    if found := first_complete("Fashion-MNIST", (DEBIAN_FOLDER, cache), _is_complete):
        return found
    if fetch("Fashion-MNIST", cache, FETCHERS, lambda folder: [_find(folder, file) for file in FILES]):
        return cache
    raise GraincodeError(
        f"Fashion-MNIST is neither in {DEBIAN_FOLDER} nor in {cache}, and {' and '.join(FETCHERS)} failed: connect to "
        f"the network, or install Debian's package {DEBIAN_PACKAGE}, or set GRAINCODE_CACHE to a directory that can "
        "be written, or type data.root=/folder/of/the/four/idx/files"
    )


def _fetch_with_torchvision(scratch: Path) -> Path:
    """Download the files, with their checksums verified; return the directory they are in."""
    import torchvision  # seconds, and only once

    with network_timeout():
        return Path(torchvision.datasets.FashionMNIST(str(scratch), download=True).raw_folder)


def _fetch_with_apt(scratch: Path) -> Path:
    """Download and unpack Debian's package; return the directory the files are in."""
    return unpack_debian_package(DEBIAN_PACKAGE, scratch) / DEBIAN_FOLDER.relative_to("/")


FETCHERS: dict[str, Callable[[Path], Path]] = {
    "torchvision's download": _fetch_with_torchvision,
    f"apt-get download {DEBIAN_PACKAGE}": _fetch_with_apt,
}


def _in_root(root: Path) -> Path:
    if found := first_complete("Fashion-MNIST", (root, root / "FashionMNIST" / "raw"), _is_complete):
        return found
    raise GraincodeError(
        f"data.root={root} lacks files of Fashion-MNIST: expected {', '.join(FILES)}, each with .gz or without, in it "
        "or in its FashionMNIST/raw: type data.root=/folder/of/these/files, or data.root=null to have them fetched"
    )


def _is_complete(folder: Path) -> bool:
    return all(_candidates(folder, file) for file in FILES)


def _find(folder: Path, file: str) -> Path:
    found = _candidates(folder, file)
    if not found:
        raise FileNotFoundError(f"{folder / file}[.gz] is missing")
    return found[0]


def _candidates(folder: Path, file: str) -> list[Path]:
    return [path for path in (folder / f"{file}.gz", folder / file) if path.is_file()]


def _corrupt(path: Path, reason: str) -> GraincodeError:
    return corrupt(path, reason, "idx/files")
