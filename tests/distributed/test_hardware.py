"""Hardware configurations, and modules on them."""

import os

import pytest
import torch
from helpers_training import tokenizer_stage

from graincode.config.job import build
from graincode.config.validate import check
from graincode.distributed.blocks import CheckpointedBlock
from graincode.distributed.hardware import Hardware


def test_a_wrapped_module_is_left_without_autocast():
    machine = Hardware(mixed_precision="bf16").machine()
    module = torch.nn.Linear(4, 4)
    wrapped, _ = machine.prepare(module, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    assert module(torch.zeros(1, 4)).dtype == torch.float32
    with machine.accelerator.autocast():
        assert wrapped(torch.zeros(1, 4)).dtype == torch.bfloat16


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
