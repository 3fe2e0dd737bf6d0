"""Hardware configurations, and modules on them."""

import os
from functools import partialmethod
from types import SimpleNamespace

import pytest
import torch
from helpers_training import tokenizer_stage

from graincode.config.job import build
from graincode.config.validate import check
from graincode.core.errors import GraincodeError
from graincode.distributed import hardware
from graincode.distributed.blocks import CheckpointedBlock
from graincode.distributed.hardware import Hardware
from graincode.generator import Transformer
from graincode.tokenizer import Adversary, PatchDiscriminator


def test_a_wrapped_module_is_left_without_autocast():
    machine = Hardware(mixed_precision="bf16").machine()
    module = torch.nn.Linear(4, 4)
    wrapped, _ = machine.prepare(module, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    assert module(torch.zeros(1, 4)).dtype == torch.float32
    with machine.accelerator.autocast():
        assert wrapped(torch.zeros(1, 4)).dtype == torch.bfloat16


def test_blocks_are_compiled_if_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    for compiled in (False, True):
        module = tokenizer_stage(False, "gan")[0].trainables[0].module
        with torch._dynamo.config.patch(optimize_ddp=True):
            Hardware(compile=compiled).machine().prepare(module, lambda m: torch.optim.SGD(m.parameters()))
            assert torch._dynamo.config.optimize_ddp != compiled
        blocks = [part for part in module.modules() if isinstance(part, CheckpointedBlock)]
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
    made = build(cfg.hardware)
    assert (made.num_nodes, made.node_rank, made.address()) == (3, 2, "gpu07")
    assert made.strategy == kind


@pytest.mark.parametrize("name", ["cpu", "gpu", "multi_gpu", "fsdp", "slurm"])
def test_hardware_configurations_compose(name):
    made = build(check("train_generator", [f"hardware={name}"]).hardware)
    assert made.strategy == ("fsdp" if name == "fsdp" else "ddp")
    assert (made.num_processes is None) == (name in ("multi_gpu", "fsdp", "slurm"))
    assert made.compile == (name != "cpu")


def test_tf32_is_used_around_micro_batches_and_nowhere_else():
    machine = Hardware(tf32=True).machine()
    module = torch.nn.Linear(4, 4)
    found = []
    for device in ("cpu", "cuda"):
        machine.device = torch.device(device)
        with machine.micro_batch(module, last=True):
            found.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    assert found == [("highest", False), ("high", True)]


def test_attention_by_cudnn_which_plans_for_each_length_is_off():
    torch.backends.cuda.enable_cudnn_sdp(True)
    Hardware().machine()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.when("hardware.compile is on where torch.compile cannot work", "one line says so, before the first step")
def test_a_compiler_that_is_missing_is_found_before_training(monkeypatch):
    def fail(graph, inputs):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=fail))
    stage, _ = tokenizer_stage(False, "gan")
    with pytest.raises(GraincodeError, match=r"^compile=true: expected false, as .*Failed to find C compiler"):
        Hardware(compile=True).machine().prepare(stage.trainables[0].module, torch.optim.SGD)
    assert not any(getattr(part, "_compiled_call_impl", None) for part in stage.trainables[0].module.modules())


@pytest.mark.parametrize(("mixed", "dtypes"), [("no", (None, None)), ("bf16", (torch.bfloat16, torch.float32))])
def test_sharded_blocks_are_gathered_in_the_precision_that_they_compute_in(mixed, dtypes, monkeypatch):
    policies = {}
    monkeypatch.setattr(hardware, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(hardware, "fully_shard", lambda part, mesh, **more: policies.update({part: more}))
    module = tokenizer_stage(False, "gan")[0].trainables[0].module
    Hardware(strategy="fsdp", mixed_precision=mixed).machine().shard(module)
    blocks = [part for part in module.modules() if isinstance(part, CheckpointedBlock)]
    assert policies.keys() == {*blocks, module}
    assert policies[module] == {}  # heads, embeddings and last norms stay in float32
    for part in blocks:
        policy = policies[part]["mp_policy"]
        assert (policy.param_dtype, policy.reduce_dtype) == dtypes


@pytest.mark.parametrize("block", [{}, {"norm": "rms", "mlp": "swiglu", "qk_norm": True, "adaln": True}])
def test_blocks_whose_weights_are_in_bf16_compute_what_autocast_makes_of_others(block):
    torch.manual_seed(0)
    stack = Transformer(32, 2, 4, **block)
    for parameter in stack.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(2, 7, 32)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for part in stack.blocks:  # as sharding has it
            part.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(stack(x, modulations=stack.modulations(x[:, 0])))
    assert {one.dtype for one in found} == {torch.float32}
    torch.testing.assert_close(*found, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_convolutions_have_the_order_of_fast_kernels_on_a_gpu(device, monkeypatch):
    to = torch.nn.Module.to

    def without_gpu(module, device, memory_format):
        return to(module, memory_format=memory_format)

    monkeypatch.setattr(torch.nn.Module, "to", without_gpu)
    adversary, images = Adversary(PatchDiscriminator(8, 2), start_step=0), torch.randn(2, 3, 32, 32)
    expected = adversary(images)
    hardware.place(adversary, torch.device(device))
    kernels = [part.weight for part in adversary.modules() if isinstance(part, torch.nn.Conv2d)]
    assert all(kernel.is_contiguous() for kernel in kernels) == (device == "cpu")
    several = [kernel for kernel in kernels if kernel.shape[0] > 1]
    assert all(k.is_contiguous(memory_format=torch.channels_last) for k in several) == (device == "cuda")
    torch.testing.assert_close(adversary(images), expected)


def test_a_gpu_is_in_use_from_the_start_so_that_loaders_pin(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: calls.append("init"))
    monkeypatch.setattr(hardware, "Accelerator", lambda cpu, **_: SimpleNamespace(device=torch.device("cuda")))
    assert Hardware(device="gpu").machine().device.type == "cuda"
    assert calls == ["init"]
    monkeypatch.undo()
    Hardware().machine()
    assert not torch.cuda.is_initialized()
