import pytest
import torch
from torch import nn

from graincode.core.errors import GraincodeError
from graincode.core.losses import Term, hinge_discriminator, hinge_generator
from graincode.tokenizer import Adversary, PatchDiscriminator


def test_a_discriminator_that_is_right_pays_nothing_and_one_that_is_wrong_pays():
    sure = torch.full((2, 1, 3, 3), 5.0)
    assert hinge_discriminator(sure, -sure).tolist() == [0, 0]
    assert hinge_discriminator(-sure, sure).tolist() == [6, 6]
    undecided = torch.zeros(2, 4, requires_grad=True)
    hinge_discriminator(undecided, torch.zeros(2, 4)).sum().backward()
    assert (undecided.grad < 0).all()  # descent raises the logits of real images
    undecided.grad = None
    hinge_discriminator(torch.zeros(2, 4), undecided).sum().backward()
    assert (undecided.grad > 0).all()  # and lowers those of fake ones


def test_the_generator_wants_its_images_to_look_real():
    logits = torch.zeros(3, 1, 2, 2, requires_grad=True)
    hinge_generator(logits).sum().backward()
    assert (logits.grad < 0).all()
    assert hinge_generator(torch.full((3, 5), 2.0)).tolist() == [-2, -2, -2]


def test_both_sides_win_against_an_idle_opponent():
    torch.manual_seed(0)
    real, made = torch.randn(8, 3, 16, 16), nn.Parameter(torch.zeros(8, 3, 16, 16))
    adversary = Adversary(PatchDiscriminator(8, 2), start_step=0)
    optimizer = torch.optim.Adam(adversary.parameters(), lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        term = adversary.discriminator_term(adversary(torch.cat([real, made.detach()])))
        term.mean.backward()
        optimizer.step()
    assert float(term.mean.detach()) < 0.5
    before = float(adversary(made).mean())
    hinge_generator(adversary(made)).sum().backward()
    assert float(adversary(made - 0.1 * made.grad.sign()).mean()) > before


def adversary_and_layer(**settings):
    torch.manual_seed(1)
    layer = nn.Conv2d(3, 3, 3, padding=1).double()
    return Adversary(PatchDiscriminator(8, 2), start_step=0, **settings).double(), layer


def note(adversary, layer, images, step=5):
    fake = layer(images)
    error = Term((fake - images).square().flatten(1).mean(1).sum(), len(images))
    return adversary.generator_term(fake, error, layer.weight, step)


def test_the_adaptive_weight_is_the_ratio_of_the_whole_batch_s_gradients():
    images = torch.randn(6, 3, 16, 16).double()
    adversary, layer = adversary_and_layer(max_weight=1e9)
    assert float(note(adversary, layer, images).weight) == 0  # nothing is known before the first step's end
    fake = layer(images)
    gradients = [
        torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm()
        for loss in ((fake - images).square().mean(), -adversary(fake).mean())
    ]
    adversary.update()
    assert float(adversary.adaptive) == pytest.approx(float(gradients[0] / (gradients[1] + 1e-4)), rel=1e-9)
    whole = float(adversary.adaptive)
    for part in images.split([1, 3, 2]):
        note(adversary, layer, part)
    adversary.update()
    assert float(adversary.adaptive) == pytest.approx(whole, rel=1e-9)
    adversary.update()  # with nothing seen
    assert float(adversary.adaptive) == pytest.approx(whole, rel=1e-9)


def test_the_weight_is_clamped_and_ramped():
    adversary, layer = adversary_and_layer(max_weight=0.01, weight=2.0, ramp_steps=10)
    images = torch.randn(2, 3, 16, 16).double()
    note(adversary, layer, images)
    adversary.update()
    assert float(adversary.adaptive) == pytest.approx(0.01)
    assert float(note(adversary, layer, images, step=5).weight) == pytest.approx(0.01)
    assert float(note(adversary, layer, images, step=20).weight) == pytest.approx(0.02)


def test_what_the_generator_does_leaves_the_discriminator_alone():
    adversary, layer = adversary_and_layer()
    term = note(adversary, layer, torch.randn(2, 3, 16, 16).double())
    term.total.backward()
    assert all(parameter.grad is None for parameter in adversary.parameters())
    assert all(parameter.requires_grad for parameter in adversary.parameters())
    assert layer.weight.grad is not None


def test_logits_do_not_depend_on_the_batch():
    discriminator, images = PatchDiscriminator(8, 3).double(), torch.randn(5, 3, 32, 32).double()
    torch.testing.assert_close(discriminator(images)[2:3], discriminator(images[2:3]))


def test_negative_settings_are_refused():
    with pytest.raises(GraincodeError, match=r"tokenizer\.adversary\.ramp_steps=1"):
        Adversary(PatchDiscriminator(8, 2), 0, ramp_steps=-1)
