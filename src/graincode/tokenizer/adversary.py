"""PatchGAN discriminator and VQGAN's adaptive weight."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from graincode.core.errors import check
from graincode.core.losses import Term, hinge_discriminator, hinge_generator, lecam
from graincode.core.schedules import ramp
from graincode.distributed import collectives
from graincode.tokenizer.blocks import norm

LECAM_DECAY = 0.99  # of the running averages, per step, as in its authors' code


class PatchDiscriminator(nn.Module):
    """Classifies patches as real or fake: (B, 3, H, W) images in [-1, 1] to (B, 1, h, w) logits.

    Args:
        channels: width of the first layer; each further one doubles it, up to 8 times.
        layers: convolutions of stride 2; H and W are at least 3 * 2^layers.
    Source: PatchGAN (Isola et al., 2017), as in VQGAN, but with group norm, which does not depend on the batch.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        check("channels", channels, "1 or more", channels >= 1)
        check("layers", layers, "1 or more", layers >= 1)
        self._depth = layers
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index, (before, after) in enumerate(pairwise(widths), start=1):
            convolution = nn.Conv2d(before, after, 4, stride=2 if index < layers else 1, padding=1, bias=False)
            parts += [convolution, norm(after), nn.LeakyReLU(0.2)]
        parts.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*parts)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        smallest, size = 3 * 2**self._depth, tuple(images.shape[2:])
        check(
            "layers", self._depth, f"fewer for images of {size} pixels: so many take {smallest}", min(size) >= smallest
        )
        return self.layers(images)


class Adversary(nn.Module):
    """A discriminator and the adaptive weight of its loss in the tokenizer's.

    The weight is |gradient of the reconstruction loss| / |gradient of the adversarial loss| at the decoder's last
    layer, at most `max_weight`. Both are of the whole global batch of the step before: those of this step are known
    only after its last micro-batch.

    Args:
        discriminator: (B, 3, H, W) to logits.
        start_step: steps before it begins to train; its loss reaches the tokenizer from the step after.
        ramp_steps: warm-up steps of that loss, over which its weight rises from 0.
        weight: of the adversarial loss, times the adaptive weight.
        max_weight: of the adaptive weight.
        lecam: weight of the LeCam regulariser in the discriminator's loss, by averages up to the step before; 0: none.
    Source: VQGAN (Esser et al., 2021), eq. 7; the clamp is DQ-VAE's; LeCam: see `core.losses.lecam`.
    """

    adaptive: Tensor
    averages: Tensor  # decayed sums over steps of the means of real logits, of fake ones, and of 1

    def __init__(
        self,
        discriminator: nn.Module,
        start_step: int,
        ramp_steps: int = 1000,
        weight: float = 1.0,
        max_weight: float = 0.75,
        lecam: float = 0.0,
    ) -> None:
        super().__init__()
        self.discriminator, self.start_step, self.ramp_steps = discriminator, start_step, ramp_steps
        self.weight, self.max_weight, self.lecam = weight, max_weight, lecam
        for name in ("start_step", "ramp_steps", "weight", "max_weight", "lecam"):
            check(name, getattr(self, name), "0 or more", getattr(self, name) >= 0)
        self.register_buffer("adaptive", torch.zeros(()))
        self.register_buffer("averages", torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of (B, 3, H, W) images."""
        return self.discriminator(images)

    def is_on(self, step: int) -> bool:
        """Whether the discriminator trains in this 1-based step."""
        return step > self.start_step

    def generator_term(self, fake: Tensor, reconstruction: Term, last_layer: Tensor, step: int) -> tuple[Term, Tensor]:
        """The adversarial term of (B, 3, H, W) reconstructions at a 1-based step, and what `update` takes: (2, n + 1),
        of the reconstruction's term and of this one, the gradient at the last layer's n weights, and the count."""
        self.discriminator.requires_grad_(False)
        logits = self.discriminator(fake)
        self.discriminator.requires_grad_(True)
        weight = self.adaptive * (self.weight * ramp(step, self.start_step, self.ramp_steps))
        term, pairs = Term(hinge_generator(logits).sum(), len(fake), weight), []
        for part in (reconstruction, term):
            (gradient,) = torch.autograd.grad(part.total, last_layer, retain_graph=True)
            pairs.append(torch.cat([gradient.flatten(), gradient.new_full((1,), float(part.count))]))
        return term, torch.stack(pairs)

    def discriminator_terms(self, logits: Tensor) -> tuple[dict[str, Term], Tensor]:
        """The discriminator's terms, and what `update_averages` takes, from logits of real and as many fake images."""
        real, fake = logits.to(self.adaptive.dtype).chunk(2)
        count, means = len(real), [part.detach().flatten(1).mean(1).sum() for part in (real, fake)]
        terms = {
            "discriminator": Term(hinge_discriminator(real, fake).sum(), count),
            "logits_real": Term(means[0], count, 0.0),
            "logits_fake": Term(means[1], count, 0.0),
        }
        if self.lecam:
            before = self.averages[:2] / self.averages[2].clamp(min=1e-3)  # 0 as long as nothing is known
            terms["lecam"] = Term(lecam(real, fake, *before).sum(), count, self.lecam)
        return terms, torch.stack([*means, means[0].new_full((), count)])

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor]) -> None:
        """Set the adaptive weight from the gradients of a step's micro-batches, here and on all other processes."""
        if not gradients:
            return
        found = collectives.sum_(sum(gradients))
        reconstruction, adversarial = (found[:, :-1] / found[:, -1:]).norm(dim=1)
        self.adaptive.copy_((reconstruction / (adversarial + 1e-4)).clamp(max=self.max_weight))

    @torch.no_grad()
    def update_averages(self, sums: Sequence[Tensor]) -> None:
        """Move the running averages towards the mean logits of a step's micro-batches, on all processes."""
        if self.lecam:
            found = collectives.sum_(sum(sums))
            self.averages.lerp_(found / found[2], 1 - LECAM_DECAY)
