import json
from pathlib import Path

import torch
from helpers import TINY_TOKENIZER, TINY_TRAINER, command, write_images

from graincode.config.job import build
from graincode.config.validate import check
from graincode.core.losses import Term
from graincode.networks.perceptual import Lite0Distance, LPIPSDistance, TimmDistance
from graincode.runs.checkpoint import read_state
from graincode.tokenizer import ReconstructionObjective
from graincode.training.trackers import read_log


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


def test_configurations_build_what_they_name_and_read_no_weights():
    for name, distance, settings in (
        ("lite0", Lite0Distance, []), ("lpips", LPIPSDistance, []),
        ("timm", TimmDistance, ["tokenizer.perceptual.model=test_resnet"]),
    ):  # fmt: skip
        cfg = check("train_tokenizer", [f"tokenizer/perceptual={name}", *settings])
        assert isinstance(build(cfg.tokenizer.perceptual), distance)


def test_a_training_with_it_exports_the_tokenizer_alone_and_is_identified_by_the_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command("train_tokenizer", "data=image_folder", f"data.root={write_images(Path('images'))}", "data.image_size=32",
            *TINY_TOKENIZER, *TINY_TRAINER, "trainer.steps=4", "trainer.eval_every=4", "tokenizer/perceptual=lite0",
            "tokenizer/adversary=patch", "tokenizer.adversary.lecam=0.1", "tokenizer.adversary.start_step=2",
            "tokenizer.adversary.discriminator.channels=8", "run_name=it", "logging=none")  # fmt: skip
    run = Path("runs/train_tokenizer/it")
    (line,) = [line for line in read_log(run) if line["step"] == 4 and "train/loss" in line]
    assert line["train/perceptual"] > 0
    assert {"train/lecam", "train/logits_real", "train/logits_fake"} <= line.keys()
    assert json.loads((run / "config.json").read_text())["identity"]["inputs.perceptual"] == Lite0Distance().identity
    state = read_state(run / "state/step_000000004")["trainables"]
    assert not any("network" in key for part in state.values() for key in part["module"])
    assert "averages" in state["discriminator"]["module"]
