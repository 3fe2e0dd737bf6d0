"""DINOv2 and CLIP give what their authors' code gives, of files of their authors' tensors."""

import math

import pytest
import timm
import torch
from helpers_evaluation import photographs
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_clip import VisionTransformer

from graincode.networks.features import TimmFeatures
from graincode.networks.transformers import CLIPFeatures, DINOv2Features

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Small(DINOv2Features):
    """With fewer and narrower blocks."""

    model = "vit_small_patch14_dinov2.lvd142m"


def scaled(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Images as EDM2 prepares them."""
    images = F.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True) / 255
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def dinov2(weights: dict[str, Tensor], images: Tensor, heads: int) -> Tensor:
    """The normalised class token, step by step as in DINOv2's own code."""
    x = F.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=14)
    rows, width = x.shape[2], x.shape[1]
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    known = weights["pos_embed"]
    side = int(math.sqrt(known.shape[1] - 1))
    grid = known[:, 1:].reshape(1, side, side, width).permute(0, 3, 1, 2)
    factor = (rows + 0.1) / side
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    x = x + torch.cat([known[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, width)], 1)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    for block in range(12):
        name = f"blocks.{block}"
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        weight = (qkv[0] @ qkv[1].transpose(2, 3) / math.sqrt(width // heads)).softmax(3)
        x = x + linear((weight @ qkv[2]).transpose(1, 2).flatten(2), f"{name}.attn.proj") * weights[f"{name}.ls1.gamma"]
        hidden = F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        x = x + linear(hidden, f"{name}.mlp.fc2") * weights[f"{name}.ls2.gamma"]
    return norm(x, "norm")[:, 0]


@pytest.mark.slow
def test_dinov2_is_that_of_its_authors_on_images_as_edm2_prepares_them(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2")
    for name, tensor in network.named_parameters():
        large = name == "pos_embed" or "gamma" in name
        nn.init.normal_(tensor, float("norm" in name), 0.5 if large else 0.05)
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    torch.save(weights | {"mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2_vits14_pretrain.pth")
    found = Small(str(tmp_path / "dinov2_vits14_pretrain.pth"))
    images = photographs(64, 64)[:2]
    expected = dinov2(weights, scaled(images, *IMAGENET), heads=6)
    assert (found.dimension, found.classes, found.spatial) == (384, 0, 0)
    torch.testing.assert_close(found(images).pooled, expected, rtol=1e-4, atol=1e-4)
    assert expected.std(0).max() > 0.1
    as_timm = TimmFeatures(Small.model, found.weights, resizing="bicubic")(images).pooled
    assert (as_timm - expected).abs().max() > 0.01  # as its position embeddings are resampled with antialias
    assert found.label("fd") == "fd_dinov2"
    assert "bicubic with antialias; mean (0.485, 0.456, 0.406)" in found.recipe
    assert found.recipe.endswith("; 224 pixels")


@pytest.mark.slow
def test_clip_is_that_of_its_authors(tmp_path):
    torch.manual_seed(0)
    network = VisionTransformer(224, 32, 768, 12, 12, 512).eval()
    for tensor in network.parameters():
        nn.init.normal_(tensor, std=0.03)
    weights = {f"visual.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save(weights | {"logit_scale": torch.zeros(())}, tmp_path / "clip.pth")
    found = CLIPFeatures(str(tmp_path / "clip.pth"))
    images = photographs(64, 64)[:3]
    with torch.no_grad():
        expected = network(scaled(images, *OPENAI))
    assert (found.dimension, found.classes) == (512, 0)
    torch.testing.assert_close(found(images).pooled, expected, rtol=1e-3, atol=1e-4 * float(expected.std()))
    assert expected.std(0).max() > 1e-3
    assert found.label("fd") == "fd_clip-vit-b-32"


@pytest.mark.parametrize("network", [DINOv2Features, CLIPFeatures])
def test_models_are_among_those_of_timm(network):
    assert network.model in timm.list_pretrained(network.model)
