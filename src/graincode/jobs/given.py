"""What samples keep of real codes, `given.`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from graincode.config.job import resolve_path
from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError, check
from graincode.core.images import to_uint8
from graincode.core.layout import check_layouts, other_classes
from graincode.core.prompts import CodeMask, CodePrefix
from graincode.data.codes import CodeDataset
from graincode.data.decoding import open_image
from graincode.evaluation.samples import balanced_labels
from graincode.files import sha256
from graincode.generator import Generator
from graincode.tokenizer import DQVAE


@dataclass(frozen=True)
class Given:
    """What is given of B samples: a prompt, codes of the images that it repeats, (B,) labels, hashes of inputs."""

    prompt: CodePrefix | CodeMask
    codes: GrainCodes
    labels: Tensor
    inputs: dict[str, str]

    def shown(self, tokenizer: DQVAE) -> Tensor:
        """The images that it comes from, then what of them is given, the rest grey: (2 x images, 3, H, W) uint8."""
        images = to_uint8(tokenizer.detokenize(self.codes.to(tokenizer.device))).cpu()
        known = self.prompt[: len(images)].known_cells[:, None].float()
        pixels = torch.nn.functional.interpolate(known, images.shape[2:]).bool()
        return torch.cat([images, torch.where(pixels, images, torch.full_like(images, 160))])


def find_given(cfg: DictConfig, generator: Generator, names: Sequence[str] = (), tokenizer: str = "") -> Given | None:
    """What `given.` has a job's samples keep, of a generator, the names of its classes and the identity of its
    tokenizer; None, also in the configuration, if that is nothing.

    Raises:
        GraincodeError: it sets two of its keys, names what is not there, or what the generator cannot keep.
    """
    settings = cfg.given or {}
    keys = [key for key in ("grains", "regions", "mask", "map") if settings.get(key) not in (None, False)]
    if not keys:
        cfg.given = None
        return None
    if len(keys) > 1 and keys != ["mask", "map"]:
        raise GraincodeError(f"{' '.join(f'given.{key}={settings[key]}' for key in keys)}: expected one of them")
    settings.codes_path = str(resolve_path(cfg, "given.codes_path", "extract_codes", "codes"))
    dataset = CodeDataset(settings.codes_path, settings.split)
    check_layouts(dataset.layout, generator.layout, f"{settings.codes_path}: these codes", "this generator")
    if (found := dataset.info["tokenizer"]) != tokenizer:
        line = f"{settings.codes_path}: codes of tokenizer {found}, and the generator's are of {tokenizer}"
        raise GraincodeError(f"{line}; extract them with that")
    count = min(settings.images, len(dataset), cfg.num_samples)
    batch = dataset[[i % count for i in range(cfg.num_samples)]]
    codes = GrainCodes(batch.codes.grains, batch.codes.indices, generator.layout)
    labels, inputs = batch.labels, {"codes": dataset.identity}
    if cfg.classes is None and generator.classes and (differing := other_classes(dataset.class_names, names)):
        raise GraincodeError(f"{settings.codes_path}: codes of {differing} of the generator; give classes=[...]")
    if cfg.classes is not None:  # all images in the first class, then in the next
        rows = balanced_labels(-(-cfg.num_samples // count), generator.classes, cfg.classes, names)
        labels = rows.repeat_interleave(count)[: cfg.num_samples]
    prompt: CodePrefix | CodeMask
    if "mask" in keys:
        settings.mask = str(Path(settings.mask).expanduser().resolve())
        prompt = CodeMask.of_pixels(codes, _white(settings.mask, codes.layout.image_size), settings.map)
        inputs["mask"] = sha256(Path(settings.mask))[:16]
        part = "an image that is not white everywhere, so that some codes are drawn"
        check("given.mask", settings.mask, part, not bool(prompt[:count].known_cells.all()))
    elif "grains" in keys:
        prompt = CodePrefix.of_grains(codes, settings.grains)
    elif "regions" in keys:
        prompt = CodePrefix.of_regions(codes, settings.regions)
    else:
        prompt = CodePrefix.of_map(codes)
    generator.accept(prompt)
    return Given(prompt, codes[:count], labels, inputs)


def _white(path: str, size: tuple[int, int]) -> Tensor:
    """(height, width) bool, where an image is nearer to white than to black, or to transparent."""
    image = open_image(path, f"given.mask={path}", background="black")
    pixels = np.array(image.convert("L"))
    expected = f"{size[0]} x {size[1]} pixels as the images have, not {image.height} x {image.width}"
    check("given.mask", path, expected, pixels.shape == size)
    return torch.from_numpy(pixels) >= 128
