"""Every kind of model on a pretended GPU: no devices mixed; how often the host waits, and how many kernels it starts.

Numbers may fall, and must not rise unseen: the failure names the lines. Launches are compared with the version of torch
that they were recorded with, as others divide operations otherwise.
"""

import pytest
import torch
from helpers_pretend import CODINGS, SAMPLINGS, TRAININGS, coding, sample, step, total, unavailable
from pretended import Seen

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

RECORDED = "2.14"
# waits and launches, at most: of a training step
STEPS: dict[str, tuple[int, int]] = {
    "tokenizer": (1, 1126),
    "tokenizer, adversary": (1, 1453),
    "tokenizer, codebook per grain": (1, 1185),
    "tokenizer, three grains by gains": (1, 1690),
    "tokenizer, elastic, by errors": (1, 1293),
    "tokenizer, quantiles of each image": (1, 1376),
    "tokenizer, gates": (1, 1307),
    "tokenizer, variance": (1, 1096),
    "tokenizer, random": (1, 1145),
    "tokenizer, middle": (1, 1081),
    "tokenizer, FSQ": (1, 1119),
    "tokenizer, LFQ": (1, 1137),
    "tokenizer, SimVQ": (1, 1091),
    "tokenizer, cosine": (1, 1150),
    "tokenizer, fixed length": (0, 953),
    "MaskGIT's tokenizer": (0, 757),
    "Open-MAGVIT2's tokenizer": (0, 911),
    "DGiT-AR": (0, 602),
    "DGiT-AR, modern": (2, 767),
    "DGiT-AR, codebook per grain": (0, 609),
    "DGiT-AR, positions modelled": (0, 635),
    "DGiT-AR, map given": (0, 524),
    "DGiT-AR, windows": (0, 600),
    "raster order": (0, 488),
    "no classes": (0, 538),
    "DGiT-NAR": (10, 999),
    "DGiT-NAR, modern": (12, 1164),
    "MaskGIT": (6, 581),
}
# of drawing four samples
DRAWS: dict[str, tuple[int, int]] = {
    "DGiT-AR": (9, 5807),
    "DGiT-AR, guided and truncated": (9, 7025),
    "DGiT-AR, modern": (11, 8373),
    "DGiT-AR, map given": (12, 5006),
    "raster order": (9, 4863),
    "DGiT-NAR": (50, 1110),
    "DGiT-NAR, guided": (59, 1309),
    "MaskGIT": (38, 748),
}
# of coding four images and decoding them
CODES: dict[str, tuple[int, int]] = {
    "entropy": (3, 246),
    "gains": (3, 597),
    "gates": (3, 207),
    "quality": (33, 1817),
    "LFQ": (3, 264),
    "MaskGIT": (2, 161),
    "Open-MAGVIT2": (2, 198),
}


def hold(seen: Seen, waits: int, launches: int) -> None:
    assert not seen.mixes
    assert total(seen.waits) <= waits, seen.waits.most_common()
    if torch.__version__.startswith(RECORDED):
        assert total(seen.launches) <= launches, seen.launches.most_common(20)


@pytest.mark.parametrize("kind", TRAININGS)
def test_a_training_step(kind, tmp_path):
    hold(step(TRAININGS[kind], tmp_path), *STEPS[kind])


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_drawing_samples(kind):
    hold(sample(SAMPLINGS[kind][0], **SAMPLINGS[kind][1])[0], *DRAWS[kind])


@pytest.mark.parametrize("kind", CODINGS)
def test_coding_images_and_decoding_them(kind):
    hold(coding(CODINGS[kind][0], **CODINGS[kind][1]), *CODES[kind])
