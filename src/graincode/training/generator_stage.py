"""Stage 2 as the training loop sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from graincode.core.codes import GrainCodes
from graincode.core.images import to_uint8
from graincode.core.losses import Term
from graincode.core.rng import SampleRng, permutation
from graincode.data.codes import CodeBatch, CodeDataset
from graincode.data.loader import Windows, in_order
from graincode.distributed import collectives
from graincode.evaluation.streams import evaluation_batch
from graincode.generator import Generator, GeneratorObjective
from graincode.pictures import code_maps, grid
from graincode.tokenizer import DQVAE
from graincode.training.monitors import Meter
from graincode.training.stage import Evaluation, Step, StepOutput, Trainable

TYPICAL_IMAGES = 4096  # from which an image's mean loss is estimated, a scale: a per cent is near enough


class TrainableGenerator(Trainable):
    """A generator with its objective.

    Where batches are sorted by length, means over each would make a code of a short image count more than one of a long
    image: losses are then divided by the counts of a `typical` image instead of the batch's own.
    """

    name = "generator"

    def __init__(self, module: Generator, objective: GeneratorObjective, typical: Mapping[str, float] | None) -> None:
        self.module, self.objective, self.typical = module, objective, typical

    def counts(self, batch: CodeBatch) -> dict[str, Tensor | float]:
        if self.typical is None:
            return self.objective.counts(batch.codes, self.module)
        return {name: len(batch.codes) * count for name, count in self.typical.items()}

    def forward(self, wrapped: nn.Module, batch: CodeBatch, step: Step, before: StepOutput | None) -> StepOutput:
        terms = self.objective(wrapped(batch.codes, batch.labels, step.rng))
        if self.typical is not None:
            terms |= {name: replace(terms[name], count=count) for name, count in self.counts(batch).items()}
        lengths = batch.codes.lengths + self.module.extra_tokens
        tokens, positions = lengths.sum(), lengths.max() * len(lengths)
        terms["tokens_per_image"] = Term(tokens, len(lengths), 0.0)
        terms["padding_share"] = Term(positions - tokens, positions, 0.0)
        return StepOutput(terms)


class GeneratorStage:
    """Codes to train on and to evaluate on, and a generator; the tokenizer that made the codes is for pictures alone.

    Within `bucketing_window` steps batches get similar lengths; with 1 each step keeps its own images.
    """

    def __init__(
        self, module: Generator, objective: GeneratorObjective, dataset: CodeDataset, validation: CodeDataset,
        tokenizer: DQVAE | None, bucketing_window: int = 1,
    ) -> None:  # fmt: skip
        self.windows, typical = Windows(dataset.lengths, bucketing_window), None
        if bucketing_window > 1:
            some = dataset[permutation(0, 0, len(dataset))[:TYPICAL_IMAGES].tolist()].codes
            typical = {name: float(count) / len(some) for name, count in objective.counts(some, module).items()}
        self.trainables: list[Trainable] = [TrainableGenerator(module, objective, typical)]
        self.objective, self.tokenizer, self.dataset, self.validation = objective, tokenizer, dataset, validation
        self._order = permutation(0, 0, len(validation)).tolist()  # shuffled, so that any prefix holds all classes

    def prepare(self, batch: CodeBatch, rng: SampleRng) -> CodeBatch:
        return batch

    def evaluate(self, module: Generator, limit: int, draw: bool = False) -> Evaluation:
        """The terms of the objective on validation codes; what is random in it is the same for each, every time."""
        meter, size = Meter(), evaluation_batch(module.layout)
        batches = list(in_order(self.validation, size, limit, shared=True, order=self._order))
        first = collectives.items(min(len(self.validation), limit), size).start
        # a process without a share must still name the terms that all add up
        for batch, weight in [(batch, 1.0) for batch in batches] or [(self.validation[0], 0.0)]:
            batch = batch.to(module.device)
            rng = SampleRng(0, torch.arange(first, first + len(batch.labels), device=module.device))
            meter.add(self.objective(module(batch.codes, batch.labels, rng)), weight)
            first += len(batch.labels)
        found = meter.flush()
        return Evaluation({"objective": self.objective.judge(found), **found}, self._pictures(module) if draw else {})

    def _pictures(self, module: Generator) -> dict[str, Tensor]:
        """Samples and their codes, a colour for each, above those of validation images."""
        real = self.validation[self._order[:16]]
        count = len(real.labels)
        samples = module.sample(real.labels, batch_size=count, given=module.prompt_of(real.codes))
        both = GrainCodes.cat([samples, replace(real.codes, layout=module.layout)])
        shown = {"codes of samples, of images": grid(code_maps(both), count, 4)}
        if self.tokenizer is not None:
            shown["samples, reconstructions"] = grid(to_uint8(self.tokenizer.detokenize(both)), count, 2)
        return shown
