"""DQVAE++: the variable-length tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graincode.core.codes import CodeLayout, GrainCodes, gather_cells, scatter_cells
from graincode.core.errors import GraincodeError
from graincode.core.rng import RESTARTS, Draws
from graincode.tokenizer.decoder import GrainDecoder
from graincode.tokenizer.encoder import GrainEncoder
from graincode.tokenizer.quantizer import EMAQuantizer, Quantized
from graincode.tokenizer.router import QuantileRouter, Routing


@dataclass(frozen=True)
class Reconstruction:
    """Attributes:
    images: (B, 3, H, W), about [-1, 1].
    quantized: the N codes of the batch.
    routing: the grain of each region.
    """

    images: Tensor
    quantized: Quantized
    routing: Routing


class DQVAE(nn.Module):
    """Variable-length tokenizer: an image in, as many codes as it needs out.

    Source: DQ-VAE (arXiv 2305.11718) and, as far as its abstract tells, DQVAE++; entropy routing from quantiles of the
    training data, codes that count once and the decoder's `expand` are our reading.
    """

    def __init__(
        self,
        layout: CodeLayout,
        encoder: GrainEncoder,
        router: QuantileRouter,
        quantizer: EMAQuantizer,
        decoder: GrainDecoder,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.encoder, self.router, self.quantizer, self.decoder = encoder, router, quantizer, decoder
        for part in (encoder, decoder):  # convolutions are faster so, on CPU and GPU
            part.to(memory_format=torch.channels_last)

    def forward(
        self, images: Tensor, ratios: Sequence[float] | None = None, draws: Draws | None = None
    ) -> Reconstruction:
        """Encode, quantise and decode (B, 3, H, W) images in [-1, 1], with gradients.

        Args:
            images: of the layout's size.
            ratios: as in `tokenize`.
            draws: random numbers of this batch, for the quantiser; taken from torch's generator if not given.
        """
        features = self.encoder(images)
        routing = self.router(images, ratios)
        vectors = gather_cells(features, routing.grains, self.layout)
        # a grain without a code in this batch must still give its head a gradient, or processes would differ
        vectors = vectors + 0 * sum(feature.sum() for feature in features)
        quantized = self.quantizer(vectors, None if draws is None else self._keys(draws, routing.grains))
        maps = scatter_cells(quantized.vectors, routing.grains, self.layout)
        return Reconstruction(self.decoder(maps, routing.grains), quantized, routing)

    @torch.no_grad()
    def tokenize(self, images: Tensor, ratios: Sequence[float] | None = None) -> GrainCodes:
        """The variable-length codes of (B, 3, H, W) images in [-1, 1].

        Args:
            images: of the layout's size.
            ratios: share of regions at each grain, coarsest first; by default the one of training. Shares refer to the
                training data: a busy image gets more fine regions than a smooth one.
        Raises:
            GraincodeError: the images' size or range is not as above, or the ratios do not fit the layout.
        """
        expected = (3, *self.layout.image_size)
        if tuple(images.shape[1:]) != expected:
            raise GraincodeError(
                f"images of shape {tuple(images.shape)}: this tokenizer takes (batch, {', '.join(map(str, expected))}) "
                f"in [-1, 1]; resize them, or type data.image_size={list(self.layout.image_size)}"
            )
        routing = self.router(images, ratios)
        if not bool(routing.density.isfinite().all()):  # comparisons with NaN would silently choose coarse
            raise GraincodeError(
                "a density is not finite: expected images in [-1, 1]; see graincode.core.images.from_uint8"
            )
        vectors = gather_cells(self.encoder(images), routing.grains, self.layout)
        indices = self.quantizer.nearest(vectors)[:, None]
        maps = scatter_cells(indices, routing.grains, self.layout)
        finest = sum(self.layout.expand(m[:, 0], g) for g, m in enumerate(maps))
        return GrainCodes(routing.grains, finest, self.layout)

    @torch.no_grad()
    def detokenize(self, codes: GrainCodes) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] that codes stand for.

        Raises:
            GraincodeError: the codes' layout is not this tokenizer's.
        """
        check_layouts(codes.layout, self.layout, "these codes", "this tokenizer")
        maps = []
        for g, (h, w) in enumerate(self.layout.grids):
            rows, columns = self.layout.grids[-1][0] // h, self.layout.grids[-1][1] // w
            vectors = self.quantizer.lookup(codes.indices[:, ::rows, ::columns]).permute(0, 3, 1, 2)
            maps.append(vectors * self.layout.cells_at(codes.grains, g)[:, None])
        return self.decoder(maps, codes.grains).clamp(-1, 1)

    def calibrate(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """`QuantileRouter.calibrate`, on training images."""
        return self.router.calibrate(batches)

    @torch.no_grad()
    def initialize(self, batches: Iterable[Tensor], draws: Draws) -> None:
        """Set the codebook to what the encoder makes of the first training images; the router must be calibrated.

        Args:
            batches: of training images; as many are taken as give four vectors for each entry, or all.
            draws: random numbers for the images of all batches, in order.
        """
        vectors, keys, start = [], [], 0
        for images in batches:
            grains = self.router(images).grains
            vectors.append(gather_cells(self.encoder(images), grains, self.layout))
            part = Draws(draws.seed, draws.places[start : start + len(images)].to(images.device))
            keys.append(self._keys(part, grains))
            start += len(images)
            if sum(map(len, vectors)) >= 4 * self.layout.codebook_size:
                break
        self.quantizer.initialize(torch.cat(vectors), torch.cat(keys))

    def _keys(self, draws: Draws, grains: Tensor) -> Tensor:
        """(N,) a random number for each code, a function of its image's place and its cell."""
        rows, columns = self.layout.grids[-1]
        finest = draws.uniforms(RESTARTS, 1, rows, columns)
        maps = [finest[:, :, :: rows // h, :: columns // w] for h, w in self.layout.grids]
        return gather_cells(maps, grains, self.layout)[:, 0]


def check_layouts(found: CodeLayout, wanted: CodeLayout, what: str, whose: str) -> None:
    """Refuse codes of another layout; the number of classes does not matter to a tokenizer.

    Raises:
        GraincodeError: naming the fields that differ.
    """
    a, b = found.to_config(), wanted.to_config()
    differing = [f"{key} {a[key]} instead of {b[key]}" for key in a if key != "classes" and a[key] != b[key]]
    if differing:
        raise GraincodeError(
            f"{what} do not fit {whose}: {', '.join(differing)}; type the tokenizer_path that made the codes"
        )
