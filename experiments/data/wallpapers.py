"""Prepares crops of 37 natural photographs in Debian's packages of wallpapers as a folder of images.

    .venv/bin/python experiments/data/wallpapers.py --image-size 64
    graincode-train-tokenizer data=image_folder data.root=FOLDER data.image_size=64 data.cache=true

FOLDER, which the script prints, is $GRAINCODE_CACHE/wallpapers/64x64-512 unless --folder says otherwise. It has train/
(24 photographs), val/ (5), test/ (8) and licences.tsv. A hash of its path decides in which split a photograph is, so no
two splits share one. Crop k of a photograph is a function of that path and k alone: a window of the crop's aspect
ratio, whose share of the largest such window (in length) is log-uniform within --scale and whose position is uniform,
scaled down with an antialiased bicubic filter, never up. Files are numbered by k first, so the first n of a split are
of all its photographs.

Cost: 170 MB of packages, and for 512 crops of 64 pixels a few minutes of a CPU core and 200 MB.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import debian

from graincode.core.rng import uniforms
from graincode.data.decoding import open_image
from graincode.data.images import split_by_hash
from graincode.files import cache_root, scratch_directory

TABLE = Path(__file__).with_name("wallpapers.tsv")
FRACTIONS = {"test": 0.15, "val": 0.15}
SCALE = (0.2, 1.0)
CROPS = 512


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


def read_table() -> list[Photograph]:
    """The photographs of all packages, in the order of the table beside this script."""
    with TABLE.open(encoding="utf-8", newline="") as lines:
        return [Photograph(**row) for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]


def folder_of(image_size: tuple[int, int] = (64, 64), crops: int = CROPS, scale: tuple[float, float] = SCALE) -> Path:
    """Where `prepare` puts crops by default."""
    named = f"{image_size[0]}x{image_size[1]}-{crops}" + ("" if scale == SCALE else f"-{scale[0]}-{scale[1]}")
    return cache_root() / "wallpapers" / named


def prepare(
    image_size: tuple[int, int] = (64, 64),
    crops: int = CROPS,
    scale: tuple[float, float] = SCALE,
    folder: Path | None = None,
    root: Path | None = None,
) -> Path:
    """The folder of crops, which is made if it is not there.

    Args:
        image_size: (height, width) of the crops in pixels.
        crops: of each photograph.
        scale: least and greatest share, in (0, 1], of the length of the largest window.
        folder: where to; by default in the cache.
        root: a directory into which the packages were unpacked, all together or each in a sub-directory of its name;
            by default they are taken from where they are installed, or fetched.
    """
    folder = folder or folder_of(image_size, crops, scale)
    if folder.exists():
        return folder
    table = {photograph.path: photograph for photograph in read_table()}
    files = {path: _verified(photograph, root) for path, photograph in table.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_directory(folder.parent, "preparing") as scratch:
        partial = scratch / folder.name
        for split, paths in split_by_hash(list(table), FRACTIONS).items():
            (partial / split).mkdir(parents=True)
            for number, path in enumerate(tqdm(paths, split, unit=" photographs")):
                image = open_image(files[path])
                boxes = crop_boxes(path, range(crops), (image.height, image.width), image_size, scale)
                for k, box in enumerate(boxes):
                    # the gap makes large windows several times faster, at a difference of a level or so
                    crop = image.resize(image_size[::-1], Image.Resampling.BICUBIC, box, reducing_gap=3)
                    crop.save(partial / split / f"{k * len(paths) + number:08d}.png", compress_level=1)
        shutil.copy(TABLE, partial / "licences.tsv")
        os.replace(partial, folder)
    return folder


def crop_boxes(
    path: str, numbers: Sequence[int], size: tuple[int, int], image_size: tuple[int, int], scale: tuple[float, float]
) -> list[tuple[int, int, int, int]]:
    """The windows of crops of a photograph.

    Args:
        path: of the photograph, from which the random numbers come.
        numbers: of the crops, from 0.
        size: (height, width) of the photograph in pixels.
        image_size, scale: as in `prepare`.
    Returns:
        Left, top, right and bottom of each, in pixels.
    Raises:
        SystemExit: the photograph is smaller than its crops.
    """
    largest = min(size[0] / image_size[0], size[1] / image_size[1])
    if largest < 1:
        raise SystemExit(f"{path} has {size[0]} x {size[1]} pixels, too few for crops of {image_size}")
    least, greatest = (max(share * largest, 1.0) for share in scale)
    seed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")
    boxes = []
    for zoom, across, down in uniforms(seed, numbers, 3).tolist():
        factor = least * (greatest / least) ** zoom
        height, width = (min(round(factor * side), limit) for side, limit in zip(image_size, size, strict=True))
        left, top = int(across * (size[1] - width + 1)), int(down * (size[0] - height + 1))
        boxes.append((left, top, left + width, top + height))
    return boxes


def _verified(photograph: Photograph, root: Path | None) -> Path:
    """The file of a photograph, fetched if need be.

    Raises:
        SystemExit: the root lacks it, the package cannot be fetched, or its file is another one.
    """
    cache = cache_root() / "wallpapers" / photograph.package
    folders = (Path("/"), cache) if root is None else (root, root / photograph.package)
    found = next((folder / photograph.path for folder in folders if (folder / photograph.path).is_file()), None)
    if found is None:
        if root is not None:
            raise SystemExit(f"{root} lacks {photograph.path} of Debian's package {photograph.package}")
        cache.mkdir(parents=True, exist_ok=True)
        with scratch_directory(cache, "fetching") as scratch:
            unpacked = debian.unpack(photograph.package, scratch)
            for part in (path for path in unpacked.iterdir() if path.is_dir() and not (cache / path.name).exists()):
                os.replace(part, cache / part.name)
        found = cache / photograph.path
    if not found.is_file() or hashlib.sha256(found.read_bytes()).hexdigest() != photograph.sha256:
        raise SystemExit(f"{found} is not the photograph of {photograph.package} {photograph.version}: remove it")
    return found


def main() -> None:
    """Console entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image-size", type=int, nargs="+", default=[64], help="side, or height and width")
    parser.add_argument("--crops", type=int, default=CROPS, help="of each photograph")
    parser.add_argument("--scale", type=float, nargs=2, default=SCALE, help="least and greatest share of the window")
    parser.add_argument("--folder", type=Path, help="where to, instead of the cache")
    parser.add_argument("--root", type=Path, help="where the packages were unpacked, instead of fetching them")
    given = parser.parse_args()
    size = (given.image_size[0], given.image_size[-1])
    print(prepare(size, given.crops, tuple(given.scale), given.folder, given.root))


if __name__ == "__main__":
    main()
