"""Images in Hugging Face data sets, on this computer or at the hub."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graincode.core.errors import GraincodeError, check, check_choice
from graincode.data.encoded import files_identity, numbered_classes, read_file
from graincode.data.scanning import leads_outside
from graincode.data.sources import EncodedSource

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Rows:
    """Rows of a table that has images, not decoded, as its only column (see `Encoded`)."""

    table: Dataset
    column: str
    rows: tuple[int, ...]
    origin: str
    inside: tuple[Path, ...] | None

    def name(self, index: int) -> str:
        return f"row {self.rows[index]} of {self.origin}"

    def read(self, index: int) -> bytes:
        cell = self.table[self.rows[index]][self.column] or {}
        path = cell.get("path")
        if cell.get("bytes") is not None or not path:
            return cell.get("bytes") or b""
        if self.inside is not None and leads_outside(path, *self.inside):
            lies = f"{self.name(index)} is the file {path!r}, which lies outside of it"
            raise GraincodeError(f"{lies}: remove the row, or give allow_outside=true")
        return read_file(Path(path))

    def identity(self) -> str:
        import pyarrow.compute as arrow

        cells = self.table.with_format("arrow")[:][self.column]  # nothing but the paths is read
        named = arrow.filter(arrow.struct_field(cells, "path"), arrow.is_null(arrow.struct_field(cells, "bytes")))
        paths = sorted(path for path in named.to_pylist() if path)
        files = files_identity([*(Path(file["filename"]) for file in self.table.cache_files), *map(Path, paths)])
        key = [self.table._fingerprint, files, self.column, self.rows]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()


@dataclass(eq=False)
class HuggingFace(EncodedSource):
    """A Hugging Face data set of images; needs the package `datasets`.

    Files are decoded here; no code that comes with a data set is run. Splits depend on the numbers of rows.

    Args:
        path: a directory that `save_to_disk` wrote, a folder of Parquet or image files, one .parquet file, or a name
            at the hub, from which it is fetched once into the cache of that package.
        name: which configuration, if the data set has several.
        image_key: the column of images, or of their files as bytes.
        label_key: the column of labels, class labels or whole numbers from 0; None for unlabelled images.
        splits: the data set's names for "train", "val" and "test"; None to take val or test out of train.
        others: as in `EncodedSource`.
    """

    path: str | None
    _: KW_ONLY
    name: str | None = None
    image_key: str = "image"
    label_key: str | None = None
    splits: Mapping[str, str | None] | None = None
    test_fraction: float = 0.05

    path_argument = "path"

    def __post_init__(self) -> None:
        super().__post_init__()
        splits = {"train": "train"} if self.splits is None else dict(self.splits)
        is_named = bool(splits.get("train")) and all(isinstance(value, str | None) for value in splits.values())
        check("splits", splits, "the data set's names for train and, unless null, for val and test", is_named)
        self._given = {ours: theirs for ours, theirs in splits.items() if theirs}

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        if self.label_key is None:
            return ()
        names = tuple(getattr(self._tables["train"].features[self.label_key], "names", None) or ())
        values = {value for split in self._given for value in self._labels(split)}
        known = f"whole numbers from 0{f' to {len(names) - 1}' if names else ''}"
        for value in values:
            is_label = type(value) is int and 0 <= value < (len(names) or math.inf)
            check("label_key", self.label_key, f"{known}, found {value!r} in {self._origin}", is_label)
        return names or numbered_classes(max(values), f"label_key={self.label_key}")

    def _encoded(self, split: str) -> tuple[Rows, Tensor]:
        base = split if split in self._given else "train"
        column = self._tables[base].select_columns([self.image_key]).with_format(None)
        from datasets import Image

        try:
            table = column.cast_column(self.image_key, Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:  # among which are those of pyarrow
            raise GraincodeError(f"image_key={self.image_key}: expected a column of images") from error
        rows = list(range(len(table)))
        if base == "train":
            rows = sorted(map(int, self._take_out(map(str, rows), self._given)[split]))
        labels = torch.tensor(self._labels(base) if self.class_names else [0] * len(table), dtype=torch.long)[rows]
        name = f"{self._given[base]} in {self._origin}"
        return Rows(table, self.image_key, tuple(rows), name, self._inside), labels

    @property
    def _inside(self) -> tuple[Path, ...] | None:
        """Where the files may lie that rows name: in the data set's directory, or where the package puts them."""
        from datasets import config
        from huggingface_hub import constants

        local = Path(self.path).expanduser()
        caches = Path(config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE)
        return None if self.allow_outside else (*caches, local) if local.is_dir() else caches

    def _labels(self, split: str) -> list[Any]:
        """The labels of all rows of one of the data set's own splits."""
        column = self._tables[split].select_columns([self.label_key]).with_format("arrow")[:]
        return column[self.label_key].to_pylist()

    @cached_property
    def _tables(self) -> dict[str, Dataset]:
        """The data set's own splits by our names for them."""
        found = self._load()
        for ours, theirs in self._given.items():
            check_choice(f"splits.{ours}", theirs, tuple(found))
            for key in ("image_key", "label_key"):
                if (column := getattr(self, key)) is not None:
                    check_choice(key, column, tuple(found[theirs].features))
        return {ours: found[theirs] for ours, theirs in self._given.items()}

    def _load(self) -> Mapping[str, Dataset]:
        try:
            import datasets
        except ImportError as error:
            raise GraincodeError("the package datasets is not installed: pip install graincode[hf]") from error
        local = Path(self.path).expanduser()
        logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it says each error, which then is ours to say
        try:
            if (local / "dataset_dict.json").is_file():
                return datasets.load_from_disk(str(local))
            if (local / "state.json").is_file():
                return {"train": datasets.load_from_disk(str(local))}
            if local.is_file():
                return datasets.load_dataset("parquet", data_files=str(local), trust_remote_code=False)
            path = str(local) if local.is_dir() else self.path
            return datasets.load_dataset(path, self.name, trust_remote_code=False)
        except Exception as error:  # anything from a broken file to a broken connection
            reason = " ".join(str(error.__cause__ or error).split())
            expected = f"expected what datasets can load ({reason})"
            raise GraincodeError(f"{self._origin} name={self.name}: {expected}") from error
