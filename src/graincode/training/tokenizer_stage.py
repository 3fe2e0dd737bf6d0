"""Stage 1 as the training loop sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from graincode.core.images import to_uint8
from graincode.core.losses import Term
from graincode.core.rng import SampleRng
from graincode.data.augmentation import Augmentation
from graincode.data.images import ImageBatch, ImageDataset, Subset
from graincode.evaluation.streams import ReconstructionStream, evaluation_batch
from graincode.pictures import density_maps, error_maps, grain_maps, grain_usage, grid, length_histogram, to_pixels
from graincode.tokenizer import DQVAE, Adversary, ReconstructionObjective
from graincode.training.stage import Evaluation, Step, StepOutput, Trainable


class TrainableTokenizer(Trainable):
    """A tokenizer with its objective, and the adversarial term if there is a discriminator."""

    name = "tokenizer"

    def __init__(self, module: DQVAE, objective: ReconstructionObjective, adversary: Adversary | None) -> None:
        self.module, self.objective, self.adversary = module, objective, adversary

    def forward(self, wrapped: nn.Module, batch: ImageBatch, step: Step, before: StepOutput | None) -> StepOutput:
        found = wrapped(batch.images, rng=step.rng)
        terms = self.objective(batch.images, found, self.module.router)
        observed = None
        if self.adversary is not None and self.adversary.is_on(step.number):
            terms["adversarial"], observed = self.adversary.generator_term(
                found.images, self.objective.likeness(terms), self.module.decoder.last.weight, step.number
            )
        routing = replace(found.routing, gates=None, terms={})
        codes = tuple(part.detach() for part in found.quantized)
        return StepOutput(terms, found.images.detach(), codes, routing, observed)

    def histograms(self, output: StepOutput) -> dict[str, Tensor]:
        layout, codes = self.module.layout, torch.cat([part.indices for part in output.codes])
        regions = torch.stack([(output.routing.grains == g).sum() for g in range(layout.num_grains)])
        sizes = regions * layout.slots(codes.device).costs
        grain = torch.arange(layout.num_grains, device=codes.device).repeat_interleave(sizes, output_size=len(codes))
        counts = codes.new_zeros(layout.num_grains * layout.codebook_size)
        counts.scatter_add_(0, grain * layout.codebook_size + codes, torch.ones_like(codes))
        found = {f"codebook_{g}": row for g, row in enumerate(counts.view(layout.num_grains, -1))}
        return found if layout.num_codebooks > 1 else found | {"codebook": sum(found.values())}

    def update(self, trained: DQVAE, outputs: Sequence[StepOutput]) -> None:
        trained.update([output.codes for output in outputs], [output.routing for output in outputs])
        if self.adversary is not None:
            self.adversary.update([output.observed for output in outputs if output.observed is not None])


class TrainableDiscriminator(Trainable):
    """The discriminator of a tokenizer, which learns to distinguish images from their reconstructions."""

    name = "discriminator"

    def __init__(self, module: Adversary) -> None:
        self.module = module

    def trains(self, step: int) -> bool:
        return self.module.is_on(step)

    def forward(self, wrapped: nn.Module, batch: ImageBatch, step: Step, before: StepOutput | None) -> StepOutput:
        logits = wrapped(torch.cat([batch.images, before.reconstruction.to(batch.images.dtype)]))
        weight = self.module.adaptive.clone()
        terms, observed = self.module.discriminator_terms(logits)
        count = len(batch.images)  # the mean over steps, however they are divided
        return StepOutput(terms | {"adaptive_weight": Term(weight.double() * count, count, 0.0)}, observed=observed)

    def update(self, trained: nn.Module, outputs: Sequence[StepOutput]) -> None:
        self.module.update_averages([output.observed for output in outputs])


class TokenizerStage:
    """Images to train on, with an augmentation, and to evaluate on, loaded by `workers` processes, and a tokenizer;
    `calibration` gives this process's share of training images, in batches, for thresholds that follow the weights."""

    windows = None

    def __init__(
        self, module: DQVAE, objective: ReconstructionObjective, adversary: Adversary | None, dataset: ImageDataset,
        validation: ImageDataset, augmentation: Augmentation, workers: int,
        calibration: Callable[[], Iterable[Tensor]],
    ) -> None:  # fmt: skip
        self.trainables: list[Trainable] = [TrainableTokenizer(module, objective, adversary)]
        if adversary is not None:
            self.trainables.append(TrainableDiscriminator(adversary))
        self.dataset, self.workers = dataset, workers
        self.validation = Subset(validation, len(validation))  # shuffled, so that any prefix holds all classes
        self.augmentation, self.calibration = augmentation, calibration

    def prepare(self, batch: ImageBatch, rng: SampleRng) -> ImageBatch:
        return replace(batch, pixels=self.augmentation(batch.images, rng))

    def evaluate(self, module: DQVAE, limit: int, draw: bool = False) -> Evaluation:
        """Reconstruction error (less is better: MSE in [0, 1]) and use of the codebook, on validation images."""
        size, kept = evaluation_batch(module.layout), [buffer.clone() for buffer in module.router.buffers()]
        if module.router.is_learned:
            module.calibrate(self.calibration())
        reconstructions = ReconstructionStream(module, self.validation, size, self.workers, limit)
        for _ in reconstructions:
            pass
        metrics = {name: estimate.value for name, estimate in reconstructions.metrics().items()}
        pictures = self._pictures(module, min(size, len(self.validation))) if draw else {}
        for buffer, value in zip(module.router.buffers(), kept, strict=True):
            buffer.copy_(value)  # training goes on with its own thresholds
        return Evaluation({"objective": metrics["mse"], **metrics}, pictures)

    def _pictures(self, module: DQVAE, count: int) -> dict[str, Tensor]:
        """Some validation images over their density and grain maps, reconstructions and errors; how many codes."""
        some = self.validation[range(count)].to(module.device).images
        codes, images = module.tokenize(some), some[:8]
        routing, reconstruction = module.route(images), module.detokenize(codes[:8])
        density = density_maps(routing.shown, module.layout.image_size)
        grains = grain_maps(images, routing.grains, module.layout.grains)
        rows = to_uint8(images), density, grains, to_uint8(reconstruction), error_maps(images, reconstruction)
        sheet = grid(torch.cat([row.cpu() for row in rows]), len(images), 2)
        return {
            "images, density, grains, reconstructions, errors": sheet,
            "codes per image": to_pixels(length_histogram(codes.lengths, module.layout)),
            "use of the grains": to_pixels(grain_usage(codes.to("cpu"))),
        }
