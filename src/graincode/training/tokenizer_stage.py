"""Stage 1 as the training loop sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from graincode.core.images import to_uint8
from graincode.core.losses import Term
from graincode.core.rng import SampleRng
from graincode.data.augmentation import Augmentation
from graincode.data.images import ImageBatch, ImageDataset, Subset
from graincode.evaluation.streams import ReconstructionStream
from graincode.pictures import density_maps, error_maps, grain_maps, grain_usage, grid, length_histogram, to_pixels
from graincode.tokenizer import DQVAE, Adversary, ReconstructionObjective, Routing
from graincode.training.stage import Player, Step, evaluation_batch


class TokenizerPlayer:
    """A tokenizer against its objective, and against a discriminator if there is one."""

    name = "tokenizer"

    def __init__(self, module: DQVAE, objective: ReconstructionObjective, adversary: Adversary | None) -> None:
        self.module, self.objective, self.adversary = module, objective, adversary
        self.made = torch.empty(0)
        self._codes: list[Tensor] = []
        self._routings: list[Routing] = []

    def plays(self, step: int) -> bool:
        return True

    def counts(self, batch: ImageBatch) -> dict[str, Tensor | float]:
        names = (self.objective.pixel, "commitment", "perceptual", "budget", "adversarial")
        return dict.fromkeys(names, len(batch.images))

    def terms(self, wrapped: nn.Module, batch: ImageBatch, step: Step) -> dict[str, Term]:
        made = wrapped(batch.images, rng=step.rng)
        terms = self.objective(batch.images, made, self.module.router.nominal_length)
        self.made = made.images.detach()
        if wrapped.training:  # else its FLOPs are counted
            self._routings.append(replace(made.routing, gates=None, terms={}))
        grains = [made.routing.grains == g for g in range(self.module.layout.num_grains)]
        per_grain = [int(n) for n in torch.stack([g.sum() for g in grains]).tolist()]
        sizes = [n * cells for n, cells in zip(per_grain, self.module.layout.codes_per_region, strict=True)]
        self._codes = list(made.quantized.indices.split(sizes))
        if self.adversary is not None and self.adversary.is_on(step.number):
            last = self.module.decoder.last.weight
            terms["adversarial"] = self.adversary.generator_term(
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
        if self.adversary is not None:
            self.adversary.update()


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
        adversary: a discriminator, or None.
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
        adversary: Adversary | None,
        dataset: ImageDataset,
        validation: ImageDataset,
        augmentation: Augmentation,
        workers: int,
        calibration: Callable[[], Iterable[Tensor]],
    ) -> None:
        player = TokenizerPlayer(module, objective, adversary)
        self.players: list[Player] = [player]
        if adversary is not None:
            self.players.append(DiscriminatorPlayer(adversary, player))
        self.dataset, self.workers = dataset, workers
        self.validation = Subset(validation, len(validation))  # else the first may be of one class
        self.augmentation, self.calibration = augmentation, calibration
        self._calibrated: dict[str, Tensor] = {}

    def prepare(self, batch: ImageBatch, rng: SampleRng) -> ImageBatch:
        return replace(batch, images=self.augmentation(batch.images, rng))

    def evaluate(self, module: DQVAE, limit: int) -> dict[str, float]:
        """Reconstruction error (less is better: MSE in [0, 1]) and use of the codebook, on validation images."""
        with _kept_buffers(module.router):
            if module.router.is_learned:
                module.calibrate(self.calibration())
            reconstructions = ReconstructionStream(
                module,
                self.validation,
                evaluation_batch(module.layout),
                limit,
                device=module.device,
                workers=self.workers,
            )
            for _ in reconstructions:
                pass
            figures = {name: figure.value for name, figure in reconstructions.metrics().items()}
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
            "codes per image": to_pixels(length_histogram(codes.lengths, module.layout)),
            "use of the grains": to_pixels(grain_usage(codes.to("cpu"))),
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
