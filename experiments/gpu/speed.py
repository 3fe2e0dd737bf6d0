"""How fast models of published size train and sample on a device, against what the device can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from report import Report
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from graincode.config.job import build, with_layout
from graincode.config.validate import check
from graincode.core.codes import GrainCodes
from graincode.core.layout import CodeLayout
from graincode.core.losses import weighted_sum
from graincode.core.precision import products
from graincode.core.rng import SampleRng
from graincode.data import CodeBatch, ImageBatch
from graincode.distributed.blocks import compile_blocks
from graincode.distributed.hardware import place
from graincode.training.generator_stage import TrainableGenerator
from graincode.training.stage import Step, Trainable
from graincode.training.tokenizer_stage import TrainableDiscriminator, TrainableTokenizer

KERNELS = {
    "attention": ("flash", "fmha", "sdpa"),
    "products": ("gemm", "cutlass", "xmma", "conv", "nvjet", "mm"),
    "norms": ("norm",),
    "layouts": ("nchwtonhwc", "nhwctonchw", "transpose"),
    "copies": ("copy", "cat"),
}


def ceilings(report: Report) -> None:
    """Bytes and FLOPs a second, and the time of a small launch."""
    size, side = (2**31, 8192) if report.is_gpu else (2**22, 256)
    one = torch.empty(size, dtype=torch.uint8, device=report.device)
    other = torch.empty_like(one)
    report.bandwidth = 2 * size / report.seconds(lambda: other.copy_(one), 10)
    matrix = torch.randn(side, side, device=report.device, dtype=torch.bfloat16)
    report.products = 2 * side**3 / report.seconds(lambda: matrix @ matrix, 10)
    number = torch.zeros(1, device=report.device)
    report.wait()
    began = time.perf_counter()
    for _ in range(1000):
        number.add_(1)
    launch = (time.perf_counter() - began) / 1000
    report.say("ceilings", f"{report.bandwidth / 1e12:.2f} TB/s, {report.products / 1e12:.0f} TFLOP/s in bf16, "
               f"{1e6 * launch:.1f} us a launch", bandwidth=report.bandwidth, products=report.products)  # fmt: skip


def layout_of(report: Report) -> CodeLayout:
    """256 pixels, F16/F8, 1024 entries, 1000 classes, as published; or a toy."""
    return CodeLayout((32, 32), ((8, 8), (4, 4)), 64, 10) if report.quick else CodeLayout(
        (256, 256), ((16, 16), (8, 8)), 1024, 1000
    )  # fmt: skip


def random_codes(layout: CodeLayout, count: int, fine: float) -> CodeBatch:
    """Codes of which a share of the regions is fine."""
    generator = torch.Generator().manual_seed(0)
    grains = (torch.rand(count, *layout.grids[0], generator=generator) < fine).long()
    finest = torch.randint(layout.codebook_size, (count, *layout.grids[-1]), generator=generator)
    coarse = layout.expand(layout.corners(finest, 0), 0)
    indices = torch.where(layout.expand(grains, 0) == 0, coarse, finest)
    labels = torch.arange(count) % layout.classes
    return CodeBatch(GrainCodes.checked(grains, indices, layout), labels)


def generator_of(report: Report, kind: str, *overrides: str) -> tuple[nn.Module, TrainableGenerator, CodeLayout]:
    """A generator of published size with its trainable, by its recipe."""
    toy = ["generator/size=tiny", "generator.size.width=32"] if report.quick else []
    cfg = check("train_generator", [f"experiment={kind}_imagenet", *toy, *overrides]).generator
    layout = replace(layout_of(report), **cfg.get("sequence", {}))
    torch.manual_seed(0)
    module = build(with_layout(cfg.model, layout))
    place(module, report.device)
    return module, TrainableGenerator(module, build(cfg.objective), None), layout


def tokenizer_of(report: Report) -> list[Trainable]:
    """The published tokenizer and its discriminator, without a perceptual loss, whose weights would be downloaded."""
    toy = ["tokenizer/size=tiny", "tokenizer.size.channels=8", "tokenizer.code_dim=8",
           "tokenizer.adversary.discriminator.layers=2"] if report.quick else []  # fmt: skip
    cfg = check("train_tokenizer", ["experiment=tok_imagenet_dual", "tokenizer/perceptual=none", *toy]).tokenizer
    torch.manual_seed(0)
    module = build(with_layout(cfg.model, layout_of(report)))
    adversary = build(cfg.adversary)
    for part in (module, adversary):
        place(part, report.device)
    objective = build(cfg.objective, perceptual=None)
    return [TrainableTokenizer(module, objective, adversary), TrainableDiscriminator(adversary)]


def stepper(report: Report, trainables: list[Trainable]) -> Callable[[object], torch.Tensor]:
    """A training step in bf16 with Adam, of a batch on the device; returns the loss of the first trainable."""
    optimizers = [torch.optim.Adam(one.module.parameters(), 1e-4, fused=True) for one in trainables]
    number = [0]
    for one in trainables:
        one.module.train()

    def step(batch: object) -> torch.Tensor:
        number[0] += 1
        rng, losses, output = SampleRng(0, torch.arange(len(batch), device=report.device)), [], None
        for one, optimizer in zip(trainables, optimizers, strict=True):
            with products("tf32", report.device.type):
                with torch.autocast(report.device.type, torch.bfloat16):
                    output = one.forward(one.module, batch, Step(number[0], rng), output)
                    losses.append(weighted_sum(output.terms))
                losses[-1].backward()
            torch.nn.utils.clip_grad_norm_(one.module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            one.update(one.module, [output])
        return losses[0].detach()

    return step


def flops_of(step: Callable[[object], torch.Tensor], batch: object) -> float:
    """FLOPs of a step on one image."""
    with FlopCounterMode(display=False) as counter:
        step(batch)
    return counter.get_total_flops() / len(batch)


def timed_step(
    report: Report, name: str, trainables: list[Trainable], batch: object, others: list[object], is_compiled: bool
) -> None:
    """Milliseconds of a step, images a second and share of the FLOPs; with other lengths; and its kernels."""
    step = stepper(report, trainables)
    flops = flops_of(step, batch[:2])
    report.peak()
    if is_compiled:
        for one in trainables:
            compile_blocks(one.module)
    began = time.perf_counter()
    first = float(step(batch))
    cold, seconds, peak = time.perf_counter() - began, report.seconds(lambda: step(batch)), report.peak()
    lengths = []
    for other in others:
        began = time.perf_counter()
        step(other)
        report.wait()
        lengths.append(time.perf_counter() - began)
    rate, last = len(batch) / seconds, float(step(batch))
    share = rate * flops / report.products
    slowest = f", other lengths at most {1000 * max(lengths):.0f} ms" if lengths else ""
    text = (
        f"{1000 * seconds:.1f} ms, {rate:.1f} images/s, {100 * share:.0f} % of the FLOPs, first {cold:.1f} s{slowest}"
    )
    report.say(name, f"{text}, peak {peak:.1f} GiB, loss {first:.3f} to {last:.3f}", last == last, seconds=seconds,
               images_per_second=rate, share_of_flops=share, peak_gib=peak)  # fmt: skip
    if not is_compiled:
        kernels(report, f"{name}, kernels", lambda: step(batch))


def kernels(report: Report, name: str, call: Callable[[], object]) -> None:
    """Which kernels a call runs: how many, and the share of their time by kind; on a GPU none may be cuDNN's attention
    or the plain one."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * report.is_gpu]
    with profile(activities=activities) as profiler:
        call()
        report.wait()
    on = torch.autograd.DeviceType.CUDA if report.is_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == on]
    times = {e.key: e.self_device_time_total if report.is_gpu else e.self_cpu_time_total for e in events}
    total, left = max(sum(times.values()), 1e-9), set(times)
    shares = {}
    for kind, words in KERNELS.items():
        own = {key for key in left if any(word in key.lower() for word in words)}
        shares[kind], left = sum(times[key] for key in own) / total, left - own
    ours = " ".join(event.key for event in profiler.key_averages()).lower()
    wrong = [word for word in ("cudnn_attention", "attention_math") if report.is_gpu and word in ours]
    text = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in shares.items())
    counted = sum(event.count for event in events)
    report.say(name, f"{counted} kernels, {total / 1000:.1f} ms; {text}; attention by {wrong or 'flash or efficient'}",
               not wrong, kernels=counted, **shares)  # fmt: skip


def generators(report: Report) -> None:
    """Training steps of both generators, with lengths that change, and of DGiT-AR compiled."""
    count = 2 if report.quick else 30
    for kind in ("ar", "nar"):
        for is_compiled in (False, True)[: 2 if kind == "ar" and not report.quick else 1]:
            _, trainable, layout = generator_of(report, kind)
            some = [random_codes(layout, count, fine).to(report.device) for fine in (0.5, 0.45, 0.55, 0.48)]
            name = f"step, {kind}, {'compiled' if is_compiled else 'eager'}"
            timed_step(report, name, [trainable], some[0], some[1:], is_compiled)


def tokenizers(report: Report) -> None:
    """Training steps of the published tokenizer and discriminator, eager and compiled; codes of images, and back."""
    layout, count = layout_of(report), 2 if report.quick else 16
    for is_compiled in (False, True)[: 1 if report.quick else 2]:
        trainables = tokenizer_of(report)
        module, generator = trainables[0].module, torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (count, 3, *layout.image_size), generator=generator, dtype=torch.uint8)
        pixels[..., : layout.image_size[1] // 2] //= 16
        batch = ImageBatch(pixels, torch.zeros(count).long(), torch.arange(count)).to(report.device)
        module.calibrate([batch.images])
        module.initialize([batch.images], SampleRng(0, torch.arange(count, device=report.device)))
        batch = replace(batch, pixels=batch.images)
        name = f"step, tokenizer, {'compiled' if is_compiled else 'eager'}"
        timed_step(report, name, trainables, batch, [], is_compiled)
        if is_compiled:
            continue
        module.eval()
        for precision in ("float32", "tf32", "bfloat16"):
            with products(precision, report.device.type):
                codes = module.tokenize(batch.images)
                there = count / report.seconds(partial(module.tokenize, batch.images), 3, 1)
                back = count / report.seconds(partial(module.detokenize, codes), 3, 1)
            report.say(f"codes of images in {precision}", f"{there:.1f} images/s, and back {back:.1f}",
                       images_per_second=there, decoded_per_second=back)  # fmt: skip


def decoding(report: Report) -> None:
    """Codes a second of DGiT-AR, and the share of the bandwidth that its weights, keys and values take; step by step,
    and with `compile`."""
    for block, dtype, batches in [
        ("gpt", torch.float32, (16,)),
        ("gpt", torch.bfloat16, (1, 16, 64)),
        ("modern", torch.bfloat16, (16,)),
    ]:
        module, _, layout = generator_of(report, "ar", f"generator/block={block}")
        module.eval().to(dtype)
        decode(report, f"decode, {block}, {str(dtype)[6:]}", module, layout, batches)
        if dtype is torch.bfloat16:
            module.compile_sampling()
            decode(report, f"decode, {block}, {str(dtype)[6:]}, compiled", module, layout, batches)


def decode(report: Report, name: str, module: nn.Module, layout: CodeLayout, batches: Sequence[int]) -> None:
    """Draw as many samples as a batch holds, for each batch."""
    size = module.content_head.weight.element_size()
    weights = size * sum(parameter.numel() for parameter in module.parameters())
    for batch in sorted({min(batch, 2) for batch in batches}) if report.quick else batches:
        report.peak()
        began = time.perf_counter()
        codes = module.sample(torch.arange(batch) % layout.classes, seed=1, batch_size=batch)
        report.wait()
        seconds = time.perf_counter() - began
        steps = int(codes.lengths.max()) + module.extra_tokens
        kept = batch * steps / 2 * module.bytes_of_sample(guided=False) / layout.max_tokens
        share = steps * (weights + kept) / seconds / report.bandwidth
        rate = int(codes.lengths.sum()) / seconds
        text = f"{1000 * seconds / steps:.2f} ms a step, {rate:.0f} codes/s, {100 * share:.0f} % of the bytes"
        report.say(f"{name}, batch {batch}", f"{text}, peak {report.peak():.1f} GiB", codes_per_second=rate,
                   share_of_bandwidth=share, seconds=seconds / steps)  # fmt: skip


def masked_samples(report: Report) -> None:
    """Images a second of DGiT-NAR."""
    module, _, layout = generator_of(report, "nar")
    module.eval()
    count = 2 if report.quick else 64
    for dtype in (torch.float32, torch.bfloat16):
        module.to(dtype)
        labels = torch.arange(count) % layout.classes
        seconds = report.seconds(lambda labels=labels: module.sample(labels, batch_size=count), 2, 1)
        report.say(f"masked samples, {str(dtype)[6:]}", f"{count / seconds:.1f} images/s, peak {report.peak():.1f} GiB",
                   images_per_second=count / seconds)  # fmt: skip
