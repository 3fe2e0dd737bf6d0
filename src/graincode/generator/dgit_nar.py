"""DGiT-NAR: all codes at once, by masked prediction; the grain map first, then the contents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core.codes import GrainCodes
from graincode.core.errors import check
from graincode.core.layout import CodeLayout
from graincode.core.prompts import CodeMask, CodePrefix
from graincode.core.rng import SampleRng
from graincode.core.sequences import to_sequences
from graincode.generator.base import Generator
from graincode.generator.embedding import Conditioning, ContentHead, Head, HeterogeneousEmbedding, initialize
from graincode.generator.masking import InformationMasking
from graincode.generator.transformer import Rotary, Transformer, normalized, refuse_modulation
from graincode.sampling import MaskedSampler
from graincode.sampling.protocol import RowLogits


@dataclass(frozen=True)
class Predictions:
    """Predictions of N values of a batch: of those that are masked; on a GPU of all, as it would make the CPU wait to
    count them. Of others the loss is 0, and none is correct.

    Attributes:
        loss, correct: (N,), negative log-likelihood in nats, and bool, whether the likeliest value was right.
        grain: (N,) long, of their codes or regions; -1 of those that are not masked.
        ratio: (N,) float64 in (0, 1], the share of their image's values that was masked; 0 of those that are not.
    """

    loss: Tensor
    correct: Tensor
    grain: Tensor
    ratio: Tensor

    @classmethod
    def of(
        cls, head: Callable[[Tensor, Tensor], Tensor], states: Tensor, slots: Tensor, targets: Tensor, grain: Tensor,
        masked: Tensor, lengths: Tensor,
    ) -> Predictions:  # fmt: skip
        """From (B, L, width) states, (B, L) slots, targets, grains and mask, (B,) lengths, and what makes (N, V) logits
        of (N, width) states and (N,) slots."""
        ratio = (masked.sum(dim=1).double() / lengths)[:, None].expand_as(masked).masked_fill(~masked, 0)
        at = _predicted(masked)
        parts = states, slots, targets.masked_fill(~masked, -1), grain.masked_fill(~masked, -1), ratio
        states, slots, targets, grain, ratio = (part.flatten(0, 1)[at] for part in parts)
        logits = head(states, slots)
        loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
        return cls(loss, logits.detach().argmax(dim=1) == targets, grain, ratio)


def _predicted(masked: Tensor) -> Tensor | slice:
    """Which of the flattened (B, L) values are predicted."""
    return masked.flatten().nonzero()[:, 0] if masked.device.type == "cpu" else slice(None)


@dataclass(frozen=True)
class MaskedPredictions:
    """Predictions of a batch's masked codes and, with several grains (`num_grains`), of its masked regions; `counts`
    says how many of each are masked on average, see `DGiTNAR.expected`."""

    contents: Predictions
    grains: Predictions | None
    counts: dict[str, Tensor | float]
    num_grains: int


class DGiTNAR(Generator):
    """Transformers that fill in the grain map and the codes; both see everything that is not masked, and no padding.

    Codes are tokens of content (the vector of "no content" where it is masked), position and grain, without an order.
    Regions are tokens of position and grain, or a vector for a masked one. The condition is added to every token, which
    is then normalised, and modulates the blocks of transformers with `adaln`. With one grain: MaskGIT.

    Args:
        width: of each token, in all parts.
        embedding: without an index.
        grain_transformer, content_transformer: not causal.
        masking: of training.
    Raises:
        GraincodeError: the parts do not fit each other or the layout.
    Source: our reading of DGiT-NAR, of which only an abstract is public; MaskGIT (Chang et al., 2022) is its ground.
    """

    sampler = MaskedSampler

    def __init__(
        self,
        layout: CodeLayout,
        width: int,
        embedding: HeterogeneousEmbedding,
        conditioning: Conditioning,
        grain_transformer: Transformer,
        content_transformer: Transformer,
        masking: InformationMasking | None = None,
    ) -> None:
        super().__init__()
        self.layout, self.masking, decides = layout, masking or InformationMasking(), layout.num_grains > 1
        if not conditioning.classes:
            refuse_modulation(grain_transformer, content_transformer)
        for transformer in (grain_transformer, content_transformer):
            check("causal", transformer.causal, "false, as codes are predicted from all others", not transformer.causal)
            embedding.check_positions(transformer)
        check("index", True, "false, as codes have no order", embedding.index is None)
        check("beta", self.masking.beta, "0 with one grain, the density of all codes", decides or not self.masking.beta)
        layers = len(grain_transformer.blocks)
        check("position_layers", layers, "1 or more, to predict the grain map", not decides or layers > 0)
        self.embedding, self.conditioning = embedding, conditioning
        self.grain_transformer = grain_transformer if decides else None
        self.content_transformer = content_transformer
        self.grain = nn.Embedding(layout.num_grains + 1, width) if decides else None
        self.grain_head = Head(width, layout.num_grains) if decides else None
        self.content_head = ContentHead(layout, width)
        rotary = content_transformer.rotary or (decides and grain_transformer.rotary)
        self.rotary = Rotary(layout.coordinates(), content_transformer.head_dim) if rotary else None
        initialize(self.grain, self.grain_head, self.content_head)

    def forward(self, codes: GrainCodes, labels: Tensor, rng: SampleRng | None = None) -> MaskedPredictions:
        """Predictions of a batch's masked codes and regions, given (B,) labels; masks and dropout are by `rng`."""
        layout, rng = self.layout, self.masking.ahead(self.layout, rng)
        condition = self.conditioning(labels, rng)
        tokens, lengths = to_sequences(codes, ends=False), codes.lengths
        slots, is_code = tokens.slots, tokens.is_code
        grain = layout.slots(slots.device).grain[slots.clamp(max=layout.num_slots - 1)]
        masked = self.masking.codes(is_code, grain.double() / max(layout.num_grains - 1, 1), rng)
        states = self.states(slots, tokens.contents.masked_fill(masked, layout.no_content), condition)
        contents = Predictions.of(self.content_head, states, slots, tokens.contents, grain, masked, lengths)
        grains = None
        if self.grain_head is not None:
            values, regions = codes.grains.flatten(1), torch.full_like(lengths, layout.num_regions)
            masked = self.masking.regions(values, rng)
            states = self.region_states(values.masked_fill(masked, layout.num_grains), condition)
            grains = Predictions.of(self._grain_logits, states, values, values, values, masked, regions)
        return MaskedPredictions(contents, grains, self.expected(codes), layout.num_grains)

    def _grain_logits(self, states: Tensor, _: Tensor) -> Tensor:
        return self.grain_head(states)

    def expected(self, codes: GrainCodes) -> dict[str, Tensor | float]:
        """How many codes and regions training masks in a batch on average."""
        lengths, most = codes.lengths, self.layout.num_regions
        counts: dict[str, Tensor | float] = {"content": self.masking.expected(lengths, self.layout.max_tokens).sum()}
        if self.grain_head is not None:
            counts["grains"] = self.masking.expected(torch.full_like(lengths, most), most).sum()
        return counts

    def states(
        self, slots: Tensor, contents: Tensor, condition: Tensor, modulations: list[Tensor] | None = None
    ) -> Tensor:
        """(B, L, width) states that predict contents, under a (B, width) condition, whose `modulations` may be computed
        already; of (B, L) slots in any order, `pad_slot` behind the end, and contents, `no_content` where masked."""
        # with one grain, all images are of one length
        seen = None if self.layout.num_grains == 1 else (slots != self.layout.pad_slot)[:, None, None]
        tokens = self.embedding(slots, contents, condition)
        return self.transform(self.content_transformer, tokens, slots, condition, modulations, mask=seen)

    def region_states(self, grains: Tensor, condition: Tensor, modulations: list[Tensor] | None = None) -> Tensor:
        """(B, R, width) states that predict the (B, R) grains, K where they are masked; arguments as of `states`."""
        slots = torch.arange(self.layout.num_regions, device=grains.device).expand_as(grains)
        tokens = normalized(self.embedding.at(slots) + self.grain(grains) + condition[:, None])
        return self.transform(self.grain_transformer, tokens, slots, condition, modulations)

    def fixed(self, sampler: MaskedSampler) -> dict[str, str]:
        if self.layout.num_grains > 1:
            return super().fixed(sampler)
        names = [field.name for field in fields(sampler) if field.name.startswith(sampler.other)]
        names += ["information_weight", "order"] if sampler.order.endswith("_first") else ["information_weight"]
        return super().fixed(sampler) | dict.fromkeys(names, "all codes are of one grain")

    def accept(self, given: CodePrefix | CodeMask | None) -> CodeMask | None:
        mask = CodeMask.of_prefix(given) if isinstance(given, CodePrefix) else given
        return mask and replace(mask, codes=replace(mask.codes, layout=self.layout))  # its order does not matter

    def logits(self, labels: Tensor, given: CodeMask | None) -> ConditionedLogits:
        return ConditionedLogits(self, self.conditioning(labels))


class ConditionedLogits:
    """`MaskedLogits` of a `DGiTNAR` in evaluation mode and a (B, width) condition."""

    def __init__(self, model: DGiTNAR, condition: Tensor) -> None:
        self.model, self.condition = model, condition
        self.of_grains = model.grain_transformer.modulations(condition) if model.grain_transformer else None
        self.of_contents = model.content_transformer.modulations(condition)

    def grains(self, grains: Tensor) -> Tensor:
        return self.model.grain_head(self.model.region_states(grains, self.condition, self.of_grains))

    def contents(self, slots: Tensor, contents: Tensor, at: Tensor) -> RowLogits:
        states = self.model.states(slots, contents, self.condition, self.of_contents).flatten(0, 1)[at]
        slots = slots.flatten()[at]
        return lambda rows: self.model.content_head(states[rows], slots[rows])
