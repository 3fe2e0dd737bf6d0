"""Puts Open Clip Art, 8,121 public-domain pictures in 22 folders, where `data=image_folder` reads it.

    .venv/bin/python experiments/data/openclipart.py --squares 64
    graincode-train-tokenizer data=image_folder data.image_size=64 data.root=FOLDER data.cache=true

FOLDER, which the script prints, is $GRAINCODE_CACHE/openclipart-64 unless --folder says otherwise: squares.py says what
of a picture is kept. Without --squares it is $GRAINCODE_CACHE/openclipart, with the PNGs of Debian's package
openclipart-png as they come: transparent, of all sizes, some of them links to others. Both hold its copyright file.

Cost: 131 MB to fetch, 150 MB on disk, seconds; squares of 64 pixels take 6 minutes of a core and 27 MB more.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import debian
import squares

from graincode.files import cache_root, scratch_directory

PACKAGE = "openclipart-png"
PICTURES = Path("usr/share/openclipart/png")
COPYRIGHT = Path("usr/share/doc", PACKAGE, "copyright")


def prepare(folder: Path | None = None, root: Path | None = None) -> Path:
    """The folder of pictures, which is made if it is not there.

    Args:
        folder: where to; by default in the cache.
        root: a directory into which the package was unpacked; by default it is fetched.
    """
    folder = folder or cache_root() / "openclipart"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # a temporary directory, from which all is moved at once, so that other processes never see half of it
    with scratch_directory(folder.parent, "fetching") as scratch:
        unpacked = root or debian.unpack(PACKAGE, scratch)
        if not (unpacked / PICTURES).is_dir():
            raise SystemExit(f"{unpacked} lacks {PICTURES} of Debian's package {PACKAGE}")
        partial = scratch / "partial"
        shutil.copytree(unpacked / PICTURES, partial, symlinks=True)
        shutil.copy(unpacked / COPYRIGHT, partial)
        os.replace(partial, folder)
    return folder


def prepare_squares(size: int, folder: Path | None = None, root: Path | None = None) -> Path:
    """The folder of squares without the stars, made if it is not there; the arguments are those of `prepare`."""
    folder = folder or cache_root() / f"openclipart-{size}"
    if not folder.exists():
        pictures = prepare(root=root)
        stars = pictures / "shapes" / "stars"  # a quarter of the pictures: outlines of stars, drawn by a program
        files = [file for file in pictures.rglob("*.png") if not file.is_symlink() and stars not in file.parents]
        counts = squares.write_squares(pictures, folder, size, files)
        shutil.copy(pictures / "copyright", folder)
        print(", ".join(f"{count} {name}" for name, count in counts.items()), file=sys.stderr)
    return folder


def main() -> None:
    """Console entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--squares", type=int, metavar="SIZE", help="prepare squares of so many pixels a side")
    parser.add_argument("--folder", type=Path, help="where to, instead of the cache")
    parser.add_argument("--root", type=Path, help="where the package was unpacked, instead of fetching it")
    given = parser.parse_args()
    if given.squares is None:
        print(prepare(given.folder, given.root))
    else:
        print(prepare_squares(given.squares, given.folder, given.root))


if __name__ == "__main__":
    main()
