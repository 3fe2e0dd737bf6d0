import pytest
import torch
from helpers_generators import MODERN, WIDTH
from hypothesis import given, settings
from hypothesis import strategies as st

from graincode.generator import Transformer
from graincode.generator.transformer import KeyValueCache, Rotary


def step(transformer, cache, tokens, rotation=None):
    """Add one token, (batch, 1, width), to every row."""
    cache.reach()
    return transformer(tokens, cache, rotation)


@pytest.mark.parametrize("block", [{}, {**MODERN, "adaln": False}], ids=["plain", "modern"])
@pytest.mark.parametrize("lengths", [(), (4, 8, 16)], ids=str)
@settings(max_examples=15, deadline=None)
@given(restarts=st.lists(st.sets(st.integers(0, 3), max_size=4), min_size=1, max_size=14), seed=st.integers(0, 99))
def test_rows_that_begin_anew_at_any_step_are_sequences_of_their_own(block, lengths, restarts, seed):
    """Each row's states are those of its own tokens alone, whenever it and the others began."""
    torch.manual_seed(seed)
    transformer = Transformer(WIDTH, 2, 4, **block).double().eval().requires_grad_(False)
    rotary = Rotary(torch.randn(9, 2), WIDTH // 4).double() if transformer.rotary else None
    cache = KeyValueCache(transformer, batch=4, capacity=len(restarts), lengths=lengths)
    tokens, begun, found = torch.randn(4, len(restarts), WIDTH).double(), [0] * 4, []
    places = torch.randint(0, 9, (4, len(restarts)))
    for now, rows in enumerate(restarts):
        cache.restart(torch.tensor(sorted(rows), dtype=torch.long))
        begun = [now if row in rows else began for row, began in enumerate(begun)]
        rotation = rotary(places[:, now : now + 1]) if rotary else None
        found.append(step(transformer, cache, tokens[:, now : now + 1], rotation))
        longest = now + 1 - min(begun)
        assert cache.seen == min((length for length in lengths if length >= longest), default=longest)
    for row, began in enumerate(begun):
        own = slice(row, row + 1), slice(began, None)
        alone = transformer(tokens[own], rotation=rotary(places[own]) if rotary else None)
        together = torch.cat(found[began:], dim=1)[row : row + 1]
        torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)


def test_a_full_row_stays_at_its_last_place():
    transformer = Transformer(WIDTH, 1, 4).eval().requires_grad_(False)
    cache = KeyValueCache(transformer, batch=2, capacity=3)
    for _ in range(5):
        step(transformer, cache, torch.randn(2, 1, WIDTH))
    assert cache.positions.tolist() == [2, 2]
    cache.restart()
    step(transformer, cache, torch.randn(2, 1, WIDTH))
    assert cache.positions.tolist() == [1, 1]
    assert cache.seen == 1
