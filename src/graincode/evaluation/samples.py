"""Samples of a generator, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from graincode.core.codes import GrainCodes
from graincode.core.errors import Damaged, check, check_choice, one_line
from graincode.core.images import to_uint8
from graincode.core.prompts import CodeMask, CodePrefix
from graincode.core.rng import LABELS, SampleRng
from graincode.distributed import collectives
from graincode.distributed.memory import fitting, peak_bytes
from graincode.evaluation.estimate import Estimate, mean_of
from graincode.evaluation.streams import ROUNDED, ImageStream, blank
from graincode.export import Export
from graincode.files import open_npz
from graincode.generator import Generator
from graincode.sampling import Sampler
from graincode.tokenizer import DQVAE

LabelChoice = Literal["balanced", "drawn", "reference"]


def read_samples(file: Path) -> dict[str, np.ndarray]:
    """The images, labels, grains and indices of a `samples.npz`; raises Damaged."""
    try:
        with open_npz(file) as arrays:
            return {name: arrays[name] for name in ("images", "labels", "grains", "indices")}
    except ValueError as error:
        raise Damaged.at(file, error, "the same command draws the samples again") from None


def balanced_labels(count: int, classes: int, chosen: Sequence[int | str] | None, names: Sequence[str] = ()) -> Tensor:
    """(count,) long labels that take the chosen classes (all by default), by number or by name, in turn; zeros if there
    are no classes."""
    found = list(range(max(classes, 1)) if chosen is None else chosen)
    if chosen is not None:
        check("classes", list(chosen), "null, as the generator has no classes", classes > 0)
        shown = [one_line(one) if isinstance(one, str) else one for one in found]  # as data sets name their folders
        found = [names.index(one) if isinstance(one, str) and one in names else one for one in shown]
        valid = len(found) > 0 and all(isinstance(one, int) and 0 <= one < classes for one in found)
        by_name = f" or names such as [{names[0]}]" if names else ""
        check("classes", list(chosen), f"labels from 0 to {classes - 1}, such as [0]{by_name}", valid)
    labels = torch.tensor(found)
    return labels[torch.arange(count) % len(labels)]


def warnings_of_classes(generator: Export, labels: Tensor) -> list[str]:
    """Lines for readers of a generator's samples for (N,) long labels."""
    names, absent = generator.names("class_names"), generator.names("absent_classes")
    asked = [name for label, name in enumerate(names) if name in absent and bool((labels == label).any())]
    return [f"no training image was of {', '.join(asked)}, so samples of it show nothing"] if asked else []


def chosen_labels(how: LabelChoice, count: int, classes: int, seed: int, reference: Tensor | None) -> Tensor:
    """(count,) long labels of so many classes, 0 for none; label i does not depend on the count.

    "balanced" takes all classes in turn; "drawn" draws each uniformly, from (seed, i); "reference" takes the (N,) long
    labels of the reference images in turn, if they have any.
    """
    check_choice("labels", how, LabelChoice)
    if how == "reference":
        known = classes > 0 and reference is not None and int(reference.max()) < classes
        check("labels", how, f"balanced, as the reference has no labels of the generator's {classes} classes", known)
        return reference[torch.arange(count) % len(reference)]
    if how == "drawn" and classes:
        return (SampleRng(seed, torch.arange(count)).uniforms(LABELS, 1)[:, 0] * classes).long()
    return balanced_labels(count, classes, None)


class SampleStream(ImageStream):
    """Samples of a generator for (N,) labels, whose codes are counted as they go, decoded by its tokenizer.

    Sample i depends on (seed, i), its label and what is given of it alone. No batch is larger than N, nor than the
    memory allows: fewer samples than `batch_size` take less work. In float32 the batch, and so N and the number of
    processes, may change a logit's last bit.
    """

    name, shows_progress, pixels = "samples", True, ROUNDED

    def __init__(
        self,
        generator: Generator,
        tokenizer: DQVAE,
        sampler: Sampler,
        labels: Tensor,
        seed: int,
        batch_size: int,
        given: CodePrefix | CodeMask | None = None,
    ) -> None:
        each = generator.bytes_of_sample(sampler.guidance_scale != 1) + peak_bytes(
            lambda: tokenizer.detokenize(tokenizer.tokenize(blank(tokenizer)))
        )
        self.count, self.batch_size = len(labels), fitting(batch_size, each, generator.device)
        self.image_size = generator.layout.image_size
        self.labels = labels if generator.classes > 1 else None
        self._generator, self._tokenizer, self._sampler = generator, tokenizer, sampler
        self._asked, self._seed, self._given, self._lengths = labels, seed, given, []

    def batches(self) -> Iterator[tuple[Tensor, GrainCodes]]:
        """This process's samples: (B, 3, H, W) uint8 images, and the codes that they were decoded from."""
        size, mine = min(self.batch_size, self.count), slice(self.mine.start, self.mine.stop)
        look = {"desc": "samples", "unit": " images", "leave": False, "mininterval": 1.0, "miniters": 0}
        with tqdm(total=len(self.mine), disable=not collectives.is_main(), **look) as bar:

            def on_step(step: int, complete: int) -> None:
                bar.set_postfix(step=step, refresh=False)
                bar.update(complete - bar.n)  # which shows it once in a while

            given, labels = self._given and self._given[mine], self._asked[mine]
            how = self._seed, mine.start, size, on_step, given, self._sampler
            for codes in self._generator.stream(labels, *how) if len(labels) else ():
                self._lengths.append(codes.lengths.cpu())
                yield to_uint8(self._tokenizer.detokenize(codes.to(self._generator.device))).cpu(), codes
            bar.update(len(labels) - bar.n)

    def __iter__(self) -> Iterator[Tensor]:
        return (images for images, _ in self.batches())

    def metrics(self) -> dict[str, Estimate]:
        return {"codes_per_image": mean_of(self._lengths)}

    def gathered(self) -> tuple[Tensor, GrainCodes]:
        """Images (N, 3, H, W) uint8 and codes of all samples of all processes, on the CPU."""
        layout, batches = self._generator.layout, list(self.batches())

        def rows(parts: list[Tensor], dtype: torch.dtype, *shape: int) -> Tensor:
            return collectives.gather_rows(torch.cat([torch.zeros(0, *shape, dtype=dtype), *parts]))

        images = rows([images for images, _ in batches], torch.uint8, 3, *layout.image_size)
        grains = rows([codes.grains for _, codes in batches], torch.long, *layout.grids[0])
        indices = rows([codes.indices for _, codes in batches], torch.long, *layout.grids[-1])
        return images, GrainCodes(grains, indices, layout)
