"""Every kind of model on a pretended GPU: no devices mixed; how often the host waits, and how many kernels it starts.

Numbers may fall, and must not rise unseen: the failure names the lines. Launches are compared with the version of torch
that they were recorded with, as others divide operations otherwise.
"""

from functools import partial

import pytest
import torch
from helpers_networks import write_vgg16
from helpers_pretend import CODINGS, SAMPLINGS, TRAININGS, coding, device, sample, step, total, unavailable
from pretended import CUDA, Seen
from strategies import LAYOUTS, random_codes, random_grains

from graincode.data import CodeBatch
from graincode.networks.perceptual import LPIPSDistance

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

RECORDED = "2.14"
# waits and launches, at most: of a training step
STEPS: dict[str, tuple[int, int]] = {
    "tokenizer": (1, 1075),
    "tokenizer, adversary": (1, 1404),
    "tokenizer, codebook per grain": (1, 1134),
    "tokenizer, three grains by gains": (1, 1639),
    "tokenizer, elastic, by errors": (1, 1216),
    "tokenizer, quantiles of each image": (1, 1325),
    "tokenizer, gates": (1, 1230),
    "tokenizer, variance": (1, 1045),
    "tokenizer, random": (1, 1094),
    "tokenizer, middle": (1, 1030),
    "tokenizer, FSQ": (1, 1068),
    "tokenizer, LFQ": (1, 1086),
    "tokenizer, SimVQ": (1, 1040),
    "tokenizer, cosine": (1, 1099),
    "tokenizer, fixed length": (0, 902),
    "MaskGIT's tokenizer": (0, 706),
    "Open-MAGVIT2's tokenizer": (0, 860),
    "DGiT-AR": (0, 574),
    "DGiT-AR, modern": (0, 713),
    "DGiT-AR, codebook per grain": (0, 581),
    "DGiT-AR, positions modelled": (0, 607),
    "DGiT-AR, map given": (0, 496),
    "DGiT-AR, windows": (0, 572),
    "raster order": (0, 460),
    "no classes": (0, 535),
    "DGiT-NAR": (0, 695),
    "DGiT-NAR, modern": (0, 834),
    "MaskGIT": (0, 442),
}
# of drawing four samples
DRAWS: dict[str, tuple[int, int]] = {
    "DGiT-AR": (20, 6913),
    "DGiT-AR, guided and truncated": (20, 8897),
    "DGiT-AR, modern": (21, 8071),
    "DGiT-AR, map given": (17, 4961),
    "raster order": (5, 4976),
    "DGiT-NAR": (18, 1123),
    "DGiT-NAR, guided": (19, 1322),
    "MaskGIT": (14, 759),
}
# of coding four images and decoding them
CODES: dict[str, tuple[int, int]] = {
    "entropy": (3, 246),
    "gains": (3, 597),
    "gates": (3, 207),
    "quality": (25, 1809),
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
def test_a_training_step(kind):
    hold(step(TRAININGS[kind]), *STEPS[kind])


@pytest.mark.slow
def test_a_training_step_with_lpips(tmp_path):
    distance = LPIPSDistance(weights=str(write_vgg16(tmp_path / "vgg16.pth")))
    distance.load()
    seen = step(partial(TRAININGS["tokenizer, adversary"], perceptual=distance))
    assert not seen.mixes
    assert total(seen.waits) <= 1, seen.waits.most_common()


@pytest.mark.parametrize(("kind", "waits"), [("tokenizer, adversary", 2), ("DGiT-AR", 0), ("DGiT-NAR", 0)])
def test_each_micro_batch_waits_as_often_as_one_alone(kind, waits):
    seen = step(TRAININGS[kind], gradient_accumulation=2)
    assert not seen.mixes
    assert total(seen.waits) <= waits, seen.waits.most_common()


def test_codes_of_the_host_are_counted_there():
    codes = CodeBatch(random_codes(LAYOUTS[4], random_grains(LAYOUTS[4], 4)), torch.arange(4))
    with device() as seen:
        codes.codes.layout.slots(CUDA)
        seen.clear()
        pinned = codes.pin_memory().to("cuda")
        assert (pinned.codes.counts, total(seen.waits)) == (codes.codes.counts, 0)
        moved = codes.to("cuda")
        assert (moved.codes.counts, total(seen.waits)) == (codes.codes.counts, 3)  # three copies
        some = moved[:2]
        assert (some.codes.counts, total(seen.waits)) == (codes[:2].codes.counts, 4)


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_drawing_samples(kind):
    hold(sample(SAMPLINGS[kind][0], **SAMPLINGS[kind][1])[0], *DRAWS[kind])


@pytest.mark.parametrize("kind", CODINGS)
def test_coding_images_and_decoding_them(kind):
    hold(coding(CODINGS[kind][0], **CODINGS[kind][1]), *CODES[kind])
