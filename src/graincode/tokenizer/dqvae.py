"""DQVAE++: the variable-length tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core.codes import CodeCells, GrainCodes
from graincode.core.density import check_psnr, ratios_at
from graincode.core.errors import GraincodeError, check
from graincode.core.images import as_floats
from graincode.core.layout import CodeLayout, check_layouts
from graincode.core.rng import RESTARTS, SampleRng
from graincode.tokenizer.blocks import ExactLinear
from graincode.tokenizer.decoder import GrainDecoder
from graincode.tokenizer.densities import Probe
from graincode.tokenizer.encoder import GrainEncoder
from graincode.tokenizer.quantizer import Quantized, Quantizer
from graincode.tokenizer.router import Ratios, Router, Routing


@dataclass(frozen=True)
class Reconstruction:
    """Images (B, 3, H, W), about [-1, 1]; the codes of each codebook, grain by grain; the grain of each region."""

    images: Tensor
    quantized: tuple[Quantized, ...]
    routing: Routing

    @property
    def codes(self) -> Tensor:
        """(N,) indices of all codes of the batch, grain by grain."""
        return torch.cat([part.indices for part in self.quantized])

    @property
    def error(self) -> Tensor:
        """(N,) `Quantized.error` of all codes of the batch."""
        return torch.cat([part.error for part in self.quantized])


class DQVAE(nn.Module):
    """Variable-length tokenizer: an image in, as many codes as it needs out.

    Args:
        layout: of all parts; with `codebook="per_grain"` each grain gets a copy of the quantizer.
        projected_dim: dimension of the quantizer's vectors, which linear maps, shared by all grains, lead to from the
            encoder's and back; None: the encoder's are quantised as they are.
    Source: DQ-VAE (arXiv 2305.11718) and, as far as its abstract says, DQVAE++; quantiles of the training data as
        thresholds, codes that count once, routing by coding error and the decoder's coarse path are our reading.
    """

    def __init__(
        self, layout: CodeLayout, encoder: GrainEncoder, router: Router, quantizer: Quantizer, decoder: GrainDecoder,
        projected_dim: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check("projected_dim", projected_dim, "null, or 1 or more", projected_dim is None or projected_dim >= 1)
        quantizer.check_dimension(encoder.code_dim if projected_dim is None else projected_dim)
        self.layout = layout
        self.encoder, self.router, self.decoder = encoder, router, decoder
        self.quantizers = nn.ModuleList(copy.deepcopy(quantizer) for _ in range(layout.num_codebooks))
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if projected_dim is not None:
            self.project_in = ExactLinear(encoder.code_dim, projected_dim)
            self.project_out = nn.Linear(projected_dim, encoder.code_dim)
        for part in (encoder, decoder):  # convolutions are faster so, on CPU and GPU
            part.to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.decoder.last.weight.device

    def forward(self, images: Tensor, ratios: Ratios | None = None, rng: SampleRng | None = None) -> Reconstruction:
        """Encode as `tokenize`, and decode, with gradients; random numbers are torch's without an `rng`."""
        probe = self.probe(images, rng)
        features = probe.features  # before the router, which may compute them without gradients
        routing = self.router(probe, ratios)
        if routing.gates is not None:
            gates = (self.layout.expand(routing.gates, 0, g)[:, None] for g in range(self.layout.num_grains))
            features = [x * gate.to(x) for x, gate in zip(features, gates, strict=True)]
        # a grain without a code in this batch must still give its head a gradient, or processes would differ
        unused = 0 * sum(feature.sum() for feature in features)
        cells = CodeCells.of(routing.grains, self.layout)
        parts = [self.project_in(part + unused) for part in cells.gather(features)]
        keys = [None] * len(parts)
        if rng is not None:
            keys = [key[:, 0] for key in cells.gather(self._keys(rng))]
        quantized = tuple(quantize(*each) for quantize, *each in zip(self.quantizers, parts, keys, strict=True))
        vectors = [self.project_out(part.vectors) for part in quantized]
        return Reconstruction(self.decoder(cells.scatter(vectors), routing.grains), quantized, routing)

    def probe(self, images: Tensor, rng: SampleRng | None = None) -> Probe:
        """(B, 3, H, W) images as a router uses them."""
        # without a reference to itself, which would keep its features for the garbage collector
        return Probe(images, partial(self.encoder, images), partial(self._error_at, images), rng)

    def route(self, images: Tensor, ratios: Ratios | None = None) -> Routing:
        """The grain of each region of (B, 3, H, W) images, as `tokenize` chooses it."""
        self._check_mode()
        return self.router(self.probe(images), ratios)

    @torch.no_grad()
    def tokenize(self, images: Tensor, ratios: Ratios | None = None, psnr: float | None = None) -> GrainCodes:
        """The variable-length codes of (B, 3, H, W) images.

        Args:
            images: of the layout's size, floating point in [-1, 1] or uint8, such as `graincode.as_images` makes.
            ratios: share of regions at each grain, coarsest first, or (B, K) of them; by default those of training.
                Shares refer to the training data: a busy image gets more fine regions than a smooth one.
            psnr: in dB, 0 to 100, instead of ratios: as few codes for each image as reach it (seven decodes more), or
                all fine.
        Raises:
            GraincodeError: an argument is not as above, the ratios do not fit the layout, or it is in training mode.
        """
        images = as_floats(images, self.decoder.last.weight.dtype)
        shape, (height, width) = tuple(images.shape), self.layout.image_size
        if shape[1:] != (3, height, width):
            raise GraincodeError(f"images of shape {shape}: expected (batch, 3, {height}, {width}); resize the images")
        check("psnr", psnr, "null where ratios are given: one follows from the other", psnr is None or ratios is None)
        check_psnr(psnr)
        self._check_mode()
        probe = self.probe(images)
        return self.codes_at(probe, self.router(probe, ratios)) if psnr is None else self._reach(probe, psnr)

    def _reach(self, probe: Probe, psnr: float) -> GrainCodes:
        """The codes of all images with as few of them as reach an error, by halving the range of mixtures."""
        images, layout = probe.images, self.layout
        low = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        high = torch.ones_like(low)
        best = self.codes_at(probe, self.router(probe, ratios_at(high, layout.num_grains)))
        for step in range(7):
            middle = low if step == 0 else (low + high) / 2  # the first tries whether all coarse will do
            codes = self.codes_at(probe, self.router(probe, ratios_at(middle, layout.num_grains)))
            reached = ((self.detokenize(codes) - images) / 2).square().flatten(1).mean(dim=1) <= 10 ** (-psnr / 10)
            high, low = torch.where(reached, middle, high), torch.where(reached, low, middle)
            better = reached & (codes.lengths <= best.lengths)
            kept = torch.arange(len(images), device=images.device) + torch.where(better, len(images), 0)
            best = GrainCodes.cat([best, codes])[kept]
        return best

    def codes_at(self, probe: Probe, routing: Routing) -> GrainCodes:
        """The codes of a probe's images under a routing, without gradients."""
        if not bool(routing.density.isfinite().all()):  # comparisons with NaN would silently choose coarse
            raise GraincodeError("a density is not finite: expected images in [-1, 1], as from_uint8 makes them")
        cells = CodeCells.of(routing.grains, self.layout)
        parts = zip(self.quantizers, cells.gather(probe.features), strict=True)
        indices = [quantizer.nearest(self.project_in(part))[:, None] for quantizer, part in parts]
        finest = sum(self.layout.expand(m[:, 0], g) for g, m in enumerate(cells.scatter(indices)))
        return GrainCodes(routing.grains, finest, self.layout)

    @torch.no_grad()
    def detokenize(self, codes: GrainCodes) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] that codes of this tokenizer's layout stand for."""
        check("codes", type(codes).__name__, "GrainCodes, such as tokenize gives", isinstance(codes, GrainCodes))
        check_layouts(codes.layout, self.layout, "these codes", "this tokenizer")
        maps = []
        for g in range(self.layout.num_grains):
            quantizer = self.quantizers[g % self.layout.num_codebooks]
            vectors = self.project_out(quantizer.lookup(self.layout.corners(codes.indices, g)))
            maps.append(vectors.permute(0, 3, 1, 2) * self.layout.cells_at(codes.grains, g)[:, None])
        return self.decoder(maps, codes.grains).clamp(-1, 1)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """`Router.calibrate`, on batches of (B, 3, H, W) training images."""
        return self.router.calibrate(self.probe(images) for images in batches)

    @torch.no_grad()
    def initialize(self, batches: Iterable[Tensor], rng: SampleRng) -> None:
        """Start the codebooks from the encoder's vectors of batches of (B, 3, H, W) training images, until each entry
        has four of the coarsest; `rng` is for the images of all batches, in order."""
        layout, start = self.layout, 0
        found: list[list[tuple[Tensor, Tensor]]] = []  # of each batch and grain: vectors and keys
        for images in batches:
            part = SampleRng(rng.seed, rng.sample_ids[start : start + len(images)].to(images.device))
            pairs = zip(self.encoder(images), self._keys(part), strict=True)
            found.append([(self.project_in(x.permute(0, 2, 3, 1).flatten(0, 2)), key.flatten()) for x, key in pairs])
            start += len(images)
            if start * layout.num_regions >= 4 * layout.codebook_size:
                break
        for index, quantizer in enumerate(self.quantizers):
            own = [index] if layout.num_codebooks > 1 else range(layout.num_grains)
            parts = [batch[g] for g in own for batch in found]
            quantizer.initialize(*map(torch.cat, zip(*parts, strict=True)))

    @torch.no_grad()
    def update(self, quantized: Sequence[Sequence[Quantized]], routings: Sequence[Routing]) -> None:
        """After an optimizer step: move codebooks and thresholds by the codes and routings of its micro-batches."""
        for index, quantizer in enumerate(self.quantizers):
            quantizer.update([parts[index].seen for parts in quantized])
        self.router.update(routings)

    def _check_mode(self) -> None:
        if self.training:
            raise GraincodeError("a tokenizer in training mode chooses grains as training does: call tokenizer.eval()")

    @torch.no_grad()
    def _error_at(self, images: Tensor, features: list[Tensor], grain: int) -> Tensor:
        layout, feature = self.layout, features[grain].detach()
        grains = torch.full((len(feature), *layout.grids[0]), grain, device=feature.device)
        quantizer = self.quantizers[grain % layout.num_codebooks]
        vectors = self.project_in(feature.permute(0, 2, 3, 1))
        indices = quantizer.nearest(vectors.flatten(0, 2)).view(vectors.shape[:-1])
        chosen = self.project_out(quantizer.lookup(indices)).permute(0, 3, 1, 2)
        maps = [chosen.new_zeros(*chosen.shape[:2], *grid) for grid in layout.grids]
        maps[grain] = chosen
        reconstruction = self.decoder(maps, grains).clamp(-1, 1)
        error = (reconstruction.to(images.dtype) - images).square().mean(dim=1, keepdim=True)
        return F.avg_pool2d(error, layout.grains[0])[:, 0]

    def _keys(self, rng: SampleRng) -> list[Tensor]:
        """K maps (B, 1, h_g, w_g) of random numbers, functions of the sample's id and the cell."""
        finest = rng.uniforms(RESTARTS, 1, *self.layout.grids[-1])
        return [self.layout.corners(finest, g) for g in range(self.layout.num_grains)]
