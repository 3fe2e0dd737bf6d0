import json
from pathlib import Path

import pytest
import timm
import torch
from helpers import TINY_TOKENIZER, TINY_TRAINER, command, write_images
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from graincode.api import load_tokenizer
from graincode.config.job import build, open_run
from graincode.config.validate import check
from graincode.core.errors import GraincodeError
from graincode.core.losses import Term, feature_distance
from graincode.networks.perceptual import Lite0Loss, LPIPSLoss, TimmLoss
from graincode.runs.checkpoint import read_state
from graincode.tokenizer import ReconstructionObjective
from graincode.training.trackers import read_log


@pytest.fixture(scope="module")
def lite0():
    return Lite0Loss()


def pairs(count=3, size=64):
    """Smooth images, and others."""
    coarse = torch.rand(2, count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(coarse.flatten(0, 1), size=size, mode="bilinear").split(count)


def weights_of(model, path):
    """A file of random weights of a model of timm."""
    torch.manual_seed(0)
    save_file(timm.create_model(model, pretrained=False).state_dict(), path)
    return str(path)


def test_the_distance_is_zero_for_equal_images_and_grows_as_they_part(lite0):
    a, b = pairs()
    assert lite0(a, a).tolist() == [0, 0, 0]
    near, far = lite0(torch.lerp(a, b, 0.1), a), lite0(b, a)
    assert near.shape == (3,)
    assert (near > 0).all()
    assert (far > near).all()
    torch.testing.assert_close(lite0(b[1:2], a[1:2]), far[1:2])
    grey = a.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert (lite0(grey, a) > 0).all()


def test_a_gradient_step_brings_images_nearer_and_leaves_the_network_alone(lite0):
    a, b = pairs()
    made = b.clone().requires_grad_()
    before = lite0(made, a)
    before.sum().backward()
    assert (made.grad.flatten(1).norm(dim=1) > 0).all()
    with torch.no_grad():
        assert (lite0(made - 0.01 * F.normalize(made.grad, dim=(1, 2, 3)), a) < before).all()
    network = lite0.load((64, 64))
    assert not network.training
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


def test_it_is_lpips_without_linear_weights(tmp_path):
    path = weights_of("test_resnet", tmp_path / "resnet.safetensors")
    loss = TimmLoss("test_resnet", weights=path, stages=[0, 2, 4])
    network = timm.create_model("test_resnet", pretrained=False, features_only=True, out_indices=(0, 2, 4)).eval()
    network.load_state_dict({key: value for key, value in load_file(path).items() if not key.startswith("fc")})
    a, b = pairs()
    mean, std = (torch.tensor(network.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    maps = [[F.normalize(m, dim=1) for m in network(((x + 1) / 2 - mean) / std)] for x in (a, b)]
    expected = sum((x - y).square().sum(1).mean((1, 2)) for x, y in zip(*maps, strict=True))
    torch.testing.assert_close(loss(a, b), expected.detach())


def test_transformers_take_images_of_their_own_and_of_another_size(tmp_path):
    path = weights_of("test_vit", tmp_path / "vit.safetensors")
    a, b = pairs()
    for resize in (None, 96):
        loss = TimmLoss("test_vit", weights=path, resize=resize, stages=[1, 5])
        assert (loss(a, b) > loss(a, a)).all()
    with pytest.raises(GraincodeError, match=r"does not take images of 65 x 64 pixels .*type tokenizer\.percept"):
        TimmLoss("test_vit", weights=path).load((65, 64))


def test_it_works_in_bfloat16_and_in_float64(lite0):
    a, b = pairs()
    exact, rough = lite0(b.double(), a.double()), b.clone().requires_grad_()
    assert exact.dtype == torch.float64
    torch.testing.assert_close(lite0(b, a).double(), exact, rtol=1e-4, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        found = lite0(rough, a)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0)
    found.sum().backward()
    assert bool(rough.grad.isfinite().all())


def test_places_without_any_feature_have_no_gradient_and_no_nan():
    made = torch.randn(2, 4, 3, 3)
    made[:, :, 1, 1] = 0
    made.requires_grad_()
    feature_distance(made, torch.randn(2, 4, 3, 3)).sum().backward()
    assert bool(made.grad.isfinite().all())
    assert (made.grad[:, :, 1, 1] == 0).all()
    assert (made.grad.abs().sum(1) > 0).sum() == 2 * 8


def test_images_that_are_too_small_or_not_in_colour_are_refused(lite0, monkeypatch):
    small = torch.zeros(1, 3, 16, 24)
    with pytest.raises(GraincodeError, match=r"16 x 24 pixels are too small for lite0, which takes 32 or more: type"):
        lite0(small, small)
    assert Lite0Loss(stages=[0, 1, 2])(small, small) == 0
    assert Lite0Loss(resize=64)(small, small) == 0
    with pytest.raises(GraincodeError, match=r"expected \(B, 3, H, W\) twice.*grey"):
        lite0(small[:, :1], small[:, :1])
    lpips = LPIPSLoss()
    monkeypatch.setattr(lpips, "_load", lambda size: (nn.Identity(), "lpips-vgg:0"))
    with pytest.raises(GraincodeError, match="8 x 8 pixels are too small for lpips-vgg, which takes 16 or more"):
        lpips.load((8, 8))


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: Lite0Loss(weight=0), r"weight=0: .*tokenizer/perceptual=none"),
        (lambda: Lite0Loss(resize=0), r"resize=0: .*type tokenizer\.perceptual\.resize=null or 112"),
        (lambda: Lite0Loss(stages=[1, 1]), r"stages=\[1, 1\]: expected different numbers"),
        (
            lambda: Lite0Loss(stages=[5]).load((64, 64)),
            r"lite0 has 5 stages; type tokenizer\.perceptual\.stages=\[0",
        ),
        (lambda: TimmLoss("resnet81"), r"no model 'resnet81': type tokenizer\.perceptual\.model= .*resnet"),
        (lambda: LPIPSLoss(weights="none.pth").load((64, 64)), r"none\.pth: no such file"),
    ],
)
def test_wrong_settings_are_refused(make, advice):
    with pytest.raises(GraincodeError, match=advice) as error:
        make()
    assert "\n" not in str(error.value)


def test_an_adversarial_loss_is_weighed_against_pixels_and_perception_together():
    layer = torch.ones(2, requires_grad=True)
    terms = {
        "l1": Term((layer * torch.tensor([1.0, 0.0])).sum(), 4),
        "commitment": Term((layer * 7).sum(), 9, 0.25),
        "perceptual": Term((layer * torch.tensor([0.0, 5.0])).sum(), 4, 0.1),
    }
    both = ReconstructionObjective("l1").likeness(terms)
    assert both.count == 4
    assert torch.autograd.grad(both.total, layer)[0].tolist() == [1, 0.5]


def test_a_training_with_it_exports_the_tokenizer_alone_and_is_identified_by_the_weights(lite0, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command("train_tokenizer", "data=image_folder", f"data.root={write_images(Path('images'))}", "data.image_size=32",
            *TINY_TOKENIZER, *TINY_TRAINER, "trainer.steps=4", "trainer.eval_every=4", "tokenizer/perceptual=lite0",
            "tokenizer/adversary=patch", "tokenizer.adversary.lecam=0.1", "tokenizer.adversary.start_step=2",
            "tokenizer.adversary.discriminator.channels=8", "run_name=it", "logging=none")  # fmt: skip
    run = Path("runs/train_tokenizer/it")
    load_tokenizer(run / "export")  # which refuses weights that are no tokenizer's
    (line,) = [line for line in read_log(run) if line["step"] == 4 and "train/loss" in line]
    assert line["train/perceptual"] > 0
    assert {"train/lecam", "train/logits_real", "train/logits_fake"} <= line.keys()
    lite0.load((32, 32))
    assert json.loads((run / "config.json").read_text())["identity"]["inputs.perceptual"] == lite0.identity
    state = read_state(run / "state/step_000000004", torch.device("cpu"))["trainables"]
    assert not any("network" in key for player in state.values() for key in player["module"])
    assert "averages" in state["discriminator"]["module"]


def test_a_file_of_weights_counts_by_its_content_not_by_its_path(tmp_path):
    found = []
    for name, change in (("a", 0), ("b", 0), ("c", 1)):
        path = weights_of("test_resnet", tmp_path / f"{name}.safetensors")
        changed = load_file(path)
        changed["fc.bias"] += change
        save_file(changed, path)
        cfg = check("train_tokenizer", [f"tokenizer.perceptual.weights={path}", "tokenizer/perceptual=timm",
                                        "tokenizer.perceptual.model=test_resnet"])  # fmt: skip
        loss = build(cfg.tokenizer.perceptual)
        loss.load((32, 32))
        run = open_run("train_tokenizer", cfg, perceptual=loss.identity)
        assert run.config["tokenizer"]["perceptual"]["weights"] == path
        found.append(run.identity)
    assert found[0] == found[1]
    assert found[0] != found[2]
