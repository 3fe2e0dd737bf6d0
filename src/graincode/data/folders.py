"""Data sets that are directories of image files: any, ImageNet's and FFHQ's."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.data.encoded import Crop, EncodedSource, OnCorrupt, file_error, files_identity
from graincode.data.images import EXTENSIONS, SPLITS, check_choice

FFHQ_TRAIN = 60_000


@dataclass(frozen=True)
class Files:
    """Image files on disk (see `Encoded`).

    Args:
        base: a directory.
        paths: of the files, relative to it, with forward slashes.
    """

    base: Path
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.base / self.paths[index])

    def read(self, index: int) -> bytes:
        path = self.base / self.paths[index]
        try:
            return path.read_bytes()
        except OSError as error:
            raise file_error(path, error) from error

    def identity(self) -> str:
        return files_identity((path, self.base / path) for path in self.paths)


class FileSource(EncodedSource):
    """Image files below a directory; a subclass says which of them are in which split.

    Args:
        root: the directory; `~` is expanded.
        classes: "folders" for the first-level directories (of each split), "none" for unlabelled images.
        image_size, crop, cache, on_corrupt, fractions: as in `EncodedSource`.
    Raises:
        GraincodeError: an argument is not as above. Whether the root exists is found out on the first use.
    """

    def __init__(
        self,
        root: str | None,
        classes: Literal["folders", "none"],
        image_size: int | Sequence[int],
        crop: Crop,
        cache: bool,
        on_corrupt: OnCorrupt,
        fractions: Mapping[str, float],
    ) -> None:
        if not root:
            raise GraincodeError("data.root is not set: type data.root=/path/to/images")
        super().__init__(f"data.root={root}", image_size, crop, cache, on_corrupt, fractions)
        self._root = Path(os.path.abspath(os.path.expanduser(root)))
        check_choice("classes", classes, ("folders", "none"))
        self._classes = classes
        self.name = self._root.name

    @property
    @abstractmethod
    def _splits(self) -> dict[str, Files]:
        """The files of each split, sorted; empty where there are none."""

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        if self._classes == "none":
            return ()
        example = {_top_folder(path): files.base / path for files in self._splits.values() for path in files.paths}
        names = tuple(sorted(example))
        if names == ("",):
            return ()
        if "" in example:
            raise GraincodeError(
                f"{example['']} lies beside the class folders, not in one: "
                "move it into one, or type data.classes=none for unlabelled images"
            )
        return names

    def _encoded(self, split: str) -> tuple[Files, Tensor]:
        files, names = self._splits[split], self.class_names
        label_of = {folder: label for label, folder in enumerate(names)}
        labels = [label_of[_top_folder(path)] if names else 0 for path in files.paths]
        return files, torch.tensor(labels, dtype=torch.long)


class ImageFolder(FileSource):
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
        cache, on_corrupt: as in `EncodedSource`.
    Raises:
        GraincodeError: an argument is not as above. Whether the root exists is found out on the first use.
    """

    def __init__(
        self,
        root: str | None,
        image_size: int | Sequence[int] = 64,
        crop: Crop = "center",
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        classes: Literal["folders", "none"] = "folders",
        cache: bool = False,
        on_corrupt: OnCorrupt = "error",
    ):
        fractions = {"test": test_fraction, "val": val_fraction}
        super().__init__(root, classes, image_size, crop, cache, on_corrupt, fractions)

    @cached_property
    def _splits(self) -> dict[str, Files]:
        if not self._root.is_dir():
            raise GraincodeError(f"{self._origin} is not a directory: type data.root=/path/to/images")
        given = [name for name in SPLITS if (self._root / name).is_dir()]
        folders = [path for path in self._root.iterdir() if path.is_dir() and not path.name.startswith(".")]
        if "train" not in given or (len(given) == 1 and len(folders) > 1):
            given = []
        base = self._root / "train" if given else self._root
        parts = self._take_out(image_files(base), given)
        found = {name: Files(base, tuple(paths)) for name, paths in parts.items()}
        for name in given:
            if name != "train":
                found[name] = Files(self._root / name, tuple(image_files(self._root / name)))
        return found


class ImageNet(FileSource):
    """ImageNet's ILSVRC 2012 in its usual layout: train/WNID/*.JPEG and val/WNID/*.JPEG.

    The test split is the published validation set (50,000 images), as the published test set has no labels. The val
    split is a part of train/, decided by a hash of each file's relative path. Class names are the sorted WordNet ids.

    Args:
        root: the directory of train/ and val/, or one that has them in its ILSVRC/Data/CLS-LOC; `~` is expanded.
        val_fraction: share of the training images to validate on, in [0, 1).
        image_size, crop, cache, on_corrupt: as in `EncodedSource`.
    Raises:
        GraincodeError: an argument is not as above. Whether the files are there is found out on the first use.
    """

    def __init__(
        self,
        root: str | None,
        image_size: int | Sequence[int] = 256,
        crop: Crop = "center",
        val_fraction: float = 0.01,
        cache: bool = False,
        on_corrupt: OnCorrupt = "error",
    ):
        super().__init__(root, "folders", image_size, crop, cache, on_corrupt, {"val": val_fraction})
        self.name = "imagenet"

    @cached_property
    def _splits(self) -> dict[str, Files]:
        bases = (self._root, self._root / "ILSVRC" / "Data" / "CLS-LOC")
        base = next((base for base in bases if (base / "train").is_dir() and (base / "val").is_dir()), None)
        if base is None:
            raise GraincodeError(
                f"{self._origin} has no train and val in it or in its ILSVRC/Data/CLS-LOC: "
                "type data.root=/path/to/imagenet"
            )
        train, test = image_files(base / "train"), image_files(base / "val")
        classes = {_top_folder(path) for path in train}
        for part, paths in (("train", train), ("val", test)):
            for path in paths:
                if _top_folder(path) not in classes - {""}:
                    raise GraincodeError(
                        f"{base / part / path}: expected it in a class folder of {base / 'train'}, such as "
                        f"{part}/n01440764: sort the images of {part} into folders by their WordNet id"
                    )
        parts = self._take_out(train) | {"test": test}
        return {name: Files(base / ("val" if name == "test" else "train"), tuple(parts[name])) for name in SPLITS}


class FFHQ(FileSource):
    """Flickr-Faces-HQ (Karras et al., 2019): 70,000 unlabelled faces in files numbered from 00000.png.

    The test split is the published one, numbers from 60000 on. The val split is a part of those below, decided by a
    hash of each file's number.

    Args:
        root: a directory with images1024x1024/ or thumbnails128x128/ (the first of these is taken), or one of the
            numbered files themselves, flat or in folders of a thousand; `~` is expanded.
        val_fraction: share of the training images to validate on, in [0, 1).
        image_size, crop, cache, on_corrupt: as in `EncodedSource`.
    Raises:
        GraincodeError: an argument is not as above. Whether the files are there is found out on the first use.
    """

    def __init__(
        self,
        root: str | None,
        image_size: int | Sequence[int] = 256,
        crop: Crop = "center",
        val_fraction: float = 0.05,
        cache: bool = False,
        on_corrupt: OnCorrupt = "error",
    ):
        super().__init__(root, "none", image_size, crop, cache, on_corrupt, {"val": val_fraction})
        self.name = "ffhq"

    @cached_property
    def _splits(self) -> dict[str, Files]:
        bases = (self._root / "images1024x1024", self._root / "thumbnails128x128", self._root)
        base = next((base for base in bases if base.is_dir()), None)
        if base is None:
            raise GraincodeError(f"{self._origin} is not a directory: type data.root=/path/to/ffhq")
        path_of = {}
        for path in image_files(base):
            number = Path(path).stem
            if not number.isdecimal() or number in path_of:
                raise GraincodeError(
                    f"{base / path}: expected each number once, as in 00000.png: "
                    "move other files away, or type data=image_folder"
                )
            path_of[number] = path
        parts = self._take_out(number for number in path_of if int(number) < FFHQ_TRAIN)
        parts["test"] = [number for number in path_of if int(number) >= FFHQ_TRAIN]
        return {name: Files(base, tuple(path_of[number] for number in parts[name])) for name in SPLITS}


def image_files(base: Path, key: str = "data.root") -> list[str]:
    """Relative paths, with forward slashes, of the images below a directory, sorted.

    Raises:
        GraincodeError: there are none; `key` is what gives the directory.
    """
    files = []
    for folder, folders, names in os.walk(base, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(folder).relative_to(base).as_posix()
        files += [
            name if inside == "." else f"{inside}/{name}"
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    if not files:
        raise GraincodeError(
            f"{base} has no images, that is, files that end in {' '.join(EXTENSIONS)}: type {key}=/path/to/images"
        )
    return sorted(files)


def _top_folder(path: str) -> str:
    """First directory of a relative path; empty for a bare file name."""
    return path.rpartition("/")[0].partition("/")[0]
