"""Models from their exports: where a program that uses trained models begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from graincode.core.errors import GraincodeError, brief, check
from graincode.core.images import from_uint8
from graincode.data.decoding import BACKGROUND, in_rgb, open_image
from graincode.data.images import check_image_size
from graincode.export import PathLike, load_export
from graincode.generator import Generator
from graincode.tokenizer import DQVAE


def load_tokenizer(path: PathLike, device: torch.device | str = "cpu") -> DQVAE:
    """A tokenizer in evaluation mode, with `tokenize(images, ratios=None)` and `detokenize(codes)`.

    `path` is the `export` directory of a run of train_tokenizer.

    Raises:
        GraincodeError: there is no such export, or it is damaged, of another kind, or of a newer version.
    Example:
        >>> tokenizer = load_tokenizer("runs/demo/train_tokenizer/train_tokenizer/export")
        >>> codes = tokenizer.tokenize(as_images(["cat.png", "dog.jpg"], tokenizer.layout.image_size))
        >>> codes.lengths, tokenizer.detokenize(codes)
    """
    return load_export(path, "tokenizer", device).module


def load_generator(path: PathLike, device: torch.device | str = "cpu") -> Generator:
    """A generator in evaluation mode, with `sample(labels, seed=0, **sampler settings)`.

    `path` is the `export` directory of a run of train_generator.

    Raises:
        GraincodeError: as `load_tokenizer`.
    Example:
        >>> generator = load_generator("runs/demo/train_generator/train_generator/export")
        >>> codes = generator.sample(torch.arange(10), seed=0, guidance_scale=2.0)
        >>> images = tokenizer.detokenize(codes)  # of the tokenizer that the generator was trained with
    """
    return load_export(path, "generator", device).module


def as_images(images: Any, image_size: int | Sequence[int] | None = None, background: str = BACKGROUND) -> Tensor:
    """(B, 3, H, W) float32 in [-1, 1], as `tokenize` takes them.

    Args:
        images: one or a list of: Pillow images, paths of files, uint8 arrays (H, W) or (H, W, 3 or 4); or an array of
            these, (B, H, W, C).
        image_size: to scale and crop to, as data sets are; None: all have one size.
        background: what shows through where images are transparent.
    Raises:
        GraincodeError: an image is none of these, cannot be read, or is of another size than the first.
    """
    several = isinstance(images, list | tuple) or (isinstance(images, np.ndarray) and images.ndim == 4)
    found = [_in_rgb(image, background) for image in (images if several else [images])]
    check("images", [], "at least one image", len(found) > 0)
    if image_size is not None:
        height, width = check_image_size(image_size)
        found = [ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC) for image in found]
    sizes = {(image.height, image.width) for image in found}
    check("image_size", None, f"a size, as images are of {len(sizes)}, such as {[*sizes][:2]}", len(sizes) == 1)
    return from_uint8(torch.from_numpy(np.stack([np.asarray(image) for image in found])).permute(0, 3, 1, 2))


def _in_rgb(image: Any, background: str) -> Image.Image:
    if isinstance(image, str | Path):
        return open_image(image, background=background)
    try:
        is_array = isinstance(image, np.ndarray) and image.dtype == np.uint8
        return in_rgb(Image.fromarray(image) if is_array else image, background)
    except Exception as error:  # what is no image raises nearly anything
        expected = "Pillow images, paths, or uint8 arrays (H, W) or (H, W, 3 or 4); tokenize itself takes tensors"
        kind = f" ({image.dtype} {image.shape})" if isinstance(image, np.ndarray) else ""
        reason = f" ({brief(error)})" if isinstance(image, Image.Image) else ""
        raise GraincodeError(f"images of {type(image).__name__}{kind or reason}: expected {expected}") from error
