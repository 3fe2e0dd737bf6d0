"""The published sizes: counted without memory, and a training step of a narrow twin."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from graincode.config.job import build, with_layout
from graincode.config.validate import check
from graincode.core.codes import GrainCodes
from graincode.core.layout import CodeLayout
from graincode.core.losses import weighted_sum
from graincode.core.rng import SampleRng
from graincode.generator import Transformer
from graincode.jobs.dry import published_count


def unfilled(node):
    """A module whose large weights are never written, so that they take no memory."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (nn.Linear, nn.Embedding, nn.Conv2d):
            patch.setattr(kind, "reset_parameters", lambda _: None)
        patch.setattr(nn.init, "normal_", lambda weight, *_, **__: weight)
        patch.setattr(nn.init, "trunc_normal_", lambda weight, *_, **__: weight)
        return build(node)


@pytest.mark.parametrize(
    ("recipe", "settings", "parameters"),
    [
        ("tok_imagenet_dual", [], 47_833_731),
        ("tok_imagenet_dual", ["tokenizer/router=feature"], 48_098_437),
        ("tok_imagenet_triple", [], 74_010_502),
        ("tok_ffhq", [], 47_833_731),
    ],
)
def test_the_published_tokenizers_take_a_training_step(recipe, settings, parameters):
    settings = [f"experiment={recipe}", "data.root=none", *settings]
    cfg = check("train_tokenizer", settings)
    assert (cfg.trainer.ema_decay, cfg.trainer.clip_grad_norm, cfg.tokenizer.adversary.start_step) == (0, 0, 0)
    assert (cfg.augmentation.flip, cfg.augmentation.crop) == (True, 0.75)
    grains = [list(grain) for grain in cfg.tokenizer.grains]
    layout = CodeLayout((256, 256), grains, cfg.tokenizer.codebook_size, 1000, cfg.tokenizer.codebook)
    with_layout(cfg.tokenizer.model, layout)
    module = unfilled(cfg.tokenizer.model)
    assert layout.max_tokens - layout.num_ends == 1024
    assert module.quantizers[0].codebook.shape == (1024, 256)
    assert published_count(module) == parameters
    assert cfg.tokenizer.perceptual._target_.endswith("LPIPSDistance")  # whose weights are not at hand

    narrow = ["tokenizer.size.channels=16", "tokenizer.code_dim=16", "tokenizer.size.attention=[]"]
    narrow += ["tokenizer.adversary.discriminator.channels=8"]
    cfg = check("train_tokenizer", [*settings, *narrow])
    with_layout(cfg.tokenizer.model, CodeLayout((128, 128), grains, cfg.tokenizer.codebook_size, 1000, "shared"))
    module, adversary = build(cfg.tokenizer.model), build(cfg.tokenizer.adversary)
    images, rng = torch.rand(1, 3, 128, 128) * 2 - 1, SampleRng(0, torch.arange(1))
    images[..., :64] = 0.5
    module.quantizers[0].initialize(torch.randn(4096, 16))
    assert float(module.quantizers[0].codebook.abs().max()) <= 1 / 1024
    module.calibrate([images])
    optimizer, before = build(cfg.optimizer)(module.parameters()), module.quantizers[0].codebook.clone()
    made = module(images, rng=rng)
    terms = build(cfg.tokenizer.objective, perceptual=None)(images, made, module.router)
    adversary.adaptive.fill_(0.5)
    terms["adversarial"], gradients = adversary.generator_term(
        made.images, terms["l1"], module.decoder.last.weight, 20_000
    )
    weighted_sum(terms).backward()
    optimizer.step()
    module.update([made.quantized], [made.routing])
    assert all(bool(parameter.grad.isfinite().all()) for parameter in module.parameters())
    weighted_sum(adversary.discriminator_terms(adversary(torch.cat([images, made.images.detach()])))[0]).backward()
    adversary.update([gradients])
    assert 0 < float(adversary.adaptive) <= 0.75
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in adversary.parameters())
    assert not torch.equal(module.quantizers[0].codebook, before)
    assert len(set(made.routing.grains.flatten().tolist())) > 1


@pytest.mark.parametrize(("recipe", "classes"), [
    ("ar_imagenet", 1000), ("ar_ffhq", 0), ("nar_imagenet", 1000), ("nar_ffhq", 0),
])  # fmt: skip
def test_the_published_generators_take_a_training_step(recipe, classes):
    cfg = check("train_generator", [f"experiment={recipe}"])
    with_layout(cfg.generator.model, CodeLayout((256, 256), [[16, 16], [8, 8]], 1024, classes))
    module = unfilled(cfg.generator.model)
    stacks = [part for part in module.children() if isinstance(part, Transformer)]
    assert [len(stack.blocks) for stack in stacks] == [6, 18]
    assert 12 * 24 * 1024**2 < sum(p.numel() for p in module.parameters()) < 310e6

    cfg = check("train_generator", [f"experiment={recipe}", "generator.size.width=32"])
    layout = CodeLayout((64, 64), [[16, 16], [8, 8]], 1024, classes)
    with_layout(cfg.generator.model, layout)
    module = build(cfg.generator.model)
    codes = GrainCodes(torch.arange(16).view(1, 4, 4) % 2, torch.zeros(1, 8, 8, dtype=torch.long), layout)
    optimizer, before = build(cfg.optimizer)(module.parameters()), module.content_head.weight.clone()
    weighted_sum(build(cfg.generator.objective)(module(codes, torch.zeros(1, dtype=torch.long)))).backward()
    optimizer.step()
    trained = [parameter.grad for parameter in module.parameters()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in trained)
    assert not torch.equal(module.content_head.weight, before)


@pytest.mark.when(
    "a setting of a generator's size or blocks is typed",
    "every kind of generator reads it: DGiT-NAR takes position_layers for the stack of the grain map",
)
@pytest.mark.parametrize("generator", ["dgit_ar", "dgit_nar", "gpt"])
def test_every_setting_of_size_and_blocks_is_read(generator):
    cfg = check("train_generator", [f"generator={generator}", "generator.size.position_layers=3"]).generator
    raw = str(OmegaConf.to_container(cfg, resolve=False))
    settings = [f"generator.{group}.{key}" for group in ("size", "block") for key in cfg[group]]
    assert [setting for setting in settings if "${" + setting + "}" not in raw] == []
    first = cfg.model.grain_transformer if generator == "dgit_nar" else cfg.model.position_transformer
    assert first.layers == 3
