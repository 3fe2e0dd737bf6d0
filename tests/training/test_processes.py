"""The laws of training on several processes; what is trained is in helpers_training.py.

One process trains all of its cases here, and two train theirs after one start of both.
"""

import json
import os
import subprocess
import sys
from functools import partialmethod

import helpers_training
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

pytestmark = pytest.mark.slow

LIMITS = {
    "gan-64-whole": 1e-10, "gan-64-parts": 1e-10, "tokenizer-64-whole": 1e-10, "tokenizer-64-parts": 1e-10,
    "feature-64-whole": 1e-10, "feature-64-parts": 1e-10, "generator-64-whole": 1e-10, "generator-64-parts": 1e-10,
    "windowed-64-whole": 1e-10, "windowed-64-parts": 1e-10, "masked-64-whole": 1e-10, "masked-64-parts": 1e-10,
    "tokenizer-32-whole": 1e-5, "generator-32-whole": 1e-5,
}  # fmt: skip
RESUMED = [("gan", 1), ("gan", 2), ("generator", 1), ("generator", 2), ("windowed", 1)]
COMPILED = [("gan", 1), ("generator", 2), ("masked", 2)]
SHARDED = ["tokenizer-64-sharded", "tokenizer-32-straight", "tokenizer-32-shardedresumed", "generator-64-sharded"]
MIXED = [f"{kind}-16-{way}" for kind in ("tokenizer", "generator") for way in ("whole", "sharded")]


def cases(world):
    resumed = [f"{kind}-32-{way}" for kind, count in RESUMED if count == world for way in ("straight", "resumed")]
    compiled = [f"{kind}-64-compiled" for kind, count in COMPILED if count == world]
    return [*LIMITS, *resumed, *compiled, *([*SHARDED, *MIXED] if world == 2 else [])]


HALF = ["gan-64-half", "generator-64-half"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All cases, by one process and by two."""
    folder = tmp_path_factory.mktemp("cases")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.Popen(
        [*launcher, helpers_training.__file__, str(folder), *cases(2), *HALF],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
        helpers_training.train_cases(folder, cases(1))
    torch.set_num_threads(threads)
    said, _ = two.communicate(timeout=300)
    assert two.returncode == 0, said[-4000:]
    return folder


def weights(folder, name, world, rank=0):
    return load_file(folder / f"{name}-{world}-{rank}.safetensors")


def distance(a, b):
    """Of all weights together, relative."""
    joined = [torch.cat([w[key].double().flatten() for key in sorted(w)]) for w in (a, b)]
    return float((joined[0] - joined[1]).norm() / joined[0].norm())


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_two_processes_train_as_one_does(trained, name, limit):
    assert distance(weights(trained, name, 1), weights(trained, name, 2)) < limit
    logs = [json.loads((trained / f"{name}-{world}.json").read_text()) for world in (1, 2)]
    assert [line["step"] for line in logs[0]] == [3, 6, 9, 10]
    for one, two in zip(*logs, strict=True):
        assert one["train/loss"] == pytest.approx(two["train/loss"], rel=limit)
        assert one["train/gradient_norm"] == pytest.approx(two["train/gradient_norm"], rel=100 * limit)


@pytest.mark.parametrize("kind", ["gan", "tokenizer", "feature", "generator", "windowed", "masked"])
def test_micro_batches_change_nothing(trained, kind):
    assert distance(weights(trained, f"{kind}-64-whole", 1), weights(trained, f"{kind}-64-parts", 1)) < 1e-10


@pytest.mark.parametrize(("kind", "world"), COMPILED)
def test_compiled_blocks_train_the_same_weights(trained, kind, world):
    whole, compiled = (weights(trained, f"{kind}-64-{way}", world) for way in ("whole", "compiled"))
    assert list(whole) == list(compiled)
    assert distance(whole, compiled) < 1e-10


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_sharded_training_is_the_same_training(trained, kind):
    assert distance(weights(trained, f"{kind}-64-whole", 1), weights(trained, f"{kind}-64-sharded", 2)) < 1e-10


@pytest.mark.parametrize(("kind", "world"), RESUMED)
def test_a_run_that_was_interrupted_ends_bit_equal(trained, kind, world):
    straight, resumed = (weights(trained, f"{kind}-32-{way}", world) for way in ("straight", "resumed"))
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    first, second = ((trained / f"{kind}-32-{way}-{world}.json").read_text() for way in ("straight", "resumed"))
    values = [[line["train/loss"] for line in json.loads(text)] for text in (first, second)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.when(
    "a run goes on with another number of processes", "what it logs of the interval in between is the mean of its steps"
)
@pytest.mark.parametrize("name", HALF)
def test_a_run_that_goes_on_in_one_process_logs_what_one_logs(trained, name):
    threads = torch.get_num_threads()
    found = helpers_training.go_on(trained, name, 2)
    torch.set_num_threads(threads)
    whole = json.loads((trained / f"{name.replace('half', 'whole')}-1.json").read_text())
    assert [line["step"] for line in found] == [line["step"] for line in whole] == [3, 6, 9, 10]
    for one, other in zip(found, whole, strict=True):
        for key in one.keys() - {key for key in one if key.startswith("speed/")}:
            assert one[key] == pytest.approx(other[key], rel=1e-7), key


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_sharded_training_in_bf16_is_near_that_of_whole_models(trained, kind):
    whole, sharded = (json.loads((trained / f"{kind}-16-{way}-2.json").read_text()) for way in ("whole", "sharded"))
    for one, other in zip(whole, sharded, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=0.01)


def test_a_sharded_run_that_was_interrupted_goes_on(trained):
    whole, resumed = (weights(trained, f"tokenizer-32-{way}", 2) for way in ("straight", "shardedresumed"))
    assert distance(whole, resumed) < 1e-3  # Adam in float32


@pytest.mark.parametrize("name", cases(2))
def test_all_processes_hold_the_same_bits(trained, name):
    first, second = (weights(trained, name, 2, rank) for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
