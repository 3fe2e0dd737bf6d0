"""Pictures of all sizes as squares for training: whole, each once, near-duplicates in one split."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from graincode.core.errors import GraincodeError
from graincode.data.decoding import open_image
from graincode.files import scratch_directory, write_json

SMALLEST_CLASS, OTHERS = 100, "other"
SHARES = {"val": 0.08, "test": 0.12}  # of the groups; the rest are for training
THUMBNAIL, NEAR = 16, 0.04  # pixels of a side; root mean square difference of two, of the range of values
MARGIN = 8  # a margin is where no value is further from white


def write_squares(source: Path, folder: Path, size: int, files: Iterable[Path]) -> dict[str, int]:
    """A folder `train|val|test/CLASS/NAME.png` of squares, RGB on white, that `data=image_folder` reads, and a list.

    Empty margins are removed; what is left is scaled to fit into the square, and nothing of it is cut off. A
    picture's class is the first folder of its path in `source`; those with fewer than 100 pictures are one class.
    Left out are pictures that cannot be read, that are empty, smaller than a square, of one colour, or equal to
    another's pixels. The split of a picture, and of all that look nearly like it, is a hash of pixels, so it
    depends on no order.

    Args:
        size: of a side in pixels.
        files: the pictures, inside `source`.

    Returns:
        How many were taken for each split, and left out for each reason; files.json names all.
    """
    squares: dict[bytes, tuple[Path, Image.Image]] = {}
    left_out: dict[str, str] = {}
    for file in sorted(files):
        name = str(file.relative_to(source))
        try:
            image = open_image(file)
        except GraincodeError:
            left_out[name] = "unreadable"
            continue
        box = ImageOps.invert(image).point(lambda value: 255 * (value > MARGIN)).getbbox()
        if box is None:
            left_out[name] = "empty"
            continue
        image = image.crop(box)
        square = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color="white")
        known = hashlib.sha256(square.tobytes()).digest()
        if max(image.size) < size:
            left_out[name] = "small"
        elif all(low == high for low, high in square.getextrema()):
            left_out[name] = "one colour"
        elif known in squares:
            left_out[name] = f"equal to {squares[known][0]}"
        else:
            squares[known] = (Path(name), square)
    hashes = sorted(squares)
    groups = near_duplicates([squares[known][1] for known in hashes])
    splits = [_split(hashes[group]) for group in groups]
    sizes = Counter(squares[known][0].parts[0] for known in hashes)
    taken: dict[str, dict[str, str]] = {split: {} for split in ("train", *SHARES)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_directory(folder.parent, "squares") as scratch:
        partial = scratch / "partial"
        for known, split in zip(hashes, splits, strict=True):
            path, square = squares[known]
            label = path.parts[0] if sizes[path.parts[0]] >= SMALLEST_CLASS else OTHERS
            into = partial / split / label / f"{known.hex()[:16]}.png"
            into.parent.mkdir(parents=True, exist_ok=True)
            square.save(into)
            taken[split][str(into.relative_to(partial))] = str(path)
        write_json(partial / "files.json", {"size": size, "near": NEAR, **taken, "left_out": left_out})
        partial.rename(folder)
    reasons = Counter(reason.split(" to ")[0] for reason in left_out.values())
    return {split: len(names) for split, names in taken.items()} | dict(reasons)


def near_duplicates(squares: Sequence[Image.Image]) -> list[int]:
    """For each picture the lowest index of those it is linked to by a chain of pairs that look nearly alike."""
    small = [square.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX) for square in squares]
    values = np.stack([np.asarray(thumbnail, np.float32).ravel() / 255 for thumbnail in small])
    norms, limit = (values**2).sum(1), values.shape[1] * NEAR**2
    groups = np.arange(len(values))
    for index in range(len(values)):
        distances = norms[index] + norms[:index] - 2 * values[:index] @ values[index]
        linked = np.unique(groups[np.append(np.nonzero(distances < limit)[0], index)])
        groups[np.isin(groups, linked)] = linked[0]
    return groups.tolist()


def _split(known: bytes) -> str:
    place = int.from_bytes(hashlib.sha256(known).digest()[:8], "big") / 2**64
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "train"
