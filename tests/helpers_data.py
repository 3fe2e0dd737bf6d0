"""Small data sets on disk, in the layouts that the sources read."""

import io
import itertools
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from graincode.core.images import to_uint8
from graincode.data import FFHQ, HuggingFace, ImageFolder, ImageNet, WebDataset
from graincode.data.encoded import EncodedImages
from graincode.data.images import SPLITS, ImageSource
from graincode.data.sources import EncodedSource

KINDS = {"image_folder": ImageFolder, "imagenet": ImageNet, "ffhq": FFHQ, "hf": HuggingFace, "webdataset": WebDataset}
WNIDS = ("n01440764", "n01443537")


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def write_images(root: Path, *names: str, size: tuple[int, int] = (9, 7)) -> Path:
    """Noise that depends on the name, of `size` (width, height)."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(list(name.encode()))
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return root


def gray(level: int) -> bytes:
    """A PNG of one gray level, which a reader can tell it by."""
    buffer = io.BytesIO()
    Image.new("RGB", (10, 8), (level, level, level)).save(buffer, "png")
    return buffer.getvalue()


def photo(seed: int) -> bytes:
    """A JPEG of noise that lies on its side, as its EXIF data say."""
    rng, buffer, exif = np.random.default_rng(seed), io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    pixels = rng.integers(0, 256, (11, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "jpeg", exif=exif)
    return buffer.getvalue()


def write_files(root: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def table(images: Sequence[bytes], labels: Sequence[int] | None = None, names: Sequence[str] | None = None):
    """A Hugging Face table of image files and, if given, of labels."""
    import datasets

    columns = {"image": [{"bytes": image, "path": None} for image in images]}
    features = {"image": datasets.Image()}
    if labels is not None:
        columns["label"] = list(labels)
        features["label"] = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write(kind: str, root: Path, images: Sequence[bytes]) -> list[str]:
    """Write images, in two classes where the layout has classes, and give the overrides that name them.

    The files of every layout are named after their numbers, so that the splits do not depend on the images.
    """
    if kind == "image_folder":
        write_files(root, {f"{'ab'[i % 2]}/{i:03d}.png": image for i, image in enumerate(images)})
    elif kind == "imagenet":
        half = len(images) // 2
        for part, numbers in (("train", range(half, len(images))), ("val", range(half))):
            write_files(root / part, {f"{WNIDS[i % 2]}/{part}_{i:03d}.JPEG": images[i] for i in numbers})
    elif kind == "ffhq":
        for i, image in enumerate(images):
            number = i if i % 2 else 60000 + i
            write_files(root / "thumbnails128x128", {f"{number // 1000 * 1000:05d}/{number:05d}.png": image})
    elif kind == "hf":
        table(images, [i % 2 for i in range(len(images))], ["a", "b"]).save_to_disk(str(root))
        return [f"data.path={root}", "data.label_key=label"]
    else:
        for start in range(0, len(images), 20):
            members = {}
            for i, image in enumerate(images[start : start + 20], start):
                members |= {f"{i:03d}.cls": str(i % 2).encode(), f"{i:03d}.png": image}
            write_tar(root / f"part-{start:03d}.tar", members)
    return [f"data.root={root}"]


def make(kind: str, root: Path, images: Sequence[bytes], **arguments) -> EncodedSource:
    """The source of images written as `write` does."""
    named = dict(override.removeprefix("data.").split("=") for override in write(kind, root, images))
    return KINDS[kind](**({"image_size": 8} | named | arguments))


def levels(source: ImageSource) -> dict[str, list[int]]:
    """The gray level of every image."""
    splits = {name: source.split(name) for name in SPLITS}
    return {name: to_uint8(split[range(len(split))].images)[:, 0, 0, 0].tolist() for name, split in splits.items()}


def together(splits: dict[str, list[int]]) -> list[int]:
    return sorted(itertools.chain.from_iterable(splits.values()))


def sizes(source: ImageSource) -> dict[str, int]:
    return {name: len(source.split(name)) for name in SPLITS}


def names_of(split: EncodedImages) -> list[str]:
    """What errors call each image: of a folder, the paths."""
    return [split.encoded.name(index) for index in range(len(split))]
