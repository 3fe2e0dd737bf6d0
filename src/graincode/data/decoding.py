"""Decoding of image files, the one place where this is done: formats, transparency, depth, scaling and cropping."""

from __future__ import annotations

import io
import warnings
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor

from graincode.core.errors import GraincodeError, check
from graincode.files import file_size

# What is decoded, by Pillow's names: others of its decoders start programs, whatever a file is called. TGA has no mark
# at its beginning, so it is tried last.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000", "QOI", "TGA")
EXTENSIONS = (
    ".apng", ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm",
    ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
BACKGROUND = "white"
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262


def read_image(
    file: str | Path | bytes,
    size: tuple[int, int],
    crop: Literal["center", "none", "exact"],
    name: str | None = None,
    background: str = BACKGROUND,
) -> Tensor:
    """One image (see `open_image`) as (3, height, width) uint8, scaled with an antialiased bicubic filter.

    Args:
        size: (height, width) in pixels.
        crop: "center" scales until the image covers the size and crops its centre; "none" changes the aspect ratio;
            "exact" refuses an image of another size.
    """
    image = open_image(file, name, background)
    if crop == "exact" and image.size != size[::-1]:
        expected = f"expected {size[0]} x {size[1]}, as of the first image, or an image_size for all"
        raise GraincodeError(f"{name or file} has {image.height} x {image.width} pixels: {expected}")
    resize = ImageOps.fit if crop == "center" else Image.Image.resize
    return torch.from_numpy(np.array(resize(image, size[::-1], Image.Resampling.BICUBIC))).permute(2, 0, 1)


def open_image(file: str | Path | bytes, name: str | None = None, background: str = BACKGROUND) -> Image.Image:
    """One image in RGB, turned upright as its EXIF data say; a GraincodeError if it cannot be decoded.

    Args:
        file: path or content, in one of the `FORMATS`; of animations the first frame is taken, of 16 bits a channel the
            higher 8. Other depths are refused.
        name: what errors call it; by default its path.
        background: what shows through where the image is transparent (see `check_background`).
    """
    try:
        if not isinstance(file, bytes):
            file_size(Path(file))  # a pipe has none, and would be waited for
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_formats()) as opened:
            return in_rgb(opened, background)
    except Exception as error:  # broken files raise nearly anything, depending on the decoder
        name = name or ("an image in memory" if isinstance(file, bytes) else str(file))
        if isinstance(error, FileNotFoundError):
            raise GraincodeError(f"{name}: no such file") from error
        of_none = isinstance(error, UnidentifiedImageError)  # whose own words are of an object in memory
        why = "in none of the formats that are read" if of_none else " ".join(str(error).split())
        reason = f"{name} cannot be read as an image ({why})"
        is_large = isinstance(error, Image.DecompressionBombError)
        advice = "scale it down" if is_large else "save it as an 8-bit PNG or JPEG"
        raise GraincodeError(f"{reason}: {advice}") from error


def in_rgb(opened: Image.Image, background: str = BACKGROUND) -> Image.Image:
    """An image of Pillow's as `open_image` gives it; errors are Pillow's or a ValueError."""
    return _on(background, _eight_bits(ImageOps.exif_transpose(opened), opened))


def check_background(value: str) -> tuple[int, int, int] | None:
    """The RGB of a colour's name or #rrggbb; None for "none", which shows the colours of transparent pixels."""
    if value == "none":
        return None
    try:
        colour = ImageColor.getrgb(value)
    except (AttributeError, TypeError, ValueError):
        colour = ()
    check("background", value, "none, a colour's name such as white, or #rrggbb", len(colour) == 3)
    return colour


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    # half of what is refused as too many pixels is nothing to warn of
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return tuple(name for name in FORMATS if name in Image.OPEN)  # older releases of Pillow lack the newer ones


def _on(background: str, image: Image.Image) -> Image.Image:
    colour = check_background(background)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if colour is not None:
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*colour, 255)), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image, opened: Image.Image) -> Image.Image:
    """The image, of 16 bits a channel the higher 8, as Pillow itself does in colour images; refuses other depths."""
    key = image.info.get("transparency")  # a colour or gray value that is transparent
    if image.mode[0] not in "IF":
        if isinstance(key, tuple) and max(key) > 255:  # Pillow makes 8 bits of the pixels, and leaves this as it is
            image.info["transparency"] = tuple(value // 256 for value in key)
        return image
    tags = getattr(opened, "tag_v2", {_TIFF_BITS: (16,), _TIFF_PHOTOMETRIC: 1})  # of TIFF, which has more of them
    known = tags.get(_TIFF_BITS) == (16,) and tags.get(_TIFF_PHOTOMETRIC) == 1
    if not known or not (image.mode.startswith("I;16") or (image.mode == "I" and opened.format in ("PNG", "PPM"))):
        raise ValueError(f"Pillow mode {image.mode}, neither 8 nor 16 bits a channel")
    gray = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if key is not None:
        gray.putalpha(Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8)))
    return gray
