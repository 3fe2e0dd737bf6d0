"""Data sets that are directories of image files: any, ImageNet's and FFHQ's."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from graincode.core.errors import GraincodeError, check_choice
from graincode.data.decoding import EXTENSIONS
from graincode.data.encoded import EncodedSource, Files
from graincode.data.images import SPLITS

FFHQ_TRAIN = 60_000


class FileSource(EncodedSource):
    """Image files below a directory; a subclass says which of them are in which split."""

    classes: Literal["folders", "none"]  # "folders": the first-level directories (of each split)

    def __post_init__(self) -> None:
        check_choice("classes", self.classes, ("folders", "none"))
        super().__post_init__()

    @property
    @abstractmethod
    def _splits(self) -> dict[str, Files]:
        """The files of each split, sorted; empty where there are none."""

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        if self.classes == "none":
            return ()
        example = {_top_folder(path): files.base / path for files in self._splits.values() for path in files.paths}
        if example.keys() == {""}:
            return ()
        if "" in example:
            raise GraincodeError(f"{example['']} lies beside the class folders: move it, or give classes=none")
        return tuple(sorted(example))

    def _encoded(self, split: str) -> tuple[Files, Tensor]:
        files, label_of = self._splits[split], {folder: label for label, folder in enumerate(self.class_names)}
        labels = [label_of[_top_folder(path)] if label_of else 0 for path in files.paths]
        return files, torch.tensor(labels, dtype=torch.long)

    def _divided(self, files: Files, given: Sequence[str] = ()) -> dict[str, Files]:
        return {name: Files(files.base, paths) for name, paths in self._take_out(files.paths, given).items()}

    def _base(self, folders: tuple[str, ...], inside: tuple[str, ...] = ()) -> Path:
        """The first of some folders of the root that is one and has all of the directories."""
        for base in (self._root / folder for folder in folders):
            if all((base / name).is_dir() for name in ("", *inside)):
                return base
        raise GraincodeError(f"{self._origin}: expected {' and '.join(inside) or 'images'} in it or its {folders[-1]}")


@dataclass(eq=False)
class ImageFolder(FileSource):
    """A directory of images as a data set, with the classes and splits that its sub-directories show.

    Files with one of the `EXTENSIONS` count, at any depth, unless their name or directory begins with a dot.

    If the root has train/ and also val/ or test/, or train/ and no other directory, these are the splits, and those of
    val and test that are missing are taken out of train/. Otherwise all three are taken out of the root.

    Classes are the first-level directories (of each split), sorted by name; images that lie in none are unlabelled.
    """

    root: str | None
    _: KW_ONLY
    image_size: int | Sequence[int] = 64
    test_fraction: float = 0.05
    classes: Literal["folders", "none"] = "folders"

    @cached_property
    def _splits(self) -> dict[str, Files]:
        root = self._base(("",))
        folders = [path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
        given = [name for name in SPLITS if name in folders]
        if "train" not in given or (len(given) == 1 and len(folders) > 1):
            given = []
        parts = self._divided(image_files(root / "train" if given else root), given)
        return parts | {name: image_files(root / name) for name in given if name != "train"}


@dataclass(eq=False)
class ImageNet(FileSource):
    """ImageNet's ILSVRC 2012 in its usual layout, train/WNID/*.JPEG and val/WNID/*.JPEG in the root.

    They may be in the root's ILSVRC/Data/CLS-LOC. The test split is the published validation set (50,000 images), as
    the published test set has no labels; the val split is a part of train/. Class names are the sorted WordNet ids.
    """

    root: str | None
    _: KW_ONLY
    val_fraction: float = 0.01

    classes = "folders"
    _name = "imagenet"

    @cached_property
    def _splits(self) -> dict[str, Files]:
        base = self._base(("", "ILSVRC/Data/CLS-LOC"), ("train", "val"))
        train, test = image_files(base / "train"), image_files(base / "val")
        classes = {_top_folder(path) for path in train.paths} - {""}
        for files in (train, test):
            if stray := [path for path in files.paths if _top_folder(path) not in classes]:
                raise GraincodeError(f"{files.base / stray[0]}: expected it in a class folder, such as n01440764")
        return self._divided(train) | {"test": test}


@dataclass(eq=False)
class FFHQ(FileSource):
    """Flickr-Faces-HQ (Karras et al., 2019): 70,000 unlabelled faces in files numbered from 00000.png.

    The root has images1024x1024/ or thumbnails128x128/ (the first of these is taken), or the files themselves, flat or
    in folders of a thousand. The test split is the published one, numbers from 60000 on; val is a part of the others.
    """

    root: str | None

    classes = "none"
    _name = "ffhq"

    @cached_property
    def _splits(self) -> dict[str, Files]:
        base = self._base(("images1024x1024", "thumbnails128x128", ""))
        path_of = {}
        for path in image_files(base).paths:
            number = Path(path).stem
            if not number.isdecimal() or number in path_of:
                raise GraincodeError(f"{base / path}: expected each number once, as in 00000.png; move it away")
            path_of[number] = path
        parts = self._take_out(number for number in path_of if int(number) < FFHQ_TRAIN)
        parts["test"] = [number for number in path_of if int(number) >= FFHQ_TRAIN]
        return {name: Files(base, [path_of[number] for number in numbers]) for name, numbers in parts.items()}


def image_files(base: Path) -> Files:
    """The images below a directory, sorted by their paths; refuses one without images."""
    files = []
    for folder, folders, names in os.walk(base, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = [name for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
        files += [(Path(folder).relative_to(base) / name).as_posix() for name in shown]
    if not files:
        raise GraincodeError(f"{base}: expected images in it, files that end in {' '.join(EXTENSIONS)}")
    return Files(base, sorted(files))


def _top_folder(path: str) -> str:
    """First directory of a relative path; empty for a bare file name."""
    return path.rpartition("/")[0].partition("/")[0]
