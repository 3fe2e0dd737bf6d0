"""The two stages as the training loop sees them: what is trained, on what, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graincode import processes
from graincode.core.codes import CodeLayout, CodePrefix, GrainCodes
from graincode.core.images import to_uint8
from graincode.core.losses import Term
from graincode.core.rng import Draws, permutation
from graincode.data.augmentation import Augmentation
from graincode.data.codes import CodeBatch, CodeDataset
from graincode.data.images import ImageBatch, ImageDataset, Subset
from graincode.data.loader import Windows, in_order
from graincode.engine.logging import Meter
from graincode.generator import Generator, GeneratorObjective
from graincode.passes import ReconstructionPass
from graincode.pictures import code_maps, density_maps, error_maps, grain_maps, grain_usage, grid, length_histogram
from graincode.tokenizer import DQVAE, Adversary, ReconstructionObjective, Routing

DENSITY_IMAGES = 65_536  # that tell which densities there are
TYPICAL_IMAGES = 4096  # that tell what an image costs: a scale of the loss, for which a per cent is near enough


def evaluation_batch(layout: CodeLayout) -> int:
    """Images that are evaluated together: 250, or fewer if they are large or have many codes, for the memory's sake."""
    height, width = layout.image_size
    return max(1, min(250, 2**21 // (height * width), 2**15 // layout.max_tokens))


@dataclass(frozen=True)
class Step:
    """What a player needs to know of a step.

    Attributes:
        number: 1-based.
        draws: random numbers of the batch.
    """

    number: int
    draws: Draws


class Player(Protocol):
    """A module with an optimizer and a loss of its own; most stages have one, a GAN has two.

    In each step all players see the same micro-batches in turn, and then make their optimizer steps.
    """

    name: str
    module: nn.Module

    def plays(self, step: int) -> bool:
        """Whether it trains in this 1-based step."""

    def counts(self, batch: Any) -> Mapping[str, Tensor | float]:
        """Counts of the terms of its loss, known before any module has run."""

    def terms(self, wrapped: nn.Module, batch: Any, step: Step) -> Mapping[str, Term]:
        """The terms of its loss on a batch; `wrapped` is its module, and is called once."""

    def histograms(self) -> Mapping[str, Tensor]:
        """What the last batch chose among things, to be logged: (V,) counts by name."""

    def update(self, trained: nn.Module) -> None:
        """After the optimizer step: what is learned without gradients; `trained` is the module, sharded or not."""


class Stage(Protocol):
    """What the training loop trains. `players[0]` is what is evaluated and exported.

    Attributes:
        dataset: to train on.
        windows: within which it is batched by length; None: items have no lengths.
    """

    players: list[Player]
    dataset: Any
    windows: Windows | None

    def prepare(self, batch: Any, draws: Draws) -> Any:
        """What the players see of a batch on its device, such as augmented images."""

    def evaluate(self, module: nn.Module, limit: int) -> dict[str, float]:
        """Figures on `limit` validation items, always the same; `objective` is among them, less is better.

        All processes take part, and all get the same.
        """

    def pictures(self, module: nn.Module) -> dict[str, Tensor]:
        """(3, H, W) uint8 images to look at, by name."""


class TokenizerPlayer:
    """A tokenizer against its objective, and against a discriminator if there is one."""

    name = "tokenizer"

    def __init__(self, module: DQVAE, objective: ReconstructionObjective, opponent: Adversary | None) -> None:
        self.module, self.objective, self.opponent = module, objective, opponent
        self.made = torch.empty(0)
        self._codes: list[Tensor] = []
        self._routings: list[Routing] = []

    def plays(self, step: int) -> bool:
        return True

    def counts(self, batch: ImageBatch) -> dict[str, Tensor | float]:
        names = (self.objective.pixel, "commitment", "perceptual", "budget", "adversarial")
        return dict.fromkeys(names, len(batch.images))

    def terms(self, wrapped: nn.Module, batch: ImageBatch, step: Step) -> dict[str, Term]:
        made = wrapped(batch.images, draws=step.draws)
        terms = self.objective(batch.images, made, self.module.router.nominal_length)
        self.made = made.images.detach()
        if wrapped.training:  # else its FLOPs are counted
            self._routings.append(replace(made.routing, gates=None, terms={}))
        grains = [made.routing.grains == g for g in range(self.module.layout.num_grains)]
        per_grain = [int(n) for n in torch.stack([g.sum() for g in grains]).tolist()]
        sizes = [n * cells for n, cells in zip(per_grain, self.module.layout.codes_per_region, strict=True)]
        self._codes = list(made.quantized.indices.split(sizes))
        if self.opponent is not None and self.opponent.is_on(step.number):
            last = self.module.decoder.last.weight
            terms["adversarial"] = self.opponent.generator_term(
                made.images, self.objective.likeness(terms), last, step.number
            )
        return terms

    def histograms(self) -> dict[str, Tensor]:
        size = self.module.layout.codebook_size
        grains = {f"codebook_{g}": torch.bincount(codes, minlength=size) for g, codes in enumerate(self._codes)}
        return grains if self.module.layout.num_codebooks > 1 else grains | {"codebook": sum(grains.values())}

    def update(self, trained: DQVAE) -> None:
        trained.update(self._routings)
        self._routings = []
        if self.opponent is not None:
            self.opponent.update()


class DiscriminatorPlayer:
    """The discriminator of a tokenizer: sees the images and what the tokenizer made of them."""

    name = "discriminator"

    def __init__(self, module: Adversary, tokenizer: TokenizerPlayer) -> None:
        self.module, self.tokenizer = module, tokenizer

    def plays(self, step: int) -> bool:
        return self.module.is_on(step)

    def counts(self, batch: ImageBatch) -> dict[str, Tensor | float]:
        return {"discriminator": len(batch.images), "lecam": len(batch.images)}

    def terms(self, wrapped: nn.Module, batch: ImageBatch, step: Step) -> dict[str, Term]:
        logits = wrapped(torch.cat([batch.images, self.tokenizer.made.to(batch.images.dtype)]))
        weight = self.module.adaptive.clone()
        return self.module.discriminator_terms(logits) | {"adaptive_weight": Term(weight, 1, 0.0)}

    def histograms(self) -> dict[str, Tensor]:
        return {}

    def update(self, trained: nn.Module) -> None:
        self.module.update_logits()


class TokenizerStage:
    """Images and a tokenizer.

    Args:
        module: the tokenizer.
        objective: of its reconstructions.
        opponent: a discriminator, or None.
        dataset: to train on.
        validation: to judge on.
        augmentation: of the images that are trained on.
        workers: processes that load images for evaluation.
        calibration: gives batches of training images, this process's share of them; for thresholds that follow the
            weights.
    """

    windows = None

    def __init__(
        self,
        module: DQVAE,
        objective: ReconstructionObjective,
        opponent: Adversary | None,
        dataset: ImageDataset,
        validation: ImageDataset,
        augmentation: Augmentation,
        workers: int,
        calibration: Callable[[], Iterable[Tensor]],
    ) -> None:
        player = TokenizerPlayer(module, objective, opponent)
        self.players: list[Player] = [player]
        if opponent is not None:
            self.players.append(DiscriminatorPlayer(opponent, player))
        self.dataset, self.workers = dataset, workers
        self.validation = Subset(validation, len(validation))  # else the first may be of one class
        self.augmentation, self.calibration = augmentation, calibration
        self._calibrated: dict[str, Tensor] = {}

    def prepare(self, batch: ImageBatch, draws: Draws) -> ImageBatch:
        return replace(batch, images=self.augmentation(batch.images, draws))

    def evaluate(self, module: DQVAE, limit: int) -> dict[str, float]:
        """Reconstruction error (less is better: MSE in [0, 1]) and use of the codebook, on validation images."""
        with _kept_buffers(module.router):
            if module.router.is_learned:
                module.calibrate(self.calibration())
            reconstructions = ReconstructionPass(
                module,
                self.validation,
                evaluation_batch(module.layout),
                limit,
                device=module.device,
                workers=self.workers,
            )
            for _ in reconstructions:
                pass
            figures = {name: figure.value for name, figure in reconstructions.figures().items()}
            self._calibrated = {name: buffer.clone() for name, buffer in module.router.named_buffers()}
        return {"objective": figures["mse"], **figures}

    def pictures(self, module: DQVAE) -> dict[str, Tensor]:
        """Some validation images over their density and grain maps, reconstructions and errors; how many codes."""
        some = self.validation[range(min(evaluation_batch(module.layout), len(self.validation)))].images.to(
            module.device
        )
        with _kept_buffers(module.router):
            for name, buffer in module.router.named_buffers():  # thresholds as evaluated last
                buffer.copy_(self._calibrated.get(name, buffer))
            codes, images = module.tokenize(some), some[:8]
            routing = module.route(images)
        cells, made = module.layout.grains, module.detokenize(codes[:8])
        rows = [
            to_uint8(images),
            density_maps(routing.shown, module.layout.image_size),
            grain_maps(images, routing.grains, cells),
            to_uint8(made),
            error_maps(images, made),
        ]
        return {
            "images, density, grains, reconstructions, errors": grid(
                torch.cat([r.cpu() for r in rows]), len(images), 2
            ),
            "codes per image": length_histogram(codes.lengths, module.layout),
            "use of the grains": grain_usage(codes.to("cpu")),
        }


@contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    """What is written into a module's buffers within is undone afterwards."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


def made_of(batch: CodeBatch, module: Generator, draws: Draws | None = None, wrapped: nn.Module | None = None) -> Any:
    """What a generator makes of a batch.

    Args:
        batch: of its layout.
        module: the generator.
        draws: random numbers of the batch; torch's generator, if not given.
        wrapped: the generator as it is called in training.
    """
    more = {"density": batch.density} if module.needs_density else {}
    return (module if wrapped is None else wrapped)(batch.codes, batch.labels, draws, **more)


def calibrate(module: Generator, dataset: CodeDataset) -> None:
    """What a generator learns of training codes before step 1, from at most `DENSITY_IMAGES` of them."""
    if module.needs_density:
        order = permutation(0, 0, len(dataset)).tolist()
        batches = in_order(dataset, evaluation_batch(module.layout), DENSITY_IMAGES, order=order)
        grains, density = zip(*((batch.codes.grains, batch.density) for batch in batches), strict=True)
        module.calibrate(torch.cat(grains), torch.cat(density))


class GeneratorPlayer:
    """A generator against its objective.

    Args:
        module: the generator.
        objective: of its kind.
        typical: counts of the objective's terms for a typical image, by which losses are then divided instead of the
            batch's own. Where batches are sorted by length, means over each of them would make a code of a short image
            count more than one of a long image.
    """

    name = "generator"

    def __init__(
        self, module: Generator, objective: GeneratorObjective, typical: Mapping[str, float] | None = None
    ) -> None:
        self.module, self.objective, self.typical = module, objective, typical

    def plays(self, step: int) -> bool:
        return True

    def counts(self, batch: CodeBatch) -> dict[str, Tensor | float]:
        if self.typical is None:
            return self.objective.counts(batch.codes, self.module)
        return {name: len(batch.codes) * count for name, count in self.typical.items()}

    def terms(self, wrapped: nn.Module, batch: CodeBatch, step: Step) -> dict[str, Term]:
        terms = self.objective(made_of(batch, self.module, step.draws, wrapped))
        if self.typical is not None:
            terms |= {name: replace(terms[name], count=count) for name, count in self.counts(batch).items()}
        lengths = batch.codes.lengths + self.module.extra_tokens
        tokens, positions = lengths.sum(), lengths.max() * len(lengths)
        return terms | {
            "tokens_per_image": Term(tokens, len(lengths), 0.0),
            "padding_share": Term(positions - tokens, positions, 0.0),
        }

    def histograms(self) -> dict[str, Tensor]:
        return {}

    def update(self, trained: nn.Module) -> None:
        pass


class GeneratorStage:
    """Codes and a generator.

    Args:
        module: the generator.
        objective: of its kind.
        dataset: codes to train on.
        validation: codes to judge on.
        tokenizer: that made the codes, for pictures alone; None shows codes only.
        length_window: steps whose images are dealt out among them by length; 1: each keeps its own.
    """

    def __init__(
        self,
        module: Generator,
        objective: GeneratorObjective,
        dataset: CodeDataset,
        validation: CodeDataset,
        tokenizer: DQVAE | None,
        length_window: int = 1,
    ) -> None:
        self.windows, typical = Windows(dataset.lengths, length_window), None
        if length_window > 1:
            some = dataset[permutation(0, 0, len(dataset))[:TYPICAL_IMAGES].tolist()].codes
            typical = {name: float(count) / len(some) for name, count in objective.counts(some, module).items()}
        self.players: list[Player] = [GeneratorPlayer(module, objective, typical)]
        self.objective, self.tokenizer = objective, tokenizer
        self.dataset, self.validation = dataset, validation
        self._order = permutation(0, 0, len(validation)).tolist()  # of which the first are looked at, of all classes

    def prepare(self, batch: CodeBatch, draws: Draws) -> CodeBatch:
        return batch

    def evaluate(self, module: Generator, limit: int) -> dict[str, float]:
        """The terms of the objective on validation codes; what is random in it is the same for each, every time."""
        meter, device = Meter(), module.content_head.weight.device
        size = evaluation_batch(module.layout)
        batches = list(in_order(self.validation, size, limit, shared=True, order=self._order))
        place = processes.items(min(len(self.validation), limit), size).start
        # a process without a share must still name the terms that all add up
        for batch, weight in [(batch, 1.0) for batch in batches] or [(self.validation[0], 0.0)]:
            batch, places = batch.to(device), torch.arange(place, place + len(batch.labels), device=device)
            meter.add(self.objective(made_of(batch, module, Draws(0, places))), weight)
            place += len(batch.labels)
        figures = meter.flush()
        return {"objective": self.objective.judge(figures), **figures}

    def pictures(self, module: Generator) -> dict[str, Tensor]:
        """Samples and their codes, a colour for each, above those of validation images."""
        real = self.validation[self._order[:16]]
        count = len(real.labels)
        given = CodePrefix.of_map(real.codes) if module.needs_map else None
        samples = module.sample(real.labels, batch_size=count, given=given)
        both = GrainCodes.cat([samples, real.codes])
        shown = {"codes of samples, of images": grid(code_maps(both), count, 4)}
        if self.tokenizer is not None:
            images = to_uint8(self.tokenizer.detokenize(both))
            shown["samples, reconstructions"] = grid(images, count, 2)
        return shown
