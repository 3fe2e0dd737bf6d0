"""Images in Hugging Face data sets, on this computer or at the hub."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.data.encoded import Crop, EncodedSource, OnCorrupt, file_error, files_identity

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Rows:
    """Images in rows of a table (see `Encoded`).

    Args:
        table: its only column has the images, not decoded.
        column: name of the column.
        rows: of the images.
        origin: what errors call the table.
    """

    table: Dataset
    column: str
    rows: tuple[int, ...]
    origin: str

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"row {self.rows[index]} of {self.origin}"

    def read(self, index: int) -> bytes:
        cell = self.table[self.rows[index]][self.column] or {}
        if cell.get("bytes") is None and cell.get("path"):
            try:
                return Path(cell["path"]).read_bytes()
            except OSError as error:
                raise file_error(Path(cell["path"]), error) from error
        return cell.get("bytes") or b""

    def identity(self) -> str:
        paths = [Path(file["filename"]) for file in self.table.cache_files]
        files = files_identity((path.name, path) for path in paths)
        key = [self.table._fingerprint, files, self.column, self.rows]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()


class HuggingFace(EncodedSource):
    """A Hugging Face data set of images; needs the package `datasets`.

    Files are decoded here, as those of `ImageFolder` are, so that the same files give the same pixels. No code that
    comes with a data set is run.

    Args:
        path: a directory that `save_to_disk` wrote, a folder of Parquet or image files, one .parquet file, or a name
            at the hub, from which it is fetched once into the cache of that package.
        name: which configuration, if the data set has several.
        image_key: the column of images, or of their files as bytes.
        label_key: the column of labels, class labels or whole numbers from 0; None for unlabelled images.
        splits: for "train", "val" and "test", the data set's name for that split; None to take val or test out of
            train, decided by a hash of each row's number.
        image_size, crop, cache, on_corrupt: as in `EncodedSource`.
        val_fraction: share of the train split to validate on, in [0, 1); unused if `splits` names one for val.
        test_fraction: share of the train split to test on, in [0, 1); unused if `splits` names one for test.
    Raises:
        GraincodeError: an argument is not as above. Whether the data set is there is found out on the first use.
    """

    def __init__(
        self,
        path: str | None,
        name: str | None = None,
        image_key: str = "image",
        label_key: str | None = None,
        splits: Mapping[str, str | None] | None = None,
        image_size: int | Sequence[int] = 256,
        crop: Crop = "center",
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        cache: bool = False,
        on_corrupt: OnCorrupt = "error",
    ):
        if not path:
            raise GraincodeError("data.path is not set: type data.path=/a/directory or data.path=a/name-at-the-hub")
        fractions = {"test": test_fraction, "val": val_fraction}
        super().__init__(f"data.path={path}", image_size, crop, cache, on_corrupt, fractions)
        splits = {"train": "train"} if splits is None else splits
        if not splits.get("train") or not all(isinstance(value, str | None) for value in splits.values()):
            raise GraincodeError(
                f"data.splits={dict(splits)}: expected the data set's names for train and, unless they are null, for "
                "val and test: type data.splits.train=train"
            )
        self._given = {ours: theirs for ours, theirs in splits.items() if theirs}
        self._path, self._config_name = path, name
        self._image_key, self._label_key = image_key, label_key
        self.name = Path(path).name

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        if self._label_key is None:
            return ()
        feature = self._tables["train"].features[self._label_key]
        names = tuple(getattr(feature, "names", None) or ())
        values = {value for split in self._given for value in self._labels(split)}
        for value in values:
            if type(value) is not int or value < 0 or (names and value >= len(names)):
                raise GraincodeError(
                    f"{self._origin} has the label {value!r} in its column {self._label_key!r}: expected whole "
                    f"numbers from 0{f' to {len(names) - 1}' if names else ''}: type data.label_key=null for images "
                    "without labels, or null for a split whose labels are not published"
                )
        return names or tuple(map(str, range(max(values) + 1)))

    def _encoded(self, split: str) -> tuple[Rows, Tensor]:
        base = split if split in self._given else "train"
        table = self._image_column(self._tables[base])
        rows = range(len(table))
        if base == "train":
            rows = sorted(map(int, self._take_out(map(str, rows), self._given)[split]))
        labels = torch.zeros(len(rows), dtype=torch.long)
        if self.class_names:
            labels = torch.tensor(self._labels(base), dtype=torch.long)[list(rows)]
        return Rows(table, self._image_key, tuple(rows), f"{self._given[base]} in {self._origin}"), labels

    def _labels(self, split: str) -> list[Any]:
        """The labels of all rows of one of the data set's own splits."""
        column = self._tables[split].select_columns([self._label_key]).with_format("arrow")[:]
        return column[self._label_key].to_pylist()

    def _image_column(self, table: Dataset) -> Dataset:
        from datasets import Image

        column = table.select_columns([self._image_key]).with_format(None)
        try:
            return column.cast_column(self._image_key, Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:  # among which are those of pyarrow
            raise GraincodeError(
                f"data.image_key={self._image_key}: expected a column of images in {self._origin}, found "
                f"{table.features[self._image_key]}: type data.image_key= another of {', '.join(table.features)}"
            ) from error

    @cached_property
    def _tables(self) -> dict[str, Dataset]:
        """The data set's own splits by our names for them."""
        found = self._load()
        for ours, theirs in self._given.items():
            if theirs not in found:
                raise GraincodeError(
                    f"data.splits.{ours}={theirs}: expected one of {', '.join(found)}, the splits of {self._origin}"
                    + (f": type data.splits.{ours}=null to take it out of train" if ours != "train" else "")
                )
            for key, column in (("image_key", self._image_key), ("label_key", self._label_key)):
                if column is not None and column not in found[theirs].features:
                    columns = ", ".join(found[theirs].features)
                    raise GraincodeError(
                        f"data.{key}={column}: expected a column of {theirs} in {self._origin}: "
                        f"type data.{key}= one of {columns}"
                    )
        return {ours: found[theirs] for ours, theirs in self._given.items()}

    def _load(self) -> Mapping[str, Dataset]:
        try:
            import datasets
        except ImportError as error:
            raise GraincodeError(
                "data=hf needs the package datasets, which is not installed: type pip install graincode[hf]"
            ) from error
        local = Path(os.path.expanduser(self._path))
        try:
            if (local / "dataset_dict.json").is_file():
                return datasets.load_from_disk(str(local))
            if (local / "state.json").is_file():
                return {"train": datasets.load_from_disk(str(local))}
            if local.is_file():
                return datasets.load_dataset("parquet", data_files=str(local), trust_remote_code=False)
            path = str(local) if local.is_dir() else self._path
            return datasets.load_dataset(path, self._config_name, trust_remote_code=False)
        except Exception as error:  # anything from a broken file to a broken connection
            raise GraincodeError(
                f"{self._origin} cannot be loaded ({' '.join(str(error).split())}): type data.path= a directory that "
                "save_to_disk wrote, a folder or file of Parquet, or a name at the hub, and data.name= one of its "
                "configurations if it has several"
            ) from error
