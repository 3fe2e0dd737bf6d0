"""How many images are worked on at once."""

import logging

import pytest
import torch
from helpers_generators import make_ar, make_nar
from helpers_tokenizer import DUAL, make, photographs, start
from strategies import LAYOUTS

from graincode.data import TensorImages
from graincode.distributed import memory
from graincode.distributed.memory import fitting, peak_bytes
from graincode.evaluation.samples import SampleStream
from graincode.evaluation.streams import ReconstructionStream
from graincode.sampling import AutoSampler


def test_what_a_call_makes_is_counted_until_it_is_freed():
    given = torch.zeros(1000)

    def call():
        one = given + 1  # 4,000 bytes
        one.mul_(2).view(10, 100)[0].t()
        two = one.double()  # 8,000 bytes more: the peak
        one = None
        three = two[:250] + 1  # 2,000 bytes, when 4,000 are free again
        return three

    assert peak_bytes(call) == 12_000
    assert peak_bytes(lambda: given.view(10, 100).t()) == 0


def test_a_decode_takes_memory_in_proportion_to_its_images():
    tokenizer = make(DUAL)
    start(tokenizer, photographs(8))
    tokenizer.eval()
    one, four = (peak_bytes(lambda n=n: tokenizer.detokenize(tokenizer.tokenize(photographs(n)))) for n in (1, 4))
    largest = 8 * 16 * 16 * 4  # channels x cells of the finest level x bytes
    assert 3 * largest < one < 30 * largest
    assert 3 < four / one < 4.1


@pytest.mark.when(
    "a batch of images that are sampled, extracted or evaluated does not fit into the memory",
    "fewer are worked on at once, and a line says so; results stay",
)
def test_a_batch_is_as_large_as_the_memory_allows(monkeypatch, caplog):
    monkeypatch.setattr(memory, "memory_of", lambda device: 1000)
    device = torch.device("cpu")
    with caplog.at_level(logging.WARNING):
        assert fitting(250, 2, device) == 250
    assert not caplog.messages
    assert fitting(250, 10, device) == 60
    assert "batch_size=250: 60 at once" in caplog.messages[-1]
    assert fitting(250, 10**6, device) == 1
    monkeypatch.setattr(memory, "memory_of", lambda device: 0)  # unknown
    assert fitting(250, 10**6, device) == 250


def test_the_memory_of_this_machine_is_known_and_shared_by_its_processes(monkeypatch, tmp_path):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(memory, "_LIMIT", tmp_path / "memory.max")
    alone = memory.memory_of(torch.device("cpu"))
    assert alone > 2**28
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.memory_of(torch.device("cpu")) == alone // 4
    for text, expected in ("max\n", alone // 4), (f"{alone // 2}\n", alone // 8):  # of a container
        (tmp_path / "memory.max").write_text(text)
        assert memory.memory_of(torch.device("cpu")) == expected


def test_a_smaller_batch_changes_no_reconstruction(monkeypatch):
    tokenizer = make(DUAL)
    start(tokenizer, photographs(8))
    pixels = ((photographs(10) + 1) * 127.5).round().to(torch.uint8)
    found = []
    for bytes_there in (0, 10**6):
        monkeypatch.setattr(memory, "memory_of", lambda device, there=bytes_there: there)
        stream = ReconstructionStream(
            tokenizer.eval(), TensorImages("made", "test", pixels, torch.zeros(10).long()), 10
        )
        found.append((stream.batch_size, torch.cat(list(stream)), stream.metrics()["codes_per_image"].value))
    assert found[0][0] == 10 > found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def test_a_sample_s_memory_is_that_of_its_keys_and_values_and_a_pass():
    model = make_ar(LAYOUTS[2])
    tokens, width = LAYOUTS[2].max_tokens, model.content_head.weight.shape[1]
    layers = sum(len(stack.blocks) for stack in model.stacks)
    kept = sum(t.numel() * t.element_size() for cache in model.caches(1) for pair in cache.layers for t in pair)
    assert kept == 2 * layers * tokens * width * 4
    assert kept < model.bytes_of_sample(False) < 1.2 * kept
    assert model.bytes_of_sample(True) == 2 * model.bytes_of_sample(False)
    assert kept / 2 < model.bfloat16().bytes_of_sample(False) < 0.7 * kept


@pytest.mark.parametrize("make_model", [make_ar, make_nar])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_what_samples_take_is_about_what_is_counted_for_them(make_model, scale):
    model, labels = make_model(LAYOUTS[2], dtype=torch.float32), torch.arange(8) % 10
    model.sample(labels[:1], batch_size=1)  # tables that are kept
    taken = peak_bytes(lambda: model.sample(labels, batch_size=8, guidance_scale=scale))
    assert taken / 1.2 < 8 * model.bytes_of_sample(scale != 1) < 6 * taken


def test_fewer_samples_at_once_are_the_same_samples(monkeypatch):
    layout, labels = LAYOUTS[2], torch.arange(7) % 10
    generator, tokenizer = make_ar(layout, dtype=torch.float64), make(layout)
    start(tokenizer, photographs(8))
    found = []
    for there in (0, 10**6):
        monkeypatch.setattr(memory, "memory_of", lambda device, there=there: there)
        sampler = generator.resolve(AutoSampler())
        stream = SampleStream(generator, tokenizer.eval(), sampler, labels, seed=3, batch_size=5)
        found.append((stream.batch_size, stream.gathered()[1]))
    assert found[0][0] == 5 > found[1][0]
    assert torch.equal(found[0][1].grains, found[1][1].grains)
    assert torch.equal(found[0][1].indices, found[1][1].indices)
