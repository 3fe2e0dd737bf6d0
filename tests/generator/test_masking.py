import pytest
import torch
from strategies import LAYOUTS, random_codes, random_grains

from graincode.core.errors import GraincodeError
from graincode.core.rng import SampleRng
from graincode.core.sequences import to_sequences
from graincode.generator import (
    InformationMasking,
)


def test_masks_follow_beta_and_the_image_s_own_numbers():
    layout = LAYOUTS[2]
    codes = random_codes(layout, random_grains(layout, 400))[2:]
    tokens, rng = to_sequences(codes, ends=False), SampleRng(3, torch.arange(398))
    fine = (layout.slots().grain[tokens.slots.clamp(max=layout.num_slots - 1)] == 1) & tokens.is_code
    share, counts = {}, {}
    for beta in (-2.0, 0.0, 2.0):
        masked = InformationMasking(beta=beta).codes(tokens.is_code, fine.double(), rng)
        assert not (masked & ~tokens.is_code).any()
        seen = tokens.is_code & ~masked
        share[beta], counts[beta] = float((seen & fine).sum() / seen.sum()), masked.sum(dim=1)
        part = InformationMasking(beta=beta).codes(
            tokens.is_code[5:6, : codes.lengths[5]],
            fine.double()[5:6, : codes.lengths[5]],
            SampleRng(3, torch.tensor([5])),
        )
        assert torch.equal(part[0], masked[5, : codes.lengths[5]])
    overall = float(fine.sum() / tokens.is_code.sum())
    assert share[-2.0] < share[0.0] - 0.03 < share[2.0] - 0.06
    assert share[0.0] == pytest.approx(overall, abs=0.02)
    assert torch.equal(counts[0.0], counts[2.0])
    expected = InformationMasking().expected(codes.lengths, layout.max_tokens)
    assert float(counts[0.0].double().mean()) == pytest.approx(float(expected.mean()), rel=0.04)
    elastic = InformationMasking(beta=8.0, elastic=True).codes(tokens.is_code, fine.double(), rng)
    seen = tokens.is_code & ~elastic
    each = (seen & fine).sum(dim=1) / seen.sum(dim=1).clamp(min=1) - fine.sum(dim=1) / codes.lengths
    some = (seen.sum(dim=1) > 8) & (seen.sum(dim=1) < 30)
    assert float(each[some].max()) > 0.25
    assert float(each[some].min()) < -0.25
    with pytest.raises(GraincodeError, match=r"^beta=0\.0: expected"):
        InformationMasking(elastic=True)
    with pytest.raises(GraincodeError, match=r"^schedule=sine: expected one of cosine, linear, arccos"):
        InformationMasking(schedule="sine")


def test_masks_of_codes_and_of_regions_are_independent():
    every, rng = torch.ones(4000, 16, dtype=torch.long), SampleRng(3, torch.arange(4000))
    codes = InformationMasking().codes(every.bool(), torch.zeros(every.shape, dtype=torch.float64), rng).double()
    regions = InformationMasking().regions(every, rng).double()
    counts = torch.stack([codes.sum(dim=1), regions.sum(dim=1)])
    assert abs(float(torch.corrcoef(counts)[0, 1])) < 0.06
    assert float((codes * regions).mean()) == pytest.approx(float(codes.mean() * regions.mean()), abs=0.01)
