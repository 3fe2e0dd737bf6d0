"""What programs give to models, with exports of graincode 0.1.0."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import graincode
from graincode.core.errors import GraincodeError
from graincode.core.images import as_floats, from_uint8, to_uint8
from graincode.core.prompts import CodePrefix
from graincode.core.sequences import to_sequences

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture(scope="module")
def tokenizer():
    return graincode.load_tokenizer(GOLDEN / "tokenizer")


@pytest.fixture(scope="module")
def generator():
    return graincode.load_generator(GOLDEN / "autoregressive")


@pytest.fixture
def pixels():
    """(B, H, W, 3) uint8."""
    return np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)


def codes_of(tokenizer, pixels):
    return tokenizer.tokenize(from_uint8(torch.from_numpy(pixels).permute(0, 3, 1, 2)))


def equal(a, b):
    return torch.equal(a.grains, b.grains) and torch.equal(a.indices, b.indices)


@pytest.mark.when("images of any floating point type or uint8 are tokenized", "they are converted")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_of_images_are_converted(tokenizer, pixels, dtype):
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    images = pixels if dtype == torch.uint8 else from_uint8(pixels).to(dtype)
    wanted = images if dtype == torch.uint8 else images.float()
    assert equal(tokenizer.tokenize(images), tokenizer.tokenize(from_uint8(wanted) if dtype == torch.uint8 else wanted))
    assert as_floats(images).dtype == torch.float32
    assert as_floats(images, torch.float64).dtype == torch.float64
    assert len(tokenizer.tokenize(images[:0])) == 0


@pytest.mark.when("images are whole numbers, bool or no tensor", "the type is named, with the function that converts")
@pytest.mark.parametrize(
    ("convert", "expected"),
    [
        (torch.Tensor.long, "images=torch.int64: "),
        (torch.Tensor.int, "images=torch.int32: "),
        (torch.Tensor.bool, "images=torch.bool: "),
        (torch.Tensor.cfloat, "images=torch.complex64: "),
        (torch.Tensor.to_sparse, r"images=torch.sparse_coo: expected a dense tensor"),
        (torch.Tensor.numpy, r"images of type ndarray: .* graincode\.as_images"),
        (torch.Tensor.tolist, r"images of type list: .* graincode\.as_images"),
        (lambda _: None, r"images of type NoneType: .* graincode\.as_images"),
    ],
)
def test_other_types_are_named(tokenizer, convert, expected):
    with pytest.raises(GraincodeError, match=f"^{expected}"):
        tokenizer.tokenize(convert(torch.ones(1, 3, 16, 16)))


def test_other_objects_are_named_everywhere(tokenizer):
    for function, value in ((from_uint8, [0]), (to_uint8, np.zeros(3))):
        with pytest.raises(GraincodeError, match=r"^images of type .*graincode\.as_images"):
            function(value)
    with pytest.raises(GraincodeError, match=r"^codes=Tensor: expected GrainCodes"):
        tokenizer.detokenize(torch.zeros(1, 4, 4).long())


@pytest.mark.parametrize("values", [(0, 255), (-2, 2), (-1, 1.6), (float("nan"), 0), (float("-inf"), 0)])
def test_values_that_are_surely_others_are_named(tokenizer, values):
    images = torch.zeros(1, 3, 16, 16)
    images[0, 0, 0, :2] = torch.tensor(values)
    with pytest.raises(GraincodeError, match=r"^images=torch.float32 from .*: expected floating point in \[-1, 1\]"):
        tokenizer.tokenize(images)


@pytest.mark.when("all values of images lie in 0 to 1", "a warning says that -1 is black")
def test_values_from_0_to_1_are_warned_of(pixels):
    pixels = torch.from_numpy(pixels)
    with pytest.warns(UserWarning, match="values from 0 to 1, and -1 is black"):
        as_floats(pixels / 255)
    bright = from_uint8(pixels.clamp(min=128))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for images in (bright, bright.half(), from_uint8(pixels), torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)):
            as_floats(images)


@pytest.mark.when("a program has Pillow images, arrays or files", "graincode.as_images makes a tensor of them")
def test_images_of_any_usual_kind(tokenizer, pixels, tmp_path):
    pictures = [Image.fromarray(array) for array in pixels]
    paths = [tmp_path / f"{index}.png" for index in range(2)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    wanted = codes_of(tokenizer, pixels)
    for images in (pixels, list(pixels), pictures, tuple(paths), [str(paths[0]), pictures[1]]):
        assert equal(tokenizer.tokenize(graincode.as_images(images)), wanted)
    for one in (pixels[0], pictures[0], paths[0]):
        assert equal(tokenizer.tokenize(graincode.as_images(one)), wanted[:1])
    assert graincode.as_images(pixels[..., 0][0]).shape == (1, 3, 16, 16)  # gray
    clear = np.concatenate([pixels, np.zeros_like(pixels[..., :1])], axis=3)
    assert graincode.as_images(clear).min() == 1  # transparent, on white
    assert graincode.as_images(clear, background="black").max() == -1
    assert torch.equal(graincode.as_images(clear, background="none"), graincode.as_images(pixels))
    assert graincode.as_images([pixels[0], Image.new("L", (40, 20))], (16, 32)).shape == (2, 3, 16, 32)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([], "images="),
        ([np.zeros((4, 4, 3))], "images of ndarray .*: expected .*uint8"),
        ([np.zeros((4, 4, 7), np.uint8)], "images of ndarray "),
        ([torch.zeros(3, 4, 4)], "images of Tensor: .* tokenize itself takes tensors"),
        (5, "images of int: "),
        (["/nowhere.png"], "/nowhere.png: no such file"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], "image_size=None: expected a size, as images are of 2"),
        ([Image.new("F", (4, 4))], r"images of Image \(Pillow mode F"),
    ],
)
def test_what_is_no_image_is_refused(images, expected):
    with pytest.raises(GraincodeError, match=f"^{expected}"):
        graincode.as_images(images)


@pytest.mark.when("a setting of samples is of another type, such as seed=0.7", "it is named")
@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 0.7}, {"seed": True}, {"seed": "x"}, {"seed": None}, {"first_index": 1.5}, {"batch_size": 2.5},
        {"temperature": "x"}, {"temperature": True}, {"temperature": float("nan")}, {"top_k": 1.5}, {"top_k": True},
        {"top_p": None}, {"guidance_scale": "2"},
    ],
)  # fmt: skip
def test_settings_of_samples_have_types(generator, settings):
    ((name, value),) = settings.items()
    with pytest.raises(GraincodeError, match=f"^{name}={value}: expected "):
        generator.sample(torch.zeros(1).long(), **settings)


def test_whole_numbers_of_numpy_are_whole_numbers(generator):
    labels = torch.zeros(1).long()
    assert equal(generator.sample(labels, seed=np.int64(3), top_k=np.int64(4)), generator.sample(labels, 3, top_k=4))


@pytest.mark.when("samples are to keep more of a sequence than it has", "it is refused")
def test_what_is_given_is_part_of_its_sequence(tokenizer, generator, pixels):
    codes, labels = codes_of(tokenizer, pixels), torch.zeros(2).long()
    sequences = to_sequences(codes)
    tokens = sequences.is_token.sum(dim=1)
    for lengths, positions in ((tokens + 1, tokens + 1), (tokens, tokens - 1), (tokens - tokens - 1, tokens)):
        with pytest.raises(GraincodeError, match=r"^lengths="):
            generator.sample(labels, given=CodePrefix(sequences, lengths, positions))
    assert equal(generator.sample(labels, given=CodePrefix(sequences, tokens, tokens)), codes)
