"""Models from their exports: where a program that uses trained models begins."""

from __future__ import annotations

import torch

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
        >>> codes = tokenizer.tokenize(images)  # (B, 3, H, W) in [-1, 1]
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
