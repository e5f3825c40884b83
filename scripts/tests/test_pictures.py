"""Every reader of pictures x every kind that Pillow opens: what a person sees, and never a white page in place of 16-bit grey."""

import importlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

GREY = np.linspace(0, 255, 28 * 28).reshape(28, 28).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY.T], axis=2)
WHITE = np.full((28, 28, 3), 255, np.uint8)
UPRIGHT = np.rot90(COLOUR, -1)


def grey(values, dtype):
    return Image.fromarray((values.astype(float) / 255 * {"float32": 1, "uint16": 65535, "int32": 65535}[dtype]).round(7).astype(dtype))


def transparent(mode):
    image = Image.fromarray(COLOUR).convert(mode)
    image.putalpha(0)
    return image


def turned():
    exif = Image.Exif()
    exif[0x112] = 6
    return {"exif": exif}


RGB = Image.fromarray(COLOUR)
KINDS = {  # a file's name: (picture, options of its saving, what is to be seen)
    "i16.png": (grey(GREY, "uint16"), {}, GREY), "i16.tiff": (grey(GREY, "uint16"), {}, GREY), "i32.tiff": (grey(GREY, "int32"), {}, GREY),
    "f.tiff": (grey(GREY, "float32"), {}, GREY), "l.png": (Image.fromarray(GREY), {}, GREY), "rgb.bmp": (RGB, {}, COLOUR),
    "rgba.png": (transparent("RGBA"), {}, WHITE), "la.png": (transparent("LA"), {}, WHITE), "cmyk.tiff": (RGB.convert("CMYK"), {}, COLOUR),
    "palette.png": (Image.fromarray(GREY).convert("P"), {"transparency": bytes(256)}, WHITE),
    "white.gif": (Image.new("P", (28, 28), 7), {"transparency": 7}, WHITE),
    "exif.png": (RGB, turned(), UPRIGHT), "exif.webp": (RGB, turned() | {"lossless": True}, UPRIGHT),
    "moving.webp": (RGB, {"save_all": True, "append_images": [RGB.rotate(90)], "lossless": True}, COLOUR),
}


def p2_folder(path):
    return importlib.import_module("p2_ddim.data").read_faces(path.parent, 28)[0]


def p3_folder(path):
    return np.asarray(next(iter(importlib.import_module("p3_clip_textual_inversion.pictures").read_pictures(path.parent)[0].values())))


def p3_clip(path):
    transform = lambda picture: importlib.import_module("torch").from_numpy(np.asarray(picture).copy())  # noqa: E731
    return next(iter(importlib.import_module("p3_clip_textual_inversion.clip").load_pictures([path], transform, 1)))[0].numpy()


READERS = {
    "P1 digit": lambda path: importlib.import_module("p1_cfg_ddpm.data").read_image(path), "P2 face": p2_folder,
    "P2 grade": lambda path: importlib.import_module("p2_ddim.evaluate").read_pixels(path), "P3 example": p3_folder, "P3 classified": p3_clip,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_to_be_seen(tmp_path, reader, kind):
    image, options, expected = KINDS[kind]
    image.save(tmp_path / kind, **options)
    expected = expected if expected.ndim == 3 else np.stack([expected] * 3, axis=2)
    found = np.asarray(READERS[reader](tmp_path / kind)).astype(int)
    assert found.shape == (28, 28, 3) and np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("reader", READERS)
def test_a_bomb_is_refused(tmp_path, reader):
    """A file of a hundred bytes that claims a gigapixel."""
    Image.new("1", (8, 8)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[16:24] = struct.pack(">II", 40_000, 40_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(Exception, match=r"(1600000000 pixels|has no readable picture)"):
        READERS[reader](tmp_path / "a.png")


@pytest.mark.parametrize("package", ["p1_cfg_ddpm", "p2_ddim", "p3_clip_textual_inversion"])
def test_a_phones_pictures_are_told_apart(tmp_path, capsys, package):
    pictures = importlib.import_module(f"{package}.pictures")
    (tmp_path / "IMG_9.HEIC").write_bytes(b"....ftypheic")
    refused = importlib.import_module(f"{package}.files").UserError
    with pytest.raises(refused, match=r"has no readable picture \(not IMG_9\.HEIC; HEIC is not read: export JPEG\)"):
        pictures.read_pictures(tmp_path)
    RGB.save(tmp_path / "a.png")
    assert list(pictures.read_pictures(tmp_path)[0]) == ["a.png"] and "HEIC is not read: export JPEG" in capsys.readouterr().err
