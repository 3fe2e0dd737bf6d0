"""Small models of every kind, and what they do on a pretended GPU (`experiments/bench/pretended.py`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial

import torch
from helpers_training import LAYOUT, Codes, Edges, images
from pretended import CUDA, Pretended, Seen, pretended
from waits import counted_step

from graincode.core import constants, layout, rng
from graincode.core.layout import CodeLayout
from graincode.core.rng import SampleRng
from graincode.data import Augmentation
from graincode.generator import (
    AutoregressiveObjective,
    ClassConditioning,
    DGiTAR,
    DGiTNAR,
    HeterogeneousEmbedding,
    InformationMasking,
    MaskedObjective,
    NoConditioning,
    Transformer,
)
from graincode.tokenizer import (
    DQVAE,
    Adversary,
    CodingDensity,
    CosineQuantizer,
    EMAQuantizer,
    EntropyDensity,
    FeatureRouter,
    FixedDensity,
    FSQuantizer,
    GradientDensity,
    GrainDecoder,
    GrainEncoder,
    LFQuantizer,
    MAGVIT2Decoder,
    MAGVIT2Encoder,
    MaskGITDecoder,
    MaskGITEncoder,
    PatchDiscriminator,
    QuantileRouter,
    RandomDensity,
    ReconstructionObjective,
    SimVQuantizer,
    TrunkSize,
    VarianceDensity,
    densities,
)
from graincode.training.generator_stage import GeneratorStage
from graincode.training.tokenizer_stage import TokenizerStage

WIDTH, BATCH = 16, 8
MODERN = {"norm": "rms", "mlp": "swiglu", "qk_norm": True, "rotary": True}
EACH, TRIPLE = replace(LAYOUT, codebook="per_grain"), replace(LAYOUT, grains=((16, 16), (8, 8), (4, 4)))
FIXED = replace(LAYOUT, grains=((4, 4),))


@lru_cache(maxsize=1)
def unavailable() -> str:
    """Why there is no pretended device with this torch; empty where there is."""
    try:
        with pretended() as seen:
            x = torch.ones(2, 3).to("cuda").requires_grad_()
            (x @ x.T).sum().backward()
            float(x.detach().sum())
            assert sum(seen.waits.values()) == 2
            assert isinstance(x, Pretended)
    except (AttributeError, AssertionError, RuntimeError, TypeError) as error:
        return f"torch {torch.__version__} cannot pretend a device: {error!r}"
    return ""


@contextmanager
def _nothing_stays():
    """Nothing of the device stays behind in what is made once for each."""
    try:
        yield
    finally:
        for kept in (constants.constant, layout._slot_table, densities._order, rng._places):
            kept.cache_clear()


@contextmanager
def device():
    """`pretended` for a test."""
    with _nothing_stays(), pretended() as seen:
        yield seen


def step(make: Callable[[], TokenizerStage | GeneratorStage], **hardware: object) -> Seen:
    """What a step of a training does."""
    torch.manual_seed(0)
    with _nothing_stays():
        return counted_step(make(), BATCH, **hardware)


def sample(make: Callable[[], GeneratorStage], **settings: object) -> tuple[Seen, int]:
    """What a draw of four samples does, and how many steps it takes."""
    torch.manual_seed(0)
    stage, taken = make(), []
    module = stage.trainables[0].module.eval()
    given = module.prompt_of(stage.dataset[range(4)].codes)
    with device() as seen:
        module.to("cuda").layout.slots(CUDA)
        seen.clear()
        module.sample(
            torch.zeros(4, dtype=torch.long),
            batch_size=4,
            on_step=lambda step, _: taken.append(step),
            given=given,
            **settings,
        )
    return seen, len(taken)


def coding(make: Callable[[], TokenizerStage], **settings: object) -> Seen:
    """What `tokenize` and `detokenize` do with four images."""
    torch.manual_seed(0)
    stage = make()
    module = stage.trainables[0].module.eval()
    with device() as seen:
        module.to("cuda")
        images = stage.dataset[range(4)].images.to("cuda")
        for _ in range(2):  # what is made once is made by the first
            seen.clear()
            module.detokenize(module.tokenize(images, **settings))
    return seen


def tokenizer(
    layout: CodeLayout = LAYOUT, router: Callable = QuantileRouter, quantizer: Callable = EMAQuantizer,
    parts: tuple[type, type] = (GrainEncoder, GrainDecoder), adversary: bool = False, perceptual: object = None,
    **routing: object,
) -> TokenizerStage:  # fmt: skip
    """A stage 1 on a few images."""
    size = TrunkSize(8, [1, 2] if layout is not FIXED else [1, 1, 2], 1, [], patch=2 if layout is not FIXED else 1)
    ratios, extra = [1 / layout.num_grains] * layout.num_grains, {}
    if router is not FeatureRouter:
        routing = {"density": EntropyDensity(), **routing}
    else:
        routing["code_dim"] = 8
    if parts[1] is GrainDecoder:
        extra = {"expand": True, "coarse_blocks": 1}
    module = DQVAE(
        layout, parts[0](layout, size, 8), router(layout, ratios=ratios, **routing), quantizer(32, 8),
        parts[1](layout, size, 8, **extra),
    )  # fmt: skip
    opponent = Adversary(PatchDiscriminator(8, 2), start_step=1, ramp_steps=4, lecam=0.3) if adversary else None
    dataset = images(False)
    some = dataset[range(24)].images
    module.initialize([some], SampleRng(0, torch.arange(24)))
    module.calibrate([some])
    objective = ReconstructionObjective(perceptual=perceptual)
    return TokenizerStage(module, objective, opponent, dataset, dataset, Augmentation(flip=True, shift=2), 0, list)


class _Codes(Codes):
    """Codes of another layout, of whose finest grid each cell has its own index where there are several grains."""

    def __init__(self, layout: CodeLayout) -> None:
        super().__init__()
        grains = self.codes.grains if layout.num_grains == 2 else self.codes.indices * 0
        grid = layout.grids[0]
        self.codes = replace(self.codes, grains=grains[:, : grid[0], : grid[1]], layout=layout)
        self.lengths = self.codes.lengths.numpy()


def generator(
    kind: type = DGiTAR, layout: CodeLayout = LAYOUT, block: dict | None = None, window: int = 1, dropout: float = 0.1,
    embedding: dict | None = None, classes: bool = True, objective: object = None, **options: object,
) -> GeneratorStage:  # fmt: skip
    """A stage 2 on a few codes."""
    block = {"dropout": dropout, "causal": kind is DGiTAR, **(block or {})}
    if kind is DGiTNAR:
        options["masking"] = InformationMasking(**({"beta": 2.0, "elastic": True} if layout.num_grains > 1 else {}))
    module = kind(
        layout, WIDTH, HeterogeneousEmbedding(layout, WIDTH, index=kind is DGiTAR, **(embedding or {})),
        (ClassConditioning if classes else NoConditioning)(layout, WIDTH),
        *(Transformer(WIDTH, 1, 2, **block) for _ in range(2)), **options,
    )  # fmt: skip
    objective = objective or (AutoregressiveObjective() if kind is DGiTAR else MaskedObjective())
    return GeneratorStage(module, objective, _Codes(layout), _Codes(layout), None, window)


TRAININGS = {
    "tokenizer": tokenizer,
    "tokenizer, adversary": partial(tokenizer, adversary=True, perceptual=Edges(0.2)),
    "tokenizer, codebook per grain": partial(tokenizer, EACH),
    "tokenizer, three grains by gains": partial(tokenizer, TRIPLE, density=CodingDensity(in_training="gain")),
    "tokenizer, elastic, by errors": partial(tokenizer, EACH, density=CodingDensity(), elastic=True),
    "tokenizer, quantiles of each image": partial(tokenizer, TRIPLE, density=GradientDensity(), scope="image"),
    "tokenizer, gates": partial(tokenizer, EACH, FeatureRouter),
    "tokenizer, variance": partial(tokenizer, density=VarianceDensity()),
    "tokenizer, random": partial(tokenizer, density=RandomDensity()),
    "tokenizer, middle": partial(tokenizer, density=FixedDensity()),
    "tokenizer, FSQ": partial(tokenizer, quantizer=partial(FSQuantizer, levels=[8, 4])),
    "tokenizer, LFQ": partial(tokenizer, quantizer=LFQuantizer),
    "tokenizer, SimVQ": partial(tokenizer, quantizer=SimVQuantizer),
    "tokenizer, cosine": partial(tokenizer, quantizer=partial(CosineQuantizer, projected_dim=4)),
    "tokenizer, fixed length": partial(tokenizer, FIXED),
    "MaskGIT's tokenizer": partial(tokenizer, FIXED, parts=(MaskGITEncoder, MaskGITDecoder)),
    "Open-MAGVIT2's tokenizer": partial(
        tokenizer, FIXED, quantizer=LFQuantizer, parts=(MAGVIT2Encoder, MAGVIT2Decoder)
    ),
    "DGiT-AR": generator,
    "DGiT-AR, modern": partial(generator, block=MODERN | {"adaln": True}, embedding={"position": "none"}),
    "DGiT-AR, codebook per grain": partial(generator, layout=EACH, embedding={"position": "shared"}),
    "DGiT-AR, positions modelled": partial(
        generator, last_positions="modelled", objective=AutoregressiveObjective(position_weight=1.0)
    ),
    "DGiT-AR, map given": partial(generator, grain_map="given"),
    "DGiT-AR, windows": partial(generator, window=3),
    "raster order": partial(generator, layout=FIXED, next_position=False),
    "no classes": partial(generator, classes=False),
    "DGiT-NAR": partial(generator, DGiTNAR),
    "DGiT-NAR, modern": partial(generator, DGiTNAR, block=MODERN | {"adaln": True}, embedding={"position": "none"}),
    "MaskGIT": partial(generator, DGiTNAR, FIXED),
}


def total(counts: Counter[str]) -> int:
    """Of all lines."""
    return sum(counts.values())


SAMPLINGS = {
    "DGiT-AR": (TRAININGS["DGiT-AR"], {}),
    "DGiT-AR, guided and truncated": (TRAININGS["DGiT-AR"], {"guidance_scale": 2.0, "top_k": 8, "region_top_p": 0.9}),
    "DGiT-AR, modern": (TRAININGS["DGiT-AR, modern"], {}),
    "DGiT-AR, map given": (TRAININGS["DGiT-AR, map given"], {}),
    "raster order": (TRAININGS["raster order"], {}),
    "DGiT-NAR": (TRAININGS["DGiT-NAR"], {}),
    "DGiT-NAR, guided": (TRAININGS["DGiT-NAR"], {"guidance_scale": 2.0, "order": "halton"}),
    "MaskGIT": (TRAININGS["MaskGIT"], {}),
}
CODINGS = {
    "entropy": (TRAININGS["tokenizer"], {}),
    "gains": (TRAININGS["tokenizer, three grains by gains"], {"ratios": [0.5, 0.25, 0.25]}),
    "gates": (TRAININGS["tokenizer, gates"], {}),
    "quality": (TRAININGS["tokenizer, codebook per grain"], {"psnr": 20}),
    "LFQ": (TRAININGS["tokenizer, LFQ"], {}),
    "MaskGIT": (TRAININGS["MaskGIT's tokenizer"], {}),
    "Open-MAGVIT2": (TRAININGS["Open-MAGVIT2's tokenizer"], {}),
}
