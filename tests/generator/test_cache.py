import copy

import torch
from helpers_generators import WIDTH

from graincode.generator import (
    Transformer,
)
from graincode.generator.transformer import KeyValueCache


def test_a_cache_goes_on_with_some_sequences_in_the_memory_that_it_has():
    cache = KeyValueCache(Transformer(WIDTH, 3, 4), batch=6, capacity=9)
    for layer in cache.layers:
        for store in layer:
            store.normal_()
    before, rows = copy.deepcopy(cache.layers), torch.tensor([1, 2, 5])
    memory = [store.data_ptr() for layer in cache.layers for store in layer]
    cache.length = 4
    cache.keep(rows)
    assert [store.data_ptr() for layer in cache.layers for store in layer] == memory
    for layer, old in zip(cache.layers, before, strict=True):
        for store, whole in zip(layer, old, strict=True):
            assert torch.equal(store[:, :, :4], whole[rows, :, :4])
