import pytest
import torch

from graincode.core.errors import GraincodeError
from graincode.tokenizer import EMAQuantizer


def learn(quantizer, *parts, keys=None):
    """One training step that sees its vectors in several parts."""
    keys = [None] * len(parts) if keys is None else keys
    quantizer.update([quantizer(part, key).seen for part, key in zip(parts, keys, strict=True)])


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
    found = quantizer(torch.zeros(0, 2))
    assert len(found.indices) == 0
    quantizer.update([found.seen])
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


def test_gradients_pass_straight_through_and_only_the_input_commits():
    quantizer = EMAQuantizer(4, 2)
    quantizer.initialize(torch.randn(20, 2))
    vectors = torch.randn(20, 2, requires_grad=True)
    quantized = quantizer(vectors)
    assert not any(part.requires_grad for part in quantized.seen if part is not None)
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


@pytest.mark.parametrize("name", ["decay", "restart_below", "max_restarts"])
def test_shares_beyond_0_to_1_are_refused(name):
    with pytest.raises(GraincodeError, match=f"^{name}=1.5: expected 0 to "):
        EMAQuantizer(16, 8, **{name: 1.5})


def test_a_unit_codebook_knows_directions_alone():
    quantizer, vectors = EMAQuantizer(8, 3, unit=True).double(), torch.randn(60, 3).double()
    quantizer.initialize(vectors[:8])
    quantizer.codebook *= torch.rand(8, 1).double() + 0.5  # as moving averages leave it
    found = quantizer(vectors)
    cosines = torch.nn.functional.normalize(vectors, dim=1) @ torch.nn.functional.normalize(quantizer.codebook, dim=1).T
    assert torch.equal(found.indices, cosines.argmax(dim=1))
    assert torch.equal(quantizer.nearest(vectors * 100), found.indices)
    torch.testing.assert_close(quantizer.lookup(found.indices), found.vectors.detach())
    torch.testing.assert_close(found.vectors.norm(dim=1), torch.ones(60).double())
