"""Data sets that are directories of image files: any, ImageNet's and FFHQ's."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from graincode.core.errors import GraincodeError, check_choice, one_line
from graincode.data.encoded import Files, numbered_classes
from graincode.data.images import SPLIT_NAMES
from graincode.data.scanning import image_files
from graincode.data.sources import EncodedSource
from graincode.data.stylegan import read_labels, zip_files

FFHQ_TRAIN = 60_000
_logger = logging.getLogger(__name__)


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
        return tuple(map(one_line, sorted(example)))

    def _encoded(self, split: str) -> tuple[Files, Tensor]:
        files, names = self._splits[split], self.class_names
        label_of = {folder: label for label, folder in enumerate(names)}
        labels = [label_of[one_line(_top_folder(path))] if names else 0 for path in files.paths]
        return files, torch.tensor(labels, dtype=torch.long)

    def _files(self, base: Path) -> Files:
        return image_files(base, self._root, self.allow_outside)

    def _divided(self, files: Files, given: Iterable[str] = ()) -> dict[str, Files]:
        return {name: files.of(paths) for name, paths in self._take_out(files.paths, given).items()}

    def _base(self, folders: tuple[str, ...], inside: tuple[str, ...] = ()) -> Path:
        """The first of some folders of the root that is one and has all of the directories."""
        for base in (self._root / folder for folder in folders):
            if all((base / name).is_dir() for name in ("", *inside)):
                return base
        if not self._root.exists():
            raise GraincodeError(f"{self._origin}: no such folder")
        where = " or its ".join(("it", *filter(None, folders)))
        raise GraincodeError(f"{self._origin}: expected {' and '.join(inside) or 'images'} in {where}")


@dataclass(eq=False)
class ImageFolder(FileSource):
    """A directory or .zip of images as a data set, with the classes and splits that its sub-directories show.

    Which files count is said at `image_files`; what a .zip has is read in place.

    With splits="folders", directories that have images and are called train or training, val, valid, validation or dev,
    test or testing (in any case) are the splits; they may lie in one directory of the root. Those of val and test that
    are missing are taken out of train. Without such directories, and with splits="none", all three are taken out of the
    whole.

    Classes are the first-level directories (of each split), sorted by name; images that lie in none are unlabelled.
    StyleGAN's dataset.json in the root says the label of each image instead.
    """

    root: str | None
    _: KW_ONLY
    image_size: int | Sequence[int] = 64
    test_fraction: float = 0.05
    classes: Literal["folders", "none"] = "folders"
    splits: Literal["folders", "none"] = "folders"

    def __post_init__(self) -> None:
        check_choice("splits", self.splits, ("folders", "none"))
        super().__post_init__()

    @cached_property
    def _all(self) -> Files:
        is_zip = self._root.suffix.lower() == ".zip" and not self._root.is_dir()
        return zip_files(self._root) if is_zip else self._files(self._base(("",)))

    @cached_property
    def _labels(self) -> dict[str, int] | None:
        """StyleGAN's labels by paths, if there are any; empty if it says that there are none."""
        return None if self.classes == "none" else read_labels(self._all)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        if self._labels is None:
            return super().class_names
        return numbered_classes(max(self._labels.values()), str(self._root)) if self._labels else ()

    def _encoded(self, split: str) -> tuple[Files, Tensor]:
        if not self._labels:
            return super()._encoded(split)
        files = self._splits[split]
        return files, torch.tensor([self._labels[path] for path in files.paths], dtype=torch.long)

    @cached_property
    def _splits(self) -> dict[str, Files]:
        given = {} if self.splits == "none" or self._labels is not None else split_folders(self._all)
        return given | self._divided(given.get("train", self._all), given)


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
        train, test = self._files(base / "train"), self._files(base / "val")
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
        path_of, files = {}, self._files(base)
        for path in files.paths:
            number = Path(path).stem
            if not number.isdecimal() or number in path_of:
                raise GraincodeError(f"{base / path}: expected each number once, as in 00000.png; move it away")
            path_of[number] = path
        parts = self._take_out(number for number in path_of if int(number) < FFHQ_TRAIN)
        parts["test"] = [number for number in path_of if int(number) >= FFHQ_TRAIN]
        return {name: files.of([path_of[number] for number in numbers]) for name, numbers in parts.items()}


def split_folders(files: Files) -> dict[str, Files]:
    """The files of the splits that directories are named after (see `ImageFolder`); empty if none is.

    Raises:
        GraincodeError: whether such a directory is a split or a class cannot be told.
    """
    folders = {_top_folder(path) for path in files.paths}
    while len(folders) == 1 and "" not in folders and not _split_of(*folders):  # a directory around all
        files = files.below(f"{folders.pop()}/")
        folders = {_top_folder(path) for path in files.paths}
    named: dict[str, str] = {}
    for folder in sorted(filter(_split_of, folders)):
        if (part := SPLIT_NAMES[folder.lower()]) in named:
            raise GraincodeError(f"{files.base}: {named[part]!r} and {folder!r} are both {part}: move one away")
        named[part] = folder
    others = sorted(folders - {"", *named.values()})
    if named and ("train" not in named or (len(named) == 1 and others)):
        seen = f"{min(named.values())!r}, the name of a split, {f'beside {others[0]!r}' if others else 'and no train'}"
        raise GraincodeError(f"{files.base}: found {seen}: move one away, or give splits=none if all are classes")
    parts = {part: files.below(f"{folder}/") for part, folder in named.items()}
    if named and (count := len(files.paths) - sum(len(part.paths) for part in parts.values())):
        example = next(path for path in files.paths if _top_folder(path) not in named.values())
        _logger.warning("%s: left out %d images beside its splits, such as %r", files.base, count, example)
    return parts


def _split_of(folder: str) -> str | None:
    """The split that a directory's name says, in any case."""
    return SPLIT_NAMES.get(folder.lower())


def _top_folder(path: str) -> str:
    """First directory of a relative path; empty for a bare file name."""
    return path.rpartition("/")[0].partition("/")[0]
