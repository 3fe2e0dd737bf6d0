import pytest
import torch
from torch import nn

from graincode.core.errors import GraincodeError
from graincode.core.losses import Term, hinge_discriminator, hinge_generator, lecam, weighted_sum
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


def test_each_side_wins_while_the_other_does_not_learn():
    torch.manual_seed(0)
    real, fake = torch.randn(8, 3, 16, 16), nn.Parameter(torch.zeros(8, 3, 16, 16))
    adversary = Adversary(PatchDiscriminator(8, 2), start_step=0)
    optimizer = torch.optim.Adam(adversary.parameters(), lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        term = adversary.discriminator_terms(adversary(torch.cat([real, fake.detach()])))[0]["discriminator"]
        term.mean.backward()
        optimizer.step()
    assert float(term.mean.detach()) < 0.5
    before = float(adversary(fake).mean())
    hinge_generator(adversary(fake)).sum().backward()
    assert float(adversary(fake - 0.1 * fake.grad.sign()).mean()) > before


def means(adversary, *batches):
    """Mean logit of each batch of images."""
    with torch.no_grad():
        return [float(adversary(images).mean()) for images in batches]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_one_step_of_the_generator_raises_the_logits_of_its_images(scale):
    """Whatever the adaptive weight, clamped or not: it must not turn the sign."""
    adversary, layer = adversary_and_layer()
    images = torch.randn(4, 3, 16, 16).double()
    fake = layer(images)
    error = Term(scale * (fake - images).abs().sum(), 4)
    adversary.update([adversary.generator_term(fake, error, layer.weight, step=1)[1]])
    assert 0 < float(adversary.adaptive) <= 0.75
    term, _ = note(adversary, layer, images, step=600)
    assert 0 < float(term.weight) < 0.75
    weighted_sum({"adversarial": term}).backward()
    (before,) = means(adversary, layer(images))
    with torch.no_grad():
        layer.weight -= 1e-3 * layer.weight.grad / layer.weight.grad.norm()
    assert means(adversary, layer(images))[0] > before


def test_one_step_of_the_discriminator_raises_real_logits_and_lowers_fake_ones():
    adversary, layer = adversary_and_layer()
    real = torch.randn(4, 3, 16, 16).double()
    fake = layer(real).detach()
    before = means(adversary, real, fake)
    terms, _ = adversary.discriminator_terms(adversary(torch.cat([real, fake])))
    assert [float(terms[f"logits_{kind}"].mean) for kind in ("real", "fake")] == pytest.approx(before)
    step(adversary, weighted_sum(terms), 1e-2)
    after = means(adversary, real, fake)
    assert after[0] > before[0]
    assert after[1] < before[1]


def step(adversary, loss, length):
    """Move the discriminator this far down the loss."""
    parameters = list(adversary.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= length * gradient / norm


def test_the_generator_hears_nothing_before_the_start_and_all_after_the_ramp():
    adversary, layer = adversary_and_layer(ramp_steps=4)
    adversary.start_step = 10
    images = torch.randn(2, 3, 16, 16).double()
    adversary.adaptive.fill_(0.5)
    weights = [float(note(adversary, layer, images, step)[0].weight) for step in (1, 10, 11, 12, 14, 99)]
    assert weights == [0, 0, 0.125, 0.25, 0.5, 0.5]
    assert [adversary.is_on(step) for step in (1, 10, 11)] == [False, False, True]


def test_lecam_pulls_logits_back_that_have_gone_too_far():
    """Real ones above what fake ones were, and fake ones below what real ones were; others are left alone."""
    before = torch.tensor(0.5), torch.tensor(-0.5)  # of real, of fake
    far = torch.tensor([[2.0], [-2.0]], requires_grad=True)
    lecam(far[:1], far[1:], *before).sum().backward()
    assert far.grad.flatten().tolist() == [5, -5]  # descent lowers the real one and raises the fake one
    near = torch.tensor([[-1.0], [1.0]], requires_grad=True)
    assert lecam(near[:1], near[1:], *before).tolist() == [0]
    logits = torch.tensor([[1.0, 3.0]])
    assert lecam(logits, -logits, *before).tolist() == [2 * (1.5**2 + 3.5**2) / 2]


def test_one_step_on_lecam_narrows_the_gap():
    adversary, layer = adversary_and_layer(lecam=1.0)
    real = torch.randn(4, 3, 16, 16).double()
    fake = layer(real).detach()
    for _ in range(20):  # until they are well apart
        terms, sums = adversary.discriminator_terms(adversary(torch.cat([real, fake])))
        step(adversary, weighted_sum(terms), 0.1)
        adversary.update_averages([sums])
    before = means(adversary, real, fake)
    terms, _ = adversary.discriminator_terms(adversary(torch.cat([real, fake])))
    step(adversary, weighted_sum({"lecam": terms["lecam"]}), 1e-2)
    after = means(adversary, real, fake)
    assert before[0] > before[1]
    assert after[0] - after[1] < before[0] - before[1]


def test_running_averages_are_those_of_the_whole_batch_and_of_the_steps_before():
    adversary, _ = adversary_and_layer(lecam=0.1)
    first, second = torch.randn(2, 2, 6, 1, 3, 3).double()  # steps of real and fake logits
    for logits in (first, second):
        parts = (range(0, 1), range(1, 4), range(4, 6))  # micro-batches
        found = [adversary.discriminator_terms(torch.cat([logits[0][part], logits[1][part]])) for part in parts]
        adversary.update_averages([sums for _, sums in found])
    found = adversary.averages[:2] / adversary.averages[2]
    expected = (0.99 * first.flatten(1).mean(1) + second.flatten(1).mean(1)) / 1.99
    torch.testing.assert_close(found, expected)
    assert "averages" in adversary.state_dict()
    terms, _ = adversary.discriminator_terms(second.flatten(0, 1))
    assert float(terms["lecam"].total) == pytest.approx(float(lecam(*second, *expected).sum()))
    assert terms["lecam"].weight == 0.1
    assert "lecam" not in adversary_and_layer()[0].discriminator_terms(second.flatten(0, 1))[0]


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
    term, noted = note(adversary, layer, images)
    assert float(term.weight) == 0  # nothing is known before the first step's end
    fake = layer(images)
    gradients = [
        torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm()
        for loss in ((fake - images).square().mean(), -adversary(fake).mean())
    ]
    adversary.update([noted])
    assert float(adversary.adaptive) == pytest.approx(float(gradients[0] / (gradients[1] + 1e-4)), rel=1e-9)
    whole = float(adversary.adaptive)
    adversary.update([note(adversary, layer, part)[1] for part in images.split([1, 3, 2])])
    assert float(adversary.adaptive) == pytest.approx(whole, rel=1e-9)
    adversary.update([])  # nothing was seen
    assert float(adversary.adaptive) == pytest.approx(whole, rel=1e-9)


def test_the_weight_is_clamped_and_ramped():
    adversary, layer = adversary_and_layer(max_weight=0.01, weight=2.0, ramp_steps=10)
    images = torch.randn(2, 3, 16, 16).double()
    adversary.update([note(adversary, layer, images)[1]])
    assert float(adversary.adaptive) == pytest.approx(0.01)
    assert float(note(adversary, layer, images, step=5)[0].weight) == pytest.approx(0.01)
    assert float(note(adversary, layer, images, step=20)[0].weight) == pytest.approx(0.02)


def test_the_tokenizers_term_leaves_the_discriminator_alone():
    adversary, layer = adversary_and_layer()
    term, _ = note(adversary, layer, torch.randn(2, 3, 16, 16).double())
    term.total.backward()
    assert all(parameter.grad is None for parameter in adversary.parameters())
    assert all(parameter.requires_grad for parameter in adversary.parameters())
    assert layer.weight.grad is not None


def test_logits_do_not_depend_on_the_batch():
    discriminator, images = PatchDiscriminator(8, 3).double(), torch.randn(5, 3, 32, 32).double()
    torch.testing.assert_close(discriminator(images)[2:3], discriminator(images[2:3]))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_images_that_leave_no_logit_are_refused(layers):
    discriminator, smallest = PatchDiscriminator(8, layers), 3 * 2**layers
    assert discriminator(torch.zeros(1, 3, smallest, smallest)).shape == (1, 1, 1, 1)
    with pytest.raises(GraincodeError, match=rf"^layers={layers}: expected fewer .* {smallest}$"):
        discriminator(torch.zeros(1, 3, smallest, smallest - 1))
    with pytest.raises(GraincodeError, match=r"^layers=0: expected"):
        PatchDiscriminator(8, 0)


def test_negative_settings_are_refused():
    for name in ("ramp_steps", "lecam"):
        with pytest.raises(GraincodeError, match=f"^{name}=-1: expected"):
            Adversary(PatchDiscriminator(8, 2), 0, **{name: -1})
