"""DGiT-NAR: all codes at once, by masked prediction; the grain map first, then the contents."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core.codes import GrainCodes
from graincode.core.density import quantile_table, thresholds
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.core.prompts import CodeMask, CodePrefix
from graincode.core.rng import SampleRng
from graincode.core.sequences import to_sequences
from graincode.generator.base import Generator
from graincode.generator.embedding import (
    ClassConditioning,
    ContentHead,
    HeterogeneousEmbedding,
    NoConditioning,
    initialize,
    normalized,
)
from graincode.generator.masking import InformationMasking
from graincode.generator.transformer import Rotary, Transformer, refuse_modulation
from graincode.sampling import MaskedSampler, RowLogits, Sampler

_ONE_DENSITY = "all codes have one density (one grain, generator.model.density_bins=1)"


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
    grains: of the masked regions' values; None with one grain and one bin.
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
    every token, which is then normalised, and modulates the blocks of transformers with `adaln`. With one grain this is
    MaskGIT, and there is no grain transformer.

    With n > 1 `density_bins` the grain transformer fills in values, n * grain + bin, instead of grains: the bin tells
    how dense a region is among the training regions of its grain, of which each bin has an equal share, but for ties.
    Training's masks and the order of sampling then go by values; contents still see grains alone. With one grain there
    is a grain transformer, too, of bins alone.

    Args:
        layout: the code layout.
        width: of each token.
        embedding: without an index.
        conditioning, grain_transformer, content_transformer: its parts, of this width; the transformers are not causal.
        masking: of training.
        density_bins: n, >= 1; above 1 training takes densities, and `calibrate` comes before it.
    Attributes:
        edges: (K, n - 1), between the bins of each grain, part of the weights; None with one bin.
    Raises:
        GraincodeError: a part has an order, the places of codes are not told, there are no bins, masking goes by
            densities that are all the same, `adaln` has no condition, or a grain transformer that is needed no layers.
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
        density_bins: int = 1,
    ) -> None:
        super().__init__()
        if not conditioning.classes:
            refuse_modulation(grain_transformer, content_transformer)
        if density_bins < 1:
            raise GraincodeError(
                f"density_bins={density_bins}: expected 1 or more; type for example generator.model.density_bins=4"
            )
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
        self.density_bins, self.needs_density = density_bins, density_bins > 1
        self.num_values = layout.num_grains * density_bins
        decides = self.num_values > 1
        if self.masking.beta and not decides:
            raise GraincodeError(
                f"beta={self.masking.beta}, but {_ONE_DENSITY}: type generator.masking.beta=0 and "
                "generator.masking.elastic=false, or generator.model.density_bins=4"
            )
        if decides and not len(grain_transformer.blocks):
            raise GraincodeError(
                "grain_layers=0, but the grain transformer makes the grain map, and would see a region at a time: type "
                "for example generator.size.grain_layers=2"
            )
        self.grain_transformer = grain_transformer if decides else None
        self.content_transformer = content_transformer
        self.grain = nn.Embedding(self.num_values + 1, width) if decides else None
        self.grain_head = nn.Linear(width, self.num_values) if decides else None
        self.content_head = ContentHead(layout, width)
        rotary = content_transformer.rotary or (decides and grain_transformer.rotary)
        self.rotary = Rotary(layout.coordinates(), content_transformer.head_dim) if rotary else None
        if self.grain is not None:
            nn.init.normal_(self.grain.weight, std=0.02)
        initialize(self.grain_head, self.content_head)
        edges = torch.full((layout.num_grains, density_bins - 1), torch.nan) if self.needs_density else None
        self.register_buffer("edges", edges)

    def forward(
        self, codes: GrainCodes, labels: Tensor, rng: SampleRng | None = None, density: Tensor | None = None
    ) -> MaskedPredictions:
        """Mask some of a batch's codes and regions, and predict them, with gradients.

        Args:
            codes: of this layout.
            labels: (B,) long classes; unused without conditioning.
            rng: random numbers of this batch, for masks and conditioning; torch's generator, if not given.
            density: (B, H0, W0) of the regions; unused with one bin.
        Raises:
            GraincodeError: there are bins, and no densities, or no edges yet.
        """
        layout, condition = self.layout, self.conditioning(labels, rng)
        values = self.values(codes, density)
        tokens, lengths = to_sequences(codes, ends=False), codes.lengths
        slots, is_code = tokens.slots, tokens.is_code
        table, owner = layout.slots(slots.device), slots.clamp(max=layout.num_slots - 1)
        grain, value = table.grain[owner], values.gather(1, table.region[owner])
        masked = self.masking.codes(is_code, value.double() / max(self.num_values - 1, 1), rng)
        states = self.states(slots, tokens.contents.masked_fill(masked, layout.no_content), condition)
        logits = self.content_head(states[masked], slots[masked])
        contents = Predictions.of(logits, tokens.contents[masked], grain[masked], masked, lengths)
        grains = None
        if self.grain_head is not None:
            masked = self.masking.regions(values, rng)
            states = self.region_states(values.masked_fill(masked, self.num_values), condition)
            logits, targets = self.grain_head(states[masked]), values[masked]
            regions = lengths.new_full((len(codes),), layout.num_regions)
            grains = Predictions.of(logits, targets, targets // self.density_bins, masked, regions)
        return MaskedPredictions(contents, grains, self.expected(codes), layout.num_grains)

    def values(self, codes: GrainCodes, density: Tensor | None = None) -> Tensor:
        """(B, R) long values in [0, K n) of the regions of codes, n * grain + bin.

        Args:
            codes: of B images.
            density: (B, H0, W0) of the regions; unused with one bin.
        Raises:
            GraincodeError: there are bins, and no densities, or no edges yet.
        """
        grains = codes.grains.flatten(1)
        if self.edges is None:
            return grains
        if density is None:
            raise GraincodeError(
                f"density_bins={self.density_bins} without densities: give those of CodeBatch, of codes extracted by "
                "this version, or type generator.model.density_bins=1"
            )
        if bool(self.edges.isnan().any()):
            raise GraincodeError("the bins of the density have no edges yet: call calibrate, or load weights")
        bins = (density.flatten(1)[..., None] > self.edges[grains]).sum(dim=2)
        return self.density_bins * grains + bins

    @torch.no_grad()
    def calibrate(self, grains: Tensor, density: Tensor) -> None:
        """Set the edges of the bins: the quantiles of the density of each grain's regions.

        Args:
            grains: (N, H0, W0) long of training images.
            density: (N, H0, W0) float32 of their regions.
        Raises:
            GraincodeError: all densities are equal.
        """
        if self.edges is None:
            return
        if not bool((density != density.flatten()[0]).any()):
            raise GraincodeError(
                f"density_bins={self.density_bins}, but all regions have one density (with one grain, "
                "tokenizer/router=coding measures none): type generator.model.density_bins=1, or train the tokenizer "
                "with tokenizer/router=entropy"
            )
        shares = torch.arange(1, self.density_bins, device=density.device) / self.density_bins
        for g, edges in enumerate(self.edges):
            own = density[grains == g]
            edges.copy_(thresholds(quantile_table(own if len(own) else density), shares))

    def expected(self, codes: GrainCodes) -> dict[str, Tensor | float]:
        """How many codes, and how many regions, training masks in a batch on average; known before any is masked."""
        layout = self.layout
        counts: dict[str, Tensor | float] = {"content": self.masking.expected(codes.lengths, layout.max_tokens).sum()}
        if self.grain_head is not None:
            regions = codes.lengths.new_full((len(codes),), layout.num_regions)
            counts["grains"] = self.masking.expected(regions, layout.num_regions).sum()
        return counts

    def states(
        self, slots: Tensor, contents: Tensor, condition: Tensor, modulations: list[Tensor] | None = None
    ) -> Tensor:
        """(B, L, width) states that decide contents.

        Args:
            slots: (B, L), `pad_slot` behind the end, in any order.
            contents: (B, L), `no_content` where they are masked.
            condition: (B, width).
            modulations: of the condition, of `content_transformer`, where they are known.
        """
        # with one grain, all images are of one length
        seen = None if self.layout.num_grains == 1 else (slots != self.layout.pad_slot)[:, None, None]
        tokens = self.embedding(slots, contents)
        return self._transform(self.content_transformer, tokens, slots, condition, modulations, seen)

    def region_states(self, values: Tensor, condition: Tensor, modulations: list[Tensor] | None = None) -> Tensor:
        """(B, R, width) states that decide the (B, R) values, K n where they are masked; arguments as of `states`."""
        slots = torch.arange(self.layout.num_regions, device=values.device).expand_as(values)
        tokens = self.embedding.at(slots) + self.grain(values)
        return self._transform(self.grain_transformer, tokens, slots, condition, modulations)

    def _transform(
        self,
        transformer: Transformer,
        tokens: Tensor,
        slots: Tensor,
        condition: Tensor,
        modulations: list[Tensor] | None,
        seen: Tensor | None = None,
    ) -> Tensor:
        return transformer(
            normalized(tokens + condition[:, None]),
            rotation=self.rotary(slots) if transformer.rotary else None,
            modulations=modulations or transformer.modulations(condition),
            mask=seen,
        )

    def numbers(self, sampler: Sampler) -> tuple[int, ...]:
        return sampler.numbers(self.layout, self.density_bins)

    def check_sampler(self, sampler: Sampler) -> None:
        super().check_sampler(sampler)
        if self.num_values > 1:
            return
        of_map = [field.name for field in fields(sampler) if field.name.startswith(sampler.other)]
        ignored = ["information_weight", "information_decay", *of_map]
        ignored += ["order"] if sampler.order in ("coarse_first", "dense_first") else []
        ignored += ["remask"] if sampler.order == "halton" else []
        for name in ignored:
            value, plain = getattr(sampler, name), getattr(MaskedSampler, name)
            if value != plain:
                effect = "there is no grain map to draw" if name in of_map else "it has no effect"
                raise GraincodeError(
                    f"{name}={value}, but {_ONE_DENSITY}, so that {effect}: type "
                    f"sampler.{name}={str(plain).lower()}, or train with generator.model.density_bins=4"
                )

    def accept(self, given: CodePrefix | CodeMask | None) -> CodeMask | None:
        return CodeMask.of_prefix(given) if isinstance(given, CodePrefix) else given

    def logits(self, labels: Tensor, given: CodeMask | None) -> ConditionedLogits:
        return ConditionedLogits(self, self.conditioning(labels))


class ConditionedLogits:
    """A `DGiTNAR` and a (B, width) condition as the questions that a sampler asks; the model is in evaluation mode."""

    def __init__(self, model: DGiTNAR, condition: Tensor) -> None:
        self.model, self.condition, self.density_bins = model, condition, model.density_bins
        self.of_grains, self.of_contents = (
            None if stack is None else stack.modulations(condition)
            for stack in (model.grain_transformer, model.content_transformer)
        )

    def grains(self, values: Tensor) -> Tensor:
        """See `MaskedLogits`."""
        return self.model.grain_head(self.model.region_states(values, self.condition, self.of_grains))

    def contents(self, slots: Tensor, contents: Tensor, at: Tensor) -> RowLogits:
        """See `MaskedLogits`."""
        states = self.model.states(slots, contents, self.condition, self.of_contents)[at]
        slots = slots[at]
        return lambda rows: self.model.content_head(states[rows], slots[rows])
