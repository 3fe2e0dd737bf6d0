"""What all generators have in common: drawing samples, batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError, brief, check, check_seed, check_whole
from graincode.core.layout import CodeLayout, check_layouts
from graincode.core.prompts import CodeMask, CodePrefix
from graincode.core.rng import uniforms
from graincode.core.sequences import from_sequences
from graincode.distributed.blocks import compile_blocks
from graincode.generator.embedding import Conditioning, ContentHead
from graincode.generator.transformer import Rotary, Transformer
from graincode.sampling import AutoSampler, Sampler
from graincode.sampling.protocol import AutoregressiveLogits, MaskedLogits
from graincode.sampling.settings import Part


class Generator(nn.Module, ABC):
    """A model of variable-length codes, called as `generator(codes, labels, rng)` in training.

    Attributes:
        sampler: class of its sampler.
        has_likelihood: whether it gives real codes a likelihood.
        needs_prompt: whether samples must be given what `prompt_of` says.
    """

    sampler: ClassVar[type[Sampler]]
    has_likelihood: ClassVar[bool] = False
    needs_prompt = False
    extra_tokens = 0  # of an image, besides its codes
    layout: CodeLayout
    conditioning: Conditioning
    content_head: ContentHead
    rotary: Rotary | None

    @property
    def classes(self) -> int:
        """Number of classes that samples can be asked for; 0 without conditioning."""
        return self.conditioning.classes

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.content_head.weight.device

    def bytes_of_pass(self) -> int:
        """About the most memory that a pass over one image takes, without gradients: the activations of a block, the
        logits in float64, and their logarithms."""
        weight, tokens = self.content_head.weight, self.layout.max_tokens
        return tokens * (16 * weight.shape[1] * weight.element_size() + 2 * 8 * self.layout.codebook_size)

    def bytes_of_sample(self, guided: bool) -> int:
        """About the most memory that drawing one sample takes: passes over all tokens, or where keys and values of all
        are kept, these and passes over one."""
        weight, tokens = self.content_head.weight, self.layout.max_tokens
        layers = sum(len(part.blocks) for part in self.modules() if isinstance(part, Transformer) and part.causal)
        kept = 2 * layers * tokens * weight.shape[1] * weight.element_size()
        return (kept + self.bytes_of_pass() // (tokens if layers else 1)) * (1 + guided)

    def prompt_of(self, codes: GrainCodes) -> CodePrefix | None:
        """What a sample must be given to become an image like that of these codes; None: nothing."""
        return None

    def transform(
        self, stack: Transformer, tokens: Tensor, slots: Tensor, condition: Tensor, modulations: Any, **more: Any
    ) -> Tensor:
        """A stack's states of (B, L, width) tokens at (B, L) slots, under a (B, width) condition; `modulations` are the
        condition's, if they are computed already, and `more` what else the stack takes, such as its cache."""
        rotation = self.rotary(slots) if stack.rotary else None
        return stack(tokens, rotation=rotation, modulations=modulations or stack.modulations(condition), **more)

    @abstractmethod
    def accept(self, given: CodePrefix | CodeMask | None) -> Any:
        """What is given of samples, as `logits` and the sampler take it; refuses what this generator cannot keep."""

    @abstractmethod
    def logits(self, labels: Tensor, given: Any) -> AutoregressiveLogits | MaskedLogits:
        """What the sampler draws from, for (B,) labels; under guidance (2B,), of which the second half has no class."""

    def resolve(self, sampler: AutoSampler) -> Sampler:
        """The sampler, or this generator's own with the settings of an `AutoSampler`; refuses what does not fit it."""
        if type(sampler) is AutoSampler:
            sampler = self.sampler(**asdict(sampler))
        fits, kind = isinstance(sampler, self.sampler), type(self).__name__
        check("sampler", sampler.name, f"auto or {self.sampler.name}, as the generator is a {kind}", fits)
        for name, why in self.fixed(sampler).items():
            value, default = getattr(sampler, name), getattr(self.sampler, name)
            check(name, value, f"{default}, as {why}", value == default)
        return sampler

    def fixed(self, sampler: Sampler) -> dict[str, str]:
        """Settings of the sampler that must keep their defaults here, and why."""
        if not self.classes:
            return {"guidance_scale": "the generator has no classes"}
        return {} if self.conditioning.dropout else {"guidance_scale": "dropout=0 trained it with classes alone"}

    def compile_sampling(self) -> None:
        """Draw samples with compiled code from now on; results change by rounding alone."""
        compile_blocks(self)

    def sample(
        self,
        labels: Tensor,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 32,
        on_step: Callable[[int, int], None] = lambda *_: None,
        given: CodePrefix | CodeMask | None = None,
        sampler: AutoSampler | None = None,
        **settings: Any,
    ) -> GrainCodes:
        """Draw one image's codes for each label, on the CPU.

        Sample i depends on (seed, first_index + i), its label and what is given of it alone. In float32 the other
        samples of its batch, which is always filled up, and `batch_size` may change a logit's last bit.

        Args:
            labels: (N,) long classes, N >= 1; without conditioning only their number matters.
            seed: 0 or more, below 2^57.
            first_index: of the first sample, to go on where another call stopped.
            batch_size: samples that are drawn at one time.
            on_step: called with the number of steps that the current batch has taken, and of samples that are complete.
            given: the codes that each sample keeps.
            sampler, settings: to draw with, or settings of this generator's own sampler.
        Raises:
            GraincodeError: the generator is in training mode, or an argument does not fit it.
        """
        return GrainCodes.cat(
            [*self.stream(labels, seed, first_index, batch_size, on_step, given, sampler, **settings)]
        )

    def stream(
        self,
        labels: Tensor,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 32,
        on_step: Callable[[int, int], None] = lambda *_: None,
        given: CodePrefix | CodeMask | None = None,
        sampler: AutoSampler | None = None,
        **settings: Any,
    ) -> Iterator[GrainCodes]:
        """What `sample` draws, in order, `batch_size` images at a time: for more than fit in memory."""
        fits = isinstance(labels, Tensor) and labels.dtype == torch.long and labels.ndim == 1 and len(labels) > 0
        check("labels", brief(labels), "(N,) long, N >= 1, such as torch.zeros(1).long()", fits)
        check_seed(seed)
        for name, value, least in ("first_index", first_index, 0), ("batch_size", batch_size, 1):
            check_whole(name, value, least)
        low, high = int(labels.min()), int(labels.max())
        if self.classes and not 0 <= low <= high < self.classes:
            raise GraincodeError(f"labels from {low} to {high}: expected 0 to {self.classes - 1}")
        if given is not None:
            check_layouts(given.layout, self.layout, "the codes given", "this generator")
            if len(given) != len(labels):
                raise GraincodeError(f"codes of {len(given)} images: expected {len(labels)}")
        if isinstance(given, CodePrefix):
            given.check()
        given = self.accept(given)
        check("sampler", sampler, "none beside settings", sampler is None or not settings)
        names = [field.name for field in fields(self.sampler)]
        for name, value in settings.items():
            check(name, value, f"a setting of {self.sampler.name} sampling ({', '.join(names)})", name in names)
        sampler = self.resolve(sampler or self.sampler(**settings))
        if self.training:
            raise GraincodeError("a generator in training mode drops labels and activations: call generator.eval()")
        labels = labels.cpu()

        def part(samples: Tensor) -> Part:
            chosen = labels[samples]
            if sampler.guidance_scale != 1:
                chosen = torch.cat([chosen, torch.full_like(chosen, self.layout.null_class)])
            numbers = uniforms(seed, (samples + first_index).tolist(), *sampler.numbers(self.layout))
            known = None if given is None else given[samples].to(self.device)
            return Part(chosen.to(self.device), numbers.to(self.device), known)

        drawn = sampler.stream(self.logits, self.layout, part, len(labels), batch_size, on_step)
        return (from_sequences(sequences).to("cpu") for sequences in drawn)
