import math

import pytest
import torch
import torch.nn.functional as F
from helpers_tokenizer import DUAL, make, photographs, start

from graincode.core import density
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.tokenizer import EMAQuantizer, ReconstructionObjective
from graincode.tokenizer.blocks import norm


@pytest.mark.parametrize(
    ("layout", "patch"),
    [
        (CodeLayout((32, 32), ((8, 8),), 16), 2),
        (CodeLayout((32, 32), ((4, 8),), 16), 1),
        (DUAL, 4),
        (DUAL, 1),
        (CodeLayout((32, 64), ((16, 16), (8, 8), (4, 4)), 16), 2),
        (CodeLayout((64, 32), ((16, 8), (4, 8)), 16), 1),
        (CodeLayout((16, 24), ((4, 4), (2, 2)), 16), 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("expand", [True, False])
def test_tokenize_and_detokenize_agree_with_the_trained_path(layout, patch, expand):
    tokenizer, images = make(layout, patch=patch, expand=expand), photographs(3, layout.image_size)
    start(tokenizer, images)
    for parameter in tokenizer.decoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    tokenizer.eval()
    codes = tokenizer.tokenize(images)
    made = tokenizer.detokenize(codes)
    assert made.shape == images.shape
    reconstruction = tokenizer(images)
    assert torch.equal(reconstruction.routing.grains, codes.grains)
    torch.testing.assert_close(reconstruction.images.clamp(-1, 1), made, atol=1e-5, rtol=0)
    assert len(reconstruction.quantized.indices) == int(codes.lengths.sum())


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_every_pixel_reaches_every_grain(patch):
    encoder = make(DUAL, patch=patch).encoder
    for grain in range(2):
        images = photographs(1).requires_grad_()
        encoder(images)[grain].sin().sum().backward()
        assert (images.grad != 0).any(dim=1).all()


def test_every_part_gets_a_gradient_whatever_the_grains():
    tokenizer, images = make(DUAL), photographs(2)
    start(tokenizer, images)
    for ratios in ([1.0, 0.0], [0.5, 0.5], [0.0, 1.0]):
        tokenizer.zero_grad()
        objective = ReconstructionObjective()
        terms = objective(images, tokenizer(images, ratios), 40)
        sum(term.mean * term.weight for term in terms.values()).backward()
        assert all(parameter.grad is not None for parameter in tokenizer.parameters())


def test_all_coarse_and_all_fine_hold_for_images_denser_than_any_in_the_training_data():
    tokenizer = make(DUAL).eval()
    tokenizer.calibrate([torch.full((4, 3, 32, 32), -1.0)])
    busy = torch.rand(2, 3, 32, 32) * 2 - 1
    assert (tokenizer.tokenize(busy, [1.0, 0.0]).lengths == 16).all()
    assert (tokenizer.tokenize(busy, [0.0, 1.0]).lengths == 64).all()


def test_images_in_another_range_are_refused():
    tokenizer = make(DUAL).eval()
    tokenizer.calibrate([photographs(2)])
    with pytest.raises(GraincodeError, match="from_uint8"):
        tokenizer.tokenize(torch.rand(1, 3, 32, 32) * 255 + 10)


def test_any_ratio_can_be_asked_for():
    tokenizer = make(DUAL).eval()
    images = torch.cat([photographs(8, seed=s) for s in range(8)])
    tokenizer.calibrate([images])
    lengths = [
        float(tokenizer.tokenize(images, [1 - fine, fine]).lengths.float().mean())
        for fine in (0.0, 0.1, 0.25, 0.4, 1.0)
    ]
    assert lengths[0] == 16
    assert lengths[-1] == 64
    assert lengths == sorted(lengths)
    assert lengths[2] == pytest.approx(16 * (1 + 3 * 0.25), abs=1)


def test_codes_of_one_image_do_not_depend_on_the_others():
    tokenizer = make(DUAL)
    images = photographs(6)
    start(tokenizer, images)
    tokenizer.eval()
    together = tokenizer.tokenize(images)
    for row in range(6):
        assert torch.equal(tokenizer.tokenize(images[[row]]).grains, together[[row]].grains)


@pytest.mark.parametrize("sigma", [0.004, 0.01, 0.065, 0.3])
def test_entropy_is_that_of_the_histogram_written_out(sigma):
    images = photographs(2, (16, 16)).double()
    found = density.region_entropy(images, (8, 8), bins=32, sigma=sigma)
    grey = (images * torch.tensor([0.2989, 0.5870, 0.1140]).double()[:, None, None]).sum(dim=1)
    centers = torch.linspace(-1, 1, 32).double()
    for row, column in ((0, 0), (1, 1)):
        pixels = grey[1, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].flatten()
        weight = torch.exp(-0.5 * ((pixels[:, None] - centers) / sigma) ** 2).mean(dim=0)
        share = weight / weight.sum()
        expected = -sum(float(p) * math.log(float(p)) for p in share if p > 0)
        assert float(found[1, row, column]) == pytest.approx(expected, abs=1e-4)


def test_entropy_is_finite_and_orders_regions():
    flat, busy = torch.full((1, 3, 8, 8), -1.0), torch.rand(1, 3, 8, 8) * 2 - 1
    values = [float(density.region_entropy(x, (8, 8))) for x in (flat, busy)]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[1] > 2
    levels = torch.linspace(-1, 1, 999)[:, None, None, None].expand(-1, 3, 8, 8)
    entropy = density.region_entropy(levels, (8, 8))
    assert entropy.isfinite().all()
    assert 0.6 < float(entropy.max()) <= 0.7  # a flat patch between two bins: ln 2
    with pytest.raises(GraincodeError, match=r"density\.sigma"):
        density.region_entropy(flat, (8, 8), sigma=1e-4)


@pytest.mark.parametrize("channels", [8, 32, 64, 512])
def test_group_norm_is_torchs_in_any_memory_layout(channels):
    layer, x = norm(channels), torch.randn(2, channels, 4, 6).to(memory_format=torch.channels_last)
    expected = F.group_norm(x.double(), layer.num_groups, eps=1e-6).float()
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def learn(quantizer, *parts, keys=None):
    """One training step that sees its vectors in several parts."""
    for index, part in enumerate(parts):
        quantizer(part, None if keys is None else keys[index])
    quantizer.update()


def test_the_codebook_does_not_depend_on_how_a_batch_is_divided():
    vectors, keys = torch.randn(90, 3).double(), torch.rand(90).double()
    books = []
    for order, sizes in ((torch.arange(90), [90]), (torch.arange(90), [30, 60]), (torch.randperm(90), [1, 0, 88, 1])):
        quantizer = EMAQuantizer(64, 3, decay=0.5, restart_below=0.9, max_restarts=0.3).double()
        quantizer.initialize(vectors[:64], keys[:64])
        quantizer.codebook[32:] += 100  # out of use
        for _ in range(3):
            learn(quantizer, *vectors[order].split(sizes), keys=keys[order].split(sizes))
        books.append(quantizer.codebook)
    for book in books[1:]:
        torch.testing.assert_close(book, books[0], rtol=1e-12, atol=1e-12)
    assert (books[0] < 50).all()


def test_nothing_seen_changes_nothing_and_an_empty_codebook_says_so():
    quantizer = EMAQuantizer(8, 2, restart_below=0.0)
    with pytest.raises(GraincodeError, match="the codebook is empty"):
        quantizer(torch.randn(5, 2))
    quantizer.initialize(torch.randn(50, 2))
    before = quantizer.codebook.clone()
    assert len(quantizer(torch.zeros(0, 2)).indices) == 0
    quantizer.update()
    torch.testing.assert_close(quantizer.codebook, before)


def test_quantiser_picks_the_nearest_entry_and_learns_means():
    quantizer = EMAQuantizer(4, 2, decay=0.0, restart_below=0.0)
    corners = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    quantizer.train()
    quantizer.initialize(corners)
    vectors = corners.repeat(50, 1) + torch.randn(200, 2)
    learn(quantizer, vectors)
    entry = torch.cdist(corners, quantizer.codebook).argmin(dim=1)
    assert sorted(entry.tolist()) == [0, 1, 2, 3]
    for k in range(4):
        torch.testing.assert_close(quantizer.codebook[entry[k]], vectors[k::4].mean(dim=0), atol=1e-5, rtol=0)
    quantizer.eval()
    before = quantizer.codebook.clone()
    quantized = quantizer(vectors)
    nearest = torch.cdist(vectors, quantizer.codebook).argmin(dim=1)
    assert torch.equal(quantized.indices, nearest)
    assert torch.equal(quantizer.codebook, before)


def test_the_first_codebook_and_restarts_come_from_all_over_the_batch():
    quantizer = EMAQuantizer(256, 1)
    columns = torch.arange(8.0).repeat(64 * 8)[:, None]  # what a raster scan of 64 images with 8 columns looks like
    quantizer.initialize(columns)
    started = torch.bincount(quantizer.codebook.round().long().flatten(), minlength=8)
    assert (started > 10).all()


def test_tokenizing_never_changes_the_codebook():
    tokenizer, images = make(DUAL), photographs(3)
    start(tokenizer, images)
    before = tokenizer.quantizers[0].codebook.clone()
    tokenizer.tokenize(images)
    assert tokenizer.training
    assert torch.equal(tokenizer.quantizers[0].codebook, before)


def test_gradients_pass_straight_through_and_only_the_input_commits():
    quantizer = EMAQuantizer(4, 2)
    quantizer.initialize(torch.randn(20, 2))
    vectors = torch.randn(20, 2, requires_grad=True)
    quantized = quantizer(vectors)
    quantized.vectors.sum().backward()
    assert torch.equal(vectors.grad, torch.ones_like(vectors))
    assert not quantizer.codebook.requires_grad


def test_few_vectors_do_not_replace_a_large_codebook():
    quantizer = EMAQuantizer(1024, 4, max_restarts=0.02)
    quantizer.initialize(torch.randn(4096, 4))
    for _ in range(20):
        before = quantizer.codebook.clone()
        learn(quantizer, torch.randn(64, 4))
        jumped = (quantizer.codebook - before).norm(dim=1) > 0.5
        assert int(jumped.sum()) <= 0.02 * 1024 + 64


def test_restarts_can_be_switched_off_and_a_small_share_is_one_entry():
    vectors = torch.randn(64, 2)
    for share, restarted in ((0.0, 0), (1e-6, 1), (0.25, 4)):
        quantizer = EMAQuantizer(16, 2, decay=0.0, max_restarts=share)
        quantizer.initialize(vectors)
        quantizer.codebook[8:] += 100  # out of use
        before = quantizer.codebook.clone()
        learn(quantizer, vectors)
        assert int((quantizer.codebook[8:] != before[8:]).any(dim=1).sum()) == restarted


def test_unused_entries_come_back_into_use():
    quantizer = EMAQuantizer(32, 2, decay=0.9, max_restarts=0.1)
    quantizer.initialize(torch.full((64, 2), 5.0) + 0.01 * torch.randn(64, 2))  # all entries start in one place
    data = torch.rand(2048, 2) * 10 - 5
    for _ in range(200):
        learn(quantizer, data[torch.randperm(2048)[:512]])
    used = torch.bincount(quantizer.eval()(data).indices, minlength=32)
    assert (used > 0).all()


def test_images_of_another_size_and_codes_of_another_layout_are_refused():
    tokenizer = make(DUAL).eval()
    tokenizer.calibrate([photographs(2)])
    with pytest.raises(GraincodeError, match=r"data.image_size=\[32, 32\]"):
        tokenizer.tokenize(torch.zeros(1, 3, 16, 16))
    other = make(CodeLayout((32, 32), ((8, 8), (4, 4)), 17)).eval()
    with pytest.raises(GraincodeError, match="codebook_size 16 instead of 17"):
        other.detokenize(tokenizer.tokenize(photographs(1)))


def test_grains_that_halving_does_not_reach_are_refused():
    with pytest.raises(GraincodeError, match="powers of two"):
        make(CodeLayout((36, 36), ((12, 12), (4, 4)), 16))
