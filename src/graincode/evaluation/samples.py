"""Samples of a generator, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from graincode.core.codes import GrainCodes
from graincode.core.errors import check, check_choice
from graincode.core.images import to_uint8
from graincode.core.layout import CodeLayout
from graincode.core.prompts import CodeMask, CodePrefix
from graincode.core.rng import LABELS, SampleRng
from graincode.distributed import collectives
from graincode.evaluation.estimate import Estimate, mean_of
from graincode.evaluation.streams import ImageStream
from graincode.generator import Generator
from graincode.sampling import Sampler
from graincode.tokenizer import DQVAE

LabelChoice = Literal["balanced", "drawn", "reference"]


@dataclass(frozen=True)
class SampleBatch:
    """(B, 3, H, W) uint8 images, the codes that they were decoded from, and their (B,) long labels."""

    images: Tensor
    codes: GrainCodes
    labels: Tensor


def balanced_labels(count: int, classes: int, chosen: Sequence[int] | None) -> Tensor:
    """(count,) long labels that take the chosen classes (all by default) in turn; zeros if there are no classes."""
    if chosen is not None:
        check("classes", list(chosen), "null, as the generator has no classes", classes > 0)
        valid = len(chosen) > 0 and 0 <= min(chosen) <= max(chosen) < classes
        check("classes", list(chosen), f"labels from 0 to {classes - 1}, such as [0]", valid)
    labels = torch.tensor(list(chosen) if chosen is not None else range(max(classes, 1)))
    return labels[torch.arange(count) % len(labels)]


def chosen_labels(how: LabelChoice, count: int, classes: int, seed: int, reference: Tensor | None) -> Tensor:
    """(count,) long labels for samples; label i does not depend on the count.

    Args:
        how: "balanced" takes all classes in turn; "drawn" draws each uniformly, from (seed, i); "reference" takes
            those of the reference images in turn.
        classes: of the generator; 0 for none.
        reference: (N,) long labels of the reference images; None if it has none.
    """
    check_choice("labels", how, LabelChoice)
    if how == "reference":
        known = classes > 0 and reference is not None and int(reference.max()) < classes
        check("labels", how, f"balanced, as the reference has no labels of the generator's {classes} classes", known)
        return reference[torch.arange(count) % len(reference)]
    if how == "drawn" and classes:
        return (SampleRng(seed, torch.arange(count)).uniforms(LABELS, 1)[:, 0] * classes).long()
    return balanced_labels(count, classes, None)


def draw(
    generator: Generator,
    tokenizer: DQVAE,
    sampler: Sampler,
    labels: Tensor,
    seed: int,
    batch_size: int,
    given: CodePrefix | CodeMask | None = None,
) -> Iterator[SampleBatch]:
    """This process's samples for (N,) labels; sample i depends on (seed, i), its label and what is given of it alone.

    Batches are the same for any number of processes. None is larger than N: fewer samples than `batch_size` take less
    work, and may in float32 differ in the last bit from the first of many.
    """
    batch_size = min(batch_size, len(labels))
    mine = collectives.items(len(labels), batch_size)
    look = {"desc": "samples", "unit": " images", "leave": False, "mininterval": 1.0, "miniters": 0}
    with tqdm(total=len(mine), disable=not collectives.is_main(), **look) as bar:

        def on_step(step: int) -> None:
            bar.set_postfix(step=step, refresh=False)
            bar.update(0)  # which shows it once in a while

        for start in mine[::batch_size]:
            part = labels[start : start + batch_size]
            begun = None if given is None else given[start : start + len(part)]
            codes = generator.sample(part, seed, start, batch_size, on_step, begun, sampler)
            images = to_uint8(tokenizer.detokenize(codes.to(generator.device))).cpu()
            bar.update(len(part))
            yield SampleBatch(images, codes, part)


class SampleStream(ImageStream):
    """Samples, as `draw` gives them for labels and a batch size, whose codes are counted as they go."""

    name, shows_progress = "samples", True

    def __init__(self, batches: Iterable[SampleBatch], labels: Tensor, batch_size: int, generator: Generator) -> None:
        self.count, self.batch_size, self.image_size = len(labels), batch_size, generator.layout.image_size
        self.labels = labels if generator.classes > 1 else None
        self._batches, self._lengths = batches, []

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._batches:
            self._lengths.append(batch.codes.lengths.cpu())
            yield batch.images

    def metrics(self) -> dict[str, Estimate]:
        return {"codes_per_image": mean_of(self._lengths)}


def gathered(batches: Iterable[SampleBatch], layout: CodeLayout) -> tuple[Tensor, GrainCodes]:
    """Images (N, 3, H, W) uint8 and codes of all samples of all processes, on the CPU."""
    (h0, w0), (h, w) = layout.grids[0], layout.grids[-1]
    none = GrainCodes(torch.zeros(0, h0, w0, dtype=torch.long), torch.zeros(0, h, w, dtype=torch.long), layout)
    images, codes = [torch.zeros(0, 3, *layout.image_size, dtype=torch.uint8)], [none]
    for batch in batches:
        images.append(batch.images)
        codes.append(batch.codes)
    own = GrainCodes.cat(codes)
    own = GrainCodes(collectives.gather_rows(own.grains), collectives.gather_rows(own.indices), layout)
    return collectives.gather_rows(torch.cat(images)), own
