import io
import os
import re
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import KINDS, make, one_line, write_images
from PIL import Image

from graincode.core.errors import GraincodeError
from graincode.core.images import to_uint8
from graincode.data import ImageFolder
from graincode.data.decoding import EXTENSIONS, FORMATS, open_image, read_image
from graincode.evaluation.subjects import Folder


def test_every_known_format_is_decoded(tmp_path):
    for extension in EXTENSIONS:
        path = tmp_path / f"image{extension}"
        Image.new("RGB", (10, 10), (200, 100, 40)).save(path)
        image = read_image(path, (4, 4), "center").float()
        assert (image - torch.tensor([200.0, 100.0, 40.0])[:, None, None]).abs().max() < 12, extension


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / "image.tif"
    Image.new("RGB", (10, 10), "white").convert(mode).save(path)
    assert read_image(path, (4, 6), "center").eq(255).all()


# transparency: a red square in the middle of transparent black


def square() -> np.ndarray:
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[2:6, 2:6] = 200, 0, 0, 255
    return pixels


def transparent_files(root: Path) -> dict[str, Path]:
    """The square in every way that files have to say what is transparent."""
    rgba = Image.fromarray(square())
    moving = {"save_all": True, "append_images": [Image.new("RGBA", (8, 8), (0, 0, 255, 90))]}
    ways = {
        "rgba.png": (rgba, {}),
        "gray.png": (rgba.convert("LA"), {}),
        "palette.png": (rgba.quantize(4), {}),
        "colour_key.png": (rgba.convert("RGB"), {"transparency": (0, 0, 0)}),
        "gray_key.png": (rgba.getchannel("R"), {"transparency": 0}),
        "moving.png": (rgba, moving),
        "index.gif": (rgba, {}),
        "moving.gif": (rgba, moving),
        "rgba.webp": (rgba, {"lossless": True}),
        "moving.webp": (rgba, {"lossless": True, **moving}),
        "rgba.tif": (rgba, {}),
        "palette_alpha.tif": (rgba.convert("RGB").convert("P").convert("PA"), {}),
        "rgba.tga": (rgba, {}),
        "rgba.jp2": (rgba, {}),
        "rgba.qoi": (rgba, {}),
    }
    for name, (image, options) in ways.items():
        if image.mode == "PA":
            image.putalpha(rgba.getchannel("A"))
        image.save(root / name, **options)
    return {name: root / name for name in ways}


@pytest.mark.when("an image is transparent", "it is composed onto the background of the data set, by default white")
def test_transparent_pixels_show_the_background(tmp_path):
    for name, path in transparent_files(tmp_path).items():
        ground = {
            colour: read_image(path, (8, 8), "center", background=colour)[:, 0, 0].tolist()
            for colour in ("white", "#102030", "none")
        }
        assert ground == {"white": [255] * 3, "#102030": [0x10, 0x20, 0x30], "none": [0] * 3}, name
        assert open_image(path).getpixel((0, 0)) == (255, 255, 255), name
        red = open_image(path).getpixel((4, 4))[0]
        assert abs(red - (60 if name == "gray.png" else 200)) < 5, name


def test_half_transparent_pixels_are_mixed_before_they_are_scaled(tmp_path):
    pixels = square()
    pixels[..., 3] //= 2
    Image.fromarray(pixels).save(tmp_path / "half.png")
    assert open_image(tmp_path / "half.png").getpixel((4, 4)) == pytest.approx((228, 128, 128), abs=1)
    fringe = read_image(tmp_path / "half.png", (2, 2), "center")
    assert fringe[0].min() >= 228 - 2  # no black of transparent pixels comes in


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_has_a_background(tmp_path, kind):
    buffer = io.BytesIO()
    Image.fromarray(square()).save(buffer, "png")
    white = make(kind, tmp_path, [buffer.getvalue()] * 40)
    black = make(kind, tmp_path, [buffer.getvalue()] * 40, background="black", cache=True)
    as_white = make(kind, tmp_path, [buffer.getvalue()] * 40, background="#ffffff", cache=True)
    corners = [to_uint8(source.split("val")[0].images)[0, :, 0, 0].tolist() for source in (white, black, as_white)]
    assert corners == [[255] * 3, [0] * 3, [255] * 3]
    assert white.split("val").fingerprint() != black.split("val").fingerprint()


def test_a_folder_that_is_evaluated_has_the_same_background(tmp_path):
    Image.fromarray(square()).save(tmp_path / "1.png")
    for size in (None, 8):
        images = Folder(str(tmp_path), size).open_reference(None, None).images
        assert to_uint8(images[0].images)[0, :, 0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("background", ["transparent", "#12345", "#11223344", "", 7, None])
def test_a_background_that_is_no_colour_is_named(background):
    with pytest.raises(GraincodeError) as error:
        ImageFolder("/images", background=background)
    one_line(error, f"background={background}: expected none, a colour's name")


# 16 bits


def png_of_16_bits(pixels: np.ndarray, colour_type: int, key: tuple[int, ...]) -> bytes:
    """(H, W, C) as PNG, which Pillow does not write; `key` is the transparent colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels))
    transparent = struct.pack(f">{len(key)}H", *key)
    chunks = chunk(b"IHDR", head) + chunk(b"tRNS", transparent) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("extension", [".png", ".pgm", ".tif", ".jp2"])
def test_16_bits_are_divided(tmp_path, extension):
    levels = np.array([[0, 255], [256, 0xFFFF]], dtype=np.uint16).repeat(8, 0).repeat(8, 1)
    Image.fromarray(levels).save(tmp_path / f"deep{extension}")
    image = open_image(tmp_path / f"deep{extension}")
    assert [image.getpixel(at)[0] for at in ((0, 0), (8, 0), (0, 8), (8, 8))] == [0, 0, 1, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_of_16_bits_may_be_transparent(channels):
    pixels = np.full((4, 4, channels), 40000)
    pixels[0, 0] = 20000
    content = png_of_16_bits(pixels, {1: 0, 3: 2}[channels], (20000,) * channels)
    assert open_image(content).getpixel((0, 0)) == (255,) * 3
    assert open_image(content).getpixel((1, 1)) == (40000 // 256,) * 3


# geometry


def test_crop_keeps_the_centre_and_none_keeps_everything(tmp_path):
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    for size in ((10, 10), (20, 20), (40, 40)):
        assert read_image(tmp_path / "wide.png", size, "center")[:, :, 2:-2].eq(255).all()
    squeezed = read_image(tmp_path / "wide.png", (6, 30), "none")
    assert squeezed.shape == (3, 6, 30)
    assert squeezed[0, 3, [2, 15, 27]].tolist() == [0, 255, 0]


def test_scaling_down_is_antialiased(tmp_path):
    checker = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checker).save(tmp_path / "checker.png")
    image = read_image(tmp_path / "checker.png", (8, 8), "center").float()
    assert (image - 127.5).abs().max() < 8


def test_images_are_turned_upright(tmp_path):
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    image = read_image(tmp_path / "photo.png", (8, 8), "center")
    assert image[0, :, 0].tolist() == [0] * 4 + [255] * 4


def broken_files() -> dict[str, bytes]:
    jpeg, png, deep, real = (io.BytesIO() for _ in range(4))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    noise.save(jpeg, "jpeg")
    noise.save(png, "png")
    Image.fromarray(np.full((8, 8), 1000, dtype=np.int32)).save(deep, "tiff")
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(real, "tiff")
    return {
        "empty": b"",
        "text": b"hello",
        "cut jpeg": jpeg.getvalue()[:800],
        "cut png": png.getvalue()[:800],
        "broken png": png.getvalue()[:50] + b"????" + png.getvalue()[54:],
        "32 bits": deep.getvalue(),
        "floats": real.getvalue(),
        "12 bits": deep.getvalue().replace(struct.pack("<HHII", 258, 3, 1, 32), struct.pack("<HHII", 258, 3, 1, 12)),
    }


@pytest.mark.parametrize("kind", broken_files())
def test_a_broken_image_is_named_when_it_is_read(tmp_path, kind):
    write_images(tmp_path, "1.png", "2.png", "3.png")
    source = ImageFolder(str(tmp_path), image_size=8)
    (tmp_path / "1.png").write_bytes(broken_files()[kind])
    with pytest.raises(GraincodeError) as error:
        [source.split(name)[0] for name in ("train", "val", "test")]
    one_line(error, str(tmp_path / "1.png"), "remove it")


@pytest.mark.when("an image has too many pixels to be decoded safely", "it is named, with the advice to scale it down")
def test_too_many_pixels_are_to_be_scaled_down(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    write_images(tmp_path, "small.png", size=(10, 10))  # between the limit and its double
    assert read_image(tmp_path / "small.png", (4, 4), "center").shape == (3, 4, 4)
    write_images(tmp_path, "large.png", size=(11, 11))
    with pytest.raises(GraincodeError) as error:
        read_image(tmp_path / "large.png", (4, 4), "center")
    one_line(error, str(tmp_path / "large.png"), "121 pixels", "scale it down")


@pytest.fixture
def postscript(monkeypatch) -> bytes:
    """A file for which Pillow starts a program, whatever it is called; starting one fails."""

    def refuse(*arguments, **options):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "eps")
    assert "EPS" in Image.registered_extensions().values()
    return buffer.getvalue()


@pytest.mark.when("a file that ends in .png holds PostScript", "it is refused by name, and no program is started")
@pytest.mark.parametrize("kind", KINDS)
def test_no_decoder_is_started_that_is_not_named(tmp_path, kind, postscript):
    source = make(kind, tmp_path, [postscript] * 40)
    with pytest.raises(GraincodeError) as error:
        source.split("train")[0]
    assert "<" not in error.value.line
    one_line(error, str(tmp_path), "in none of the formats that are read")
    assert "EPS" not in FORMATS


def test_a_reference_starts_no_decoder_that_is_not_named(tmp_path, postscript):
    (tmp_path / "1.png").write_bytes(postscript)
    for size in (None, 8):
        with pytest.raises(GraincodeError) as error:
            Folder(str(tmp_path), size).open_reference(None, None)
        one_line(error, str(tmp_path / "1.png"), "in none of the formats that are read")


@pytest.mark.when("a path that is given in Python is a pipe or a device", "it is refused, and not waited for")
def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero", tmp_path, "a\0b.png"):
        with pytest.raises(GraincodeError, match="cannot be read as an image"):
            open_image(path)


def test_nothing_else_opens_images():
    source = Path(__file__).parents[2] / "src" / "graincode"
    assert [file.name for file in source.rglob("*.py") if "Image.open(" in file.read_text()] == ["decoding.py"]


@pytest.mark.parametrize("package", ["data", "evaluation", "interop", "networks"])
def test_nothing_that_is_read_starts_a_program(package):
    for file in (Path(__file__).parents[2] / "src" / "graincode" / package).rglob("*.py"):
        assert not re.search(r"\b(subprocess|os\.system|os\.popen|os\.exec\w+|os\.spawn\w+|pty)\b", file.read_text()), (
            file
        )
