"""The laws of training on several processes; what is trained is in cases.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BATCH, LAYOUT, STEPS, Codes, generator_stage, images, tokenizer_stage
from safetensors.torch import load_file

from graincode.config.job import build
from graincode.config.validate import check
from graincode.core.layout import CodeLayout
from graincode.core.losses import weighted_sum
from graincode.core.rng import SampleRng
from graincode.data.loader import Schedule
from graincode.distributed import collectives
from graincode.distributed.blocks import CheckpointedBlock
from graincode.distributed.hardware import Hardware
from graincode.evaluation.streams import evaluation_batch
from graincode.generator import AutoregressiveObjective
from graincode.training.ema import AveragedWeights
from graincode.training.monitors import _fingerprint
from graincode.training.stage import Step

COMMON = [
    "gan-64-whole", "gan-64-parts", "gan-32-straight", "gan-32-resumed", "tokenizer-32-whole", "tokenizer-64-whole",
    "tokenizer-64-parts", "feature-64-whole", "feature-64-parts",
    "generator-64-whole", "generator-64-parts", "generator-32-whole", "generator-32-straight", "generator-32-resumed",
    "windowed-64-whole", "windowed-64-parts", "windowed-32-straight", "windowed-32-resumed",
    "masked-64-whole", "masked-64-parts", "gan-64-compiled", "generator-64-compiled", "masked-64-compiled",
]  # fmt: skip
SHARDED = ["tokenizer-64-sharded", "tokenizer-32-straight", "tokenizer-32-shardedresumed", "generator-64-sharded"]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DISAGREE = """
import sys
import torch.distributed as dist
from graincode import processes
from graincode.core.errors import GraincodeError

dist.init_process_group("gloo")
collectives.check_agreement("their count", dist.get_world_size())
assert collectives.count() == 2
try:
    collectives.check_agreement("their rank", dist.get_rank())
except GraincodeError as error:
    sys.exit("the 2 processes differ in their rank" not in str(error) or dist.is_initialized())
sys.exit(2)
"""


def test_processes_that_disagree_leave_together(tmp_path):
    """One that ended while another still shared something with it could abort that."""
    (tmp_path / "disagree.py").write_text(DISAGREE)
    done = subprocess.run([*TORCHRUN, str(tmp_path / "disagree.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All cases, by one process and by two."""
    folder = tmp_path_factory.mktemp("cases")
    script = str(Path(__file__).parent / "cases.py")
    common = [script, str(folder), *COMMON]
    for command in ([sys.executable, *common], [*TORCHRUN, *common, *SHARDED]):
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


def weights(folder, name, world, rank=0):
    return load_file(folder / f"{name}-{world}-{rank}.safetensors")


def distance(a, b):
    """Of all weights together, relative."""
    joined = [torch.cat([w[key].double().flatten() for key in sorted(w)]) for w in (a, b)]
    return float((joined[0] - joined[1]).norm() / joined[0].norm())


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("gan-64-whole", 1e-10), ("gan-64-parts", 1e-10), ("generator-64-whole", 1e-10), ("generator-64-parts", 1e-10),
        ("tokenizer-64-whole", 1e-10), ("tokenizer-64-parts", 1e-10), ("feature-64-whole", 1e-10),
        ("feature-64-parts", 1e-10), ("windowed-64-whole", 1e-10), ("windowed-64-parts", 1e-10),
        ("masked-64-whole", 1e-10), ("masked-64-parts", 1e-10),
        ("tokenizer-32-whole", 1e-5), ("generator-32-whole", 1e-5),
    ],
)  # fmt: skip
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


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["gan", "generator", "masked"])
def test_compiled_blocks_train_the_same_weights(trained, kind, world):
    whole, compiled = (weights(trained, f"{kind}-64-{way}", world) for way in ("whole", "compiled"))
    assert list(whole) == list(compiled)
    assert distance(whole, compiled) < 1e-10


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_sharded_training_is_the_same_training(trained, kind):
    assert distance(weights(trained, f"{kind}-64-whole", 1), weights(trained, f"{kind}-64-sharded", 2)) < 1e-10


@pytest.mark.parametrize("kind", ["gan", "generator", "windowed"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_was_interrupted_ends_bit_equal(trained, kind, world):
    straight, resumed = (weights(trained, f"{kind}-32-{way}", world) for way in ("straight", "resumed"))
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    first, second = ((trained / f"{kind}-32-{way}-{world}.json").read_text() for way in ("straight", "resumed"))
    values = [[line["train/loss"] for line in json.loads(text)] for text in (first, second)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_a_sharded_run_that_was_interrupted_goes_on(trained):
    whole, resumed = (weights(trained, f"tokenizer-32-{way}", 2) for way in ("straight", "shardedresumed"))
    assert distance(whole, resumed) < 1e-3  # Adam in float32


def test_fingerprints_see_every_bit_and_its_place():
    rows = torch.randn(6, 3)
    assert _fingerprint(rows) == _fingerprint(rows.clone())
    assert _fingerprint(rows[[1, 0, 2, 3, 4, 5]]) != _fingerprint(rows)
    assert _fingerprint(rows.nextafter(rows + 1)) != _fingerprint(rows)
    for kind in (torch.bool, torch.bfloat16, torch.float64):
        assert _fingerprint(rows.to(kind)).dtype == torch.int64


@pytest.mark.parametrize("name", COMMON + SHARDED)
def test_all_processes_hold_the_same_bits(trained, name):
    first, second = (weights(trained, name, 2, rank) for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_cases_have_a_process_whose_whole_batch_is_coarse():
    stage, start = tokenizer_stage(False, "gan")
    start()
    grains = stage.trainables[0].module.route(images(False)[range(24)].images).grains.flatten(1)
    codes = Codes().codes.grains.flatten(1)
    for coarse, windows in (
        ((grains == 0).all(dim=1), None),
        ((codes == 0).all(dim=1), generator_stage(False, 1).windows),
    ):
        found = [
            bool(coarse[schedule.indices(schedule.places(step, part))].all())
            for schedule in [Schedule(24, BATCH, 5, rank, 2, 2, windows) for rank in (0, 1)]
            for step in range(1, STEPS + 1)
            for part in (0, 1)
        ]
        assert any(found)
        assert not all(found)


def test_counts_are_known_before_the_model_runs():
    stage, start = tokenizer_stage(False, "gan")
    start()
    batch, step = stage.dataset[range(6)], Step(9, SampleRng(0, torch.arange(6)))
    output = None
    for trainable in stage.trainables:
        output = trainable.forward(trainable.module, batch, step, output)
        assert trainable.counts(batch) is None
        assert {float(term.count) for term in output.terms.values() if not term.is_reported_only} == {6.0}
    batch, module = Codes()[range(9)], generator_stage(False, 1).trainables[0].module
    for objective in (AutoregressiveObjective(), AutoregressiveObjective(1.0)):
        terms, counts = objective(module(batch.codes, batch.labels)), objective.counts(batch.codes, module)
        assert set(counts) == {"content", "position_0"}
        assert {name: int(terms[name].count) for name in counts} == {name: int(n) for name, n in counts.items()}
    assert LAYOUT.num_grains == 2


def test_batches_by_length_weigh_every_code_alike():
    """The losses of all batches of a window add up to the loss of its images as one batch."""
    stage = generator_stage(True, 3)
    trainable, step = stage.trainables[0], Step(1, SampleRng(0, torch.arange(8)))
    trainable.module.conditioning.dropout = 0.0
    schedule = Schedule(24, 8, 5, windows=stage.windows)
    batches = [stage.dataset[schedule.indices(schedule.places(s, 0))] for s in (1, 2, 3)]
    assert len({int(batch.codes.lengths.sum()) for batch in batches}) == 3
    parts = [weighted_sum(trainable.forward(trainable.module, batch, step, None).terms) for batch in batches]
    assert [trainable.counts(batch) == trainable.counts(batches[0]) for batch in batches] == [True] * 3
    plain = generator_stage(True, 1).trainables[0]
    plain.module = trainable.module
    whole = weighted_sum(
        plain.forward(plain.module, stage.dataset[range(24)], Step(1, SampleRng(0, torch.arange(24))), None).terms
    )
    assert float(sum(parts).detach() / 3) == pytest.approx(float(whole.detach()), rel=1e-12)


def test_validation_masks_are_those_of_the_image_s_place(monkeypatch):
    stage = generator_stage(True, 1, masked=True)
    del stage.evaluate  # what cases.py puts in its place
    module = stage.trainables[0].module.eval().requires_grad_(False)
    found = [stage.evaluate(module, 20).metrics]
    torch.manual_seed(1)
    found.append(stage.evaluate(module, 20).metrics)
    monkeypatch.setattr("graincode.training.generator_stage.evaluation_batch", lambda layout: 7)
    found.append(stage.evaluate(module, 20).metrics)
    assert found[1] == found[0] == pytest.approx(found[2], rel=1e-10)
    assert found[0]["objective"] == pytest.approx(found[0]["content"] + found[0]["grains"])


def test_fewer_images_are_evaluated_together_where_they_are_large():
    small, large, long = (
        CodeLayout(size, grains, 8, 2)
        for size, grains in (((32, 32), ((8, 8), (4, 4))), ((256, 256), ((16, 16),)), ((64, 64), ((4, 4), (1, 1))))
    )
    assert [evaluation_batch(layout) for layout in (small, large, long)] == [250, 32, 7]


def test_one_process_alone_needs_no_others():
    rows = torch.arange(3)
    assert collectives.gather_rows(rows) is rows
    assert collectives.sum_(rows) is rows
    assert collectives.on_main(lambda: 5) == 5
    assert list(collectives.share(7)) == list(range(7))
    with pytest.raises(ZeroDivisionError):
        collectives.on_main(lambda: 1 / 0)


def test_a_wrapped_module_is_left_without_autocast():
    machine = Hardware(mixed_precision="bf16").machine()
    module = torch.nn.Linear(4, 4)
    wrapped, _ = machine.prepare(module, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    assert module(torch.zeros(1, 4)).dtype == torch.float32
    with machine.accelerator.autocast():
        assert wrapped(torch.zeros(1, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_averaged_weights_are_used_within_a_context_and_training_is_untouched(decay):
    machine, trained = Hardware().machine(), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    trained.register_buffer("table", torch.zeros(3))
    average = AveragedWeights(trained, decay, machine)
    expected = trained[0].weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            trained[0].weight += torch.randn(2, 2)
            trained.table += 1
        warm = 0.0 if step <= 1 else min(1 - step ** (-2 / 3), decay)
        expected = torch.lerp(expected, trained[0].weight.detach(), 1 - warm)
        average.update(trained, step)
    kept = trained[0].weight.detach().clone()
    with pytest.raises(RuntimeError), average.in_use(trained) as module:
        assert not module.training
        assert not torch.is_grad_enabled()
        torch.testing.assert_close(module[0].weight, expected if decay else kept)
        assert torch.equal(module.table, torch.full((3,), 29.0))  # buffers are copied
        raise RuntimeError
    assert trained.training
    assert torch.equal(trained[0].weight, kept)


def test_blocks_are_compiled_if_it_is_asked_for():
    for compiled in (False, True):
        stage, _ = tokenizer_stage(False, "gan")
        Hardware(compile=compiled).machine().prepare(
            stage.trainables[0].module, lambda m: torch.optim.SGD(m.parameters())
        )
        blocks = [part for part in stage.trainables[0].module.modules() if isinstance(part, CheckpointedBlock)]
        assert blocks
        assert all((part._compiled_call_impl is not None) == compiled for part in blocks)


def test_recomputing_activations_keeps_fewer_of_them():
    stage, start = tokenizer_stage(False, "gan")
    start()
    module, images_ = stage.trainables[0].module, stage.dataset[range(4)].images
    kept = []
    for recompute in (False, True):
        for part in module.modules():
            if isinstance(part, CheckpointedBlock):
                part.recompute = recompute
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            module(images_).images.sum()
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_slurm_configuration_reads_slurm_s_environment(kind, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    monkeypatch.setenv("SLURM_NODEID", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[07-09]")
    tool = tmp_path / "scontrol"
    tool.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-09]" ] && printf "gpu07\\ngpu08\\ngpu09\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cfg = check("train_tokenizer", ["hardware=slurm", f"hardware.strategy={kind}", "hardware.num_processes=8"])
    hardware = build(cfg.hardware)
    assert (hardware.num_nodes, hardware.node_rank, hardware.address()) == (3, 2, "gpu07")
    assert hardware.strategy == kind


@pytest.mark.parametrize("name", ["cpu", "gpu", "multi_gpu", "fsdp", "slurm"])
def test_hardware_configurations_compose(name):
    hardware = build(check("train_generator", [f"hardware={name}"]).hardware)
    assert hardware.strategy == ("fsdp" if name == "fsdp" else "ddp")
    assert (hardware.num_processes is None) == (name in ("multi_gpu", "fsdp", "slurm"))
