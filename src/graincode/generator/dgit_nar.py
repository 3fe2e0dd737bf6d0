"""DGiT-NAR: all codes at once, by masked prediction; the grain map first, then the contents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core.codes import CodeLayout, CodeMask, CodePrefix, GrainCodes, to_sequences
from graincode.core.errors import GraincodeError
from graincode.core.rng import Draws
from graincode.generator.base import Generator
from graincode.generator.embedding import (
    ClassConditioning,
    ContentHead,
    HeterogeneousEmbedding,
    NoConditioning,
    initialize,
)
from graincode.generator.masking import InformationMasking
from graincode.generator.transformer import Rotary, Transformer
from graincode.sampling import MaskedSampler


@dataclass(frozen=True)
class Predictions:
    """What was predicted of N masked values of a batch.

    Attributes:
        loss: (N,) negative log-likelihood of each, in nats.
        correct: (N,) bool, whether the likeliest value was right.
        grain: (N,) long, of their codes or regions.
        ratio: (N,) float64 in (0, 1], the share of their image's values that was masked.
    """

    loss: Tensor
    correct: Tensor
    grain: Tensor
    ratio: Tensor

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, grain: Tensor, masked: Tensor, lengths: Tensor) -> Predictions:
        """Judge (N, V) logits of the N places where (B, L) is masked; targets and grain (N,), lengths (B,)."""
        ratio = (masked.sum(dim=1).double() / lengths)[:, None].expand_as(masked)[masked]
        loss = F.cross_entropy(logits, targets, reduction="none")
        return cls(loss, logits.detach().argmax(dim=1) == targets, grain, ratio)


@dataclass(frozen=True)
class MaskedPredictions:
    """Attributes:
    contents: of the masked codes.
    grains: of the masked regions; None with one grain.
    counts: how many of each are masked on average, see `DGiTNAR.expected`.
    num_grains: K.
    """

    contents: Predictions
    grains: Predictions | None
    counts: dict[str, Tensor | float]
    num_grains: int


class DGiTNAR(Generator):
    """A grain transformer that fills in the grain map, and a content transformer that fills in the codes; both see
    everything that is not masked, and no padding.

    Codes are tokens of content (the vector of "no content" where it is masked), position and grain, without an order.
    Regions are tokens of position and grain, or a vector for a masked one. What an image is conditioned on is added to
    every token, and modulates the blocks of transformers with `adaln`. With one grain this is MaskGIT, and there is no
    grain transformer.

    Args:
        layout: the code layout.
        width: of each token.
        embedding: without an index.
        conditioning, grain_transformer, content_transformer: its parts, of this width; the transformers are not causal.
        masking: of training.
    Raises:
        GraincodeError: a part has an order, or the places of codes are not told.
    Source: our reading of DGiT-NAR, of which only an abstract is public; MaskGIT (Chang et al., 2022) is its ground.
    """

    sampler = MaskedSampler

    def __init__(
        self,
        layout: CodeLayout,
        width: int,
        embedding: HeterogeneousEmbedding,
        conditioning: ClassConditioning | NoConditioning,
        grain_transformer: Transformer,
        content_transformer: Transformer,
        masking: InformationMasking | None = None,
    ) -> None:
        super().__init__()
        for name, transformer in (("grain", grain_transformer), ("content", content_transformer)):
            if transformer.causal:
                raise GraincodeError(
                    f"a causal {name}_transformer: what is masked depends on all codes; type "
                    f"generator.model.{name}_transformer.causal=false"
                )
            embedding.check_places(transformer)
        if embedding.index is not None:
            raise GraincodeError("an index of codes that have no order: type generator.model.embedding.index=false")
        self.layout, self.masking = layout, masking or InformationMasking()
        self.embedding, self.conditioning = embedding, conditioning
        decides = layout.num_grains > 1
        self.grain_transformer = grain_transformer if decides else None
        self.content_transformer = content_transformer
        self.grain = nn.Embedding(layout.num_grains + 1, width) if decides else None
        self.grain_head = nn.Linear(width, layout.num_grains) if decides else None
        self.content_head = ContentHead(layout, width)
        rotary = content_transformer.rotary or (decides and grain_transformer.rotary)
        self.rotary = Rotary(layout.coordinates(), content_transformer.head_dim) if rotary else None
        if self.grain is not None:
            nn.init.normal_(self.grain.weight, std=0.02)
        initialize(self.grain_head, self.content_head)

    def forward(self, codes: GrainCodes, labels: Tensor, draws: Draws | None = None) -> MaskedPredictions:
        """Mask some of a batch's codes and regions, and predict them, with gradients.

        Args:
            codes: of this layout.
            labels: (B,) long classes; unused without conditioning.
            draws: random numbers of this batch, for masks and conditioning; torch's generator, if not given.
        """
        layout, condition = self.layout, self.conditioning(labels, draws)
        tokens, lengths = to_sequences(codes, ends=False), codes.lengths
        slots, is_code = tokens.slots, tokens.is_code
        grain = layout.slots(slots.device).grain[slots.clamp(max=layout.num_slots - 1)]
        masked = self.masking.codes(is_code, grain.double() / max(layout.num_grains - 1, 1), draws)
        states = self.states(slots, tokens.contents.masked_fill(masked, layout.no_content), condition)
        logits = self.content_head(states[masked], slots[masked])
        contents = Predictions.of(logits, tokens.contents[masked], grain[masked], masked, lengths)
        grains = None
        if self.grain_head is not None:
            regions = codes.grains.flatten(1)
            masked = self.masking.regions(regions, draws)
            states = self.region_states(regions.masked_fill(masked, layout.num_grains), condition)
            logits, targets = self.grain_head(states[masked]), regions[masked]
            grains = Predictions.of(
                logits, targets, targets, masked, lengths.new_full((len(codes),), layout.num_regions)
            )
        return MaskedPredictions(contents, grains, self.expected(codes), layout.num_grains)

    def expected(self, codes: GrainCodes) -> dict[str, Tensor | float]:
        """How many codes, and how many regions, training masks on average in a batch, up to rounding up in each image;
        known before any is masked."""
        ratio = self.masking.mean_ratio
        counts: dict[str, Tensor | float] = {"content": ratio * codes.lengths.sum().double()}
        if self.grain_head is not None:
            counts["grains"] = ratio * codes.grains.numel()
        return counts

    def states(self, slots: Tensor, contents: Tensor, condition: Tensor) -> Tensor:
        """(B, L, width) states that decide contents.

        Args:
            slots: (B, L), `pad_slot` behind the end, in any order.
            contents: (B, L), `no_content` where they are masked.
            condition: (B, width).
        """
        # with one grain, all images are of one length
        seen = None if self.layout.num_grains == 1 else (slots != self.layout.pad_slot)[:, None, None]
        tokens = self.embedding(slots, contents)
        return self._transform(self.content_transformer, tokens, slots, condition, seen)

    def region_states(self, grains: Tensor, condition: Tensor) -> Tensor:
        """(B, R, width) states that decide the (B, R) grains, K where they are masked."""
        slots = torch.arange(self.layout.num_regions, device=grains.device).expand_as(grains)
        tokens = self.embedding.at(slots) + self.grain(grains)
        return self._transform(self.grain_transformer, tokens, slots, condition)

    def _transform(
        self, transformer: Transformer, tokens: Tensor, slots: Tensor, condition: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        return transformer(
            tokens + condition[:, None],
            rotation=self.rotary(slots) if transformer.rotary else None,
            modulations=transformer.modulations(condition),
            mask=seen,
        )

    def accept(self, given: CodePrefix | CodeMask | None) -> CodeMask | None:
        return CodeMask.of_prefix(given) if isinstance(given, CodePrefix) else given

    def logits(self, labels: Tensor, given: CodeMask | None) -> ConditionedLogits:
        return ConditionedLogits(self, self.conditioning(labels))


class ConditionedLogits:
    """A `DGiTNAR` and a (B, width) condition as the questions that a sampler asks; the model is in evaluation mode."""

    def __init__(self, model: DGiTNAR, condition: Tensor) -> None:
        self.model, self.condition = model, condition

    def grains(self, grains: Tensor) -> Tensor:
        """See `MaskedLogits`."""
        return self.model.grain_head(self.model.region_states(grains, self.condition))

    def contents(self, slots: Tensor, contents: Tensor) -> Tensor:
        """See `MaskedLogits`."""
        return self.model.content_head(self.model.states(slots, contents, self.condition), slots)
