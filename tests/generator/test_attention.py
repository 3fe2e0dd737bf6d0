"""Which attention models ask for: flash kernels take no masks but the causal one, and heads of up to 256."""

import pytest
import torch
import torch.nn.functional as F
from helpers_generators import labels_for, make_ar, make_nar
from helpers_tokenizer import DUAL, photographs, start
from helpers_tokenizer import make as make_tokenizer
from strategies import LAYOUTS, random_codes, random_grains

ONE_GRAIN, TWO_GRAINS = LAYOUTS[1:3]


@pytest.fixture
def asked(monkeypatch):
    """(has a mask, is causal) of each attention."""
    found, attend = [], F.scaled_dot_product_attention

    def noted(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        assert q.shape[-1] <= 256
        found.append((attn_mask is not None, is_causal))
        return attend(q, k, v, attn_mask, dropout_p, is_causal, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    return found


def trained_on(make, layout):
    codes = random_codes(layout, random_grains(layout, 4))
    make(layout, dtype=torch.float32)(codes, labels_for(layout, 4))


@pytest.mark.parametrize("layout", [ONE_GRAIN, TWO_GRAINS])
def test_an_autoregressive_pass_is_causal_without_a_mask(layout, asked):
    trained_on(make_ar, layout)
    assert asked == [(False, True)] * 3


def test_a_masked_pass_has_a_mask_for_what_is_behind_the_end_of_an_image_alone(asked):
    trained_on(make_nar, ONE_GRAIN)
    assert asked == [(False, False)] * 2
    asked.clear()
    trained_on(make_nar, TWO_GRAINS)
    assert sorted(asked) == [(False, False)] * 2 + [(True, False)] * 2  # regions, and codes


def test_a_tokenizer_s_attention_has_no_mask(asked):
    tokenizer = make_tokenizer(DUAL)
    start(tokenizer, photographs(4))
    asked.clear()
    tokenizer.eval().detokenize(tokenizer.tokenize(photographs(2)))
    assert set(asked) == {(False, False)}
