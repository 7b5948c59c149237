"""Every picture that reaches the model is the one that was meant, in RGB; every other is refused by name."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from huatuo_vision.inputs import images
from huatuo_vision.inputs.images import load_image
from huatuo_vision.schema import BadSample, ImageRef

# Red above, blue below: a picture that shows when it is turned.
PHOTO = Image.fromarray(
    np.vstack([np.full((20, 60, 3), (200, 30, 30)), np.full((20, 60, 3), (30, 30, 200))]).astype(np.uint8)
)


def encode(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def load(data: bytes):
    return load_image(ImageRef(data=data), "row-7")


def refusal(ref: ImageRef) -> BadSample:
    with pytest.raises(BadSample) as caught:
        load_image(ref, "row-7")
    assert "'row-7'" in str(caught.value) and ref.name in str(caught.value)
    return caught.value


def png(width: int, height: int, depth: int = 1, colour: int = 0) -> bytes:
    """A PNG whose header promises width x height pixels and whose data is far too short for them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


# Legitimate pictures


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF", "PPM"])
def test_an_ordinary_picture_comes_back_as_it_is(image_format):
    loaded = load(encode(PHOTO, image_format))
    assert loaded.image.mode == "RGB" and loaded.notes == ()
    assert np.array_equal(loaded.image, PHOTO)


def test_a_jpeg_is_decoded_at_full_size_and_grey_becomes_rgb():
    loaded = load(encode(PHOTO.resize((600, 400)).convert("L"), "JPEG"))
    assert (loaded.image.size, loaded.image.mode, loaded.notes) == ((600, 400), "RGB", ())


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_the_orientation_in_exif_is_applied(image_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}[orientation]
    loaded = load(encode(PHOTO, image_format, exif=exif))
    upright = PHOTO.transpose(turn)
    assert loaded.notes == ("exif_rotated",) and loaded.image.size == upright.size
    assert np.abs(np.asarray(loaded.image, int) - np.asarray(upright, int)).mean() < 8


def test_exif_that_cannot_be_read_is_noted_and_the_picture_kept():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(PHOTO, "PNG", exif=exif)
    start = data.index(b"eXIf")
    length = struct.unpack(">I", data[start - 4 : start])[0]
    damaged = b"??" + data[start + 6 : start + 4 + length]
    chunk = b"eXIf" + damaged
    data = data[:start] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[start + 8 + length :]
    loaded = load(data)
    assert loaded.notes == ("unreadable_exif",) and loaded.image.size == PHOTO.size


def test_cmyk_as_adobe_stores_it_is_not_inverted():
    loaded = load(encode(PHOTO.convert("CMYK"), "JPEG", quality=95))
    assert loaded.notes == ("cmyk",)
    assert np.abs(np.asarray(loaded.image, int) - np.asarray(PHOTO, int)).mean() < 8


@pytest.mark.parametrize(
    "dtype, image_format", [(np.uint16, "PNG"), (np.uint16, "TIFF"), (np.int32, "TIFF"), (np.float32, "TIFF")]
)
def test_deep_grey_keeps_its_contrast(dtype, image_format):
    ramp = np.linspace(1000, 4095, 50).astype(dtype).reshape(1, 50).repeat(4, axis=0)
    loaded = load(encode(Image.fromarray(ramp), image_format))
    row = np.asarray(loaded.image)[0, :, 0]
    assert loaded.notes == ("16bit_rescaled",)
    assert row[0] == 0 and row[-1] == 255 and np.all(np.diff(row.astype(int)) > 0)
    # What this guards against: Pillow's own conversion makes all of it white.
    if dtype == np.int32:
        assert np.asarray(Image.fromarray(ramp).convert("L")).min() == 255


def test_a_deep_picture_of_one_value_and_one_with_gaps():
    assert np.asarray(load(encode(Image.fromarray(np.full((3, 3), 900, np.uint16)), "PNG")).image).max() == 0
    holes = np.array([[np.nan, 1.0, 2.0, np.inf]], np.float32)
    assert np.asarray(load(encode(Image.fromarray(holes), "TIFF")).image)[0, :, 0].tolist() == [0, 0, 255, 255]


def test_transparency_lies_over_white():
    half = PHOTO.convert("RGBA")
    half.putalpha(Image.fromarray(np.repeat([[0, 255]], 40, axis=0).repeat(30, axis=1).astype(np.uint8)))
    for data, notes in [
        (encode(half, "PNG"), ("alpha_over_white",)),
        (encode(half.convert("LA"), "PNG"), ("alpha_over_white",)),
        (encode(half.quantize(), "PNG"), ("palette", "alpha_over_white")),
    ]:
        loaded = load(data)
        assert loaded.notes == notes
        assert loaded.image.getpixel((0, 0)) == (255, 255, 255) and loaded.image.getpixel((59, 0)) != (255, 255, 255)


def test_palette_and_one_bit():
    loaded = load(encode(PHOTO.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"))
    assert loaded.notes == ("palette",) and np.array_equal(loaded.image, PHOTO)
    loaded = load(encode(PHOTO.convert("1", dither=Image.Dither.NONE), "PNG"))
    assert loaded.notes == ("1bit",) and set(np.unique(loaded.image)) <= {0, 255}


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_very_thin_pictures_load(size):
    assert load(encode(Image.new("RGB", size), "PNG")).image.size == size


def test_the_photograph_of_an_mpo_is_its_first_frame():
    data = encode(PHOTO, "MPO", save_all=True, append_images=[PHOTO.rotate(180)])
    loaded = load(data)
    assert loaded.notes == ("mpo_first_frame",)
    assert np.abs(np.asarray(loaded.image, int) - np.asarray(PHOTO, int)).mean() < 8


def test_pillows_own_limit_neither_warns_nor_refuses_below_ours(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(encode(PHOTO, "PNG")).image.size == PHOTO.size


# Refused pictures


def test_missing_files(tmp_path):
    bad = refusal(ImageRef(path=str(tmp_path / "röntgen 胸.jpg")))
    assert bad.reason == "missing_image" and "röntgen 胸.jpg" in str(bad) and "image_root" in str(bad)
    assert refusal(ImageRef(path=str(tmp_path))).reason == "missing_image"


def test_an_empty_file(tmp_path):
    (tmp_path / "a.jpg").touch()
    bad = refusal(ImageRef(path=str(tmp_path / "a.jpg")))
    assert bad.reason == "empty_image" and "0 bytes" in str(bad)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP", "JPEG2000"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_files_cut_short(image_format, kept):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, image_format)
    assert load(data).image.size == (64, 64)
    assert refusal(ImageRef(data=data[: int(len(data) * kept)])).reason == "unreadable_image"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize(
    "data", [b"<html>404</html>", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\0" * 99]
)
def test_files_that_are_no_picture(data):
    bad = refusal(ImageRef(data=data))
    assert bad.reason == "unreadable_image"
    assert data[:8].hex(" ") in str(bad) and "JPEG" in str(bad)


def test_a_picture_of_no_pixels():
    assert refusal(ImageRef(data=png(0, 5))).reason == "unreadable_image"


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_and_multi_page_files(image_format):
    data = encode(PHOTO, image_format, save_all=True, append_images=[PHOTO.rotate(180), PHOTO.rotate(90)])
    bad = refusal(ImageRef(data=data))
    assert bad.reason == "animated_image" and "3 frames" in str(bad)
    # A GIF of one frame is a picture like another.
    assert load(encode(PHOTO, image_format)).image.size == PHOTO.size


@pytest.mark.parametrize(
    "width, height",
    [
        (20_000, 20_000),  # above twice Pillow's limit: it refuses
        (12_000, 9_000),  # Pillow would only warn
        (30_000, 3),  # padded to a square: 900 million
    ],
)
def test_bombs_are_refused_before_a_pixel_is_decoded(width, height, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bad = refusal(ImageRef(data=png(width, height)))
    assert bad.reason == "image_too_large" and "100,000,000 pixels" in str(bad)


def test_a_colour_mode_without_a_way_to_rgb():
    bad = refusal(ImageRef(data=encode(PHOTO.convert("LAB"), "TIFF")))
    assert bad.reason == "unreadable_image" and "LAB" in str(bad)


# Zip archives, read in place


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "images_0.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("images/pmc_1_0.png", "images/图.png", "b.png"):
            file.writestr(name, encode(PHOTO, "PNG"))
        file.writestr("bomb.bmp", bytes(images.LARGE_ZIP_MEMBER + 1))
    return path


def test_members_of_an_archive(archive):
    for member in ("images/pmc_1_0.png", "images/图.png", "b.png"):
        assert np.array_equal(load_image(ImageRef(archive=str(archive), member=member), "s").image, PHOTO)
    assert refusal(ImageRef(archive=str(archive), member="images/pmc_2_0.png")).reason == "missing_image"
    assert refusal(ImageRef(archive=str(archive) + "x", member="b.png")).reason == "missing_image"


def test_a_zip_bomb_is_not_unpacked(archive, monkeypatch):
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *a, **k: pytest.fail("unpacked"))
    bad = refusal(ImageRef(archive=str(archive), member="bomb.bmp"))
    assert bad.reason == "image_too_large" and "zip bomb" in str(bad)


def test_a_member_that_lies_about_its_size_gives_no_more_than_it_says(tmp_path):
    path = tmp_path / "lies.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", bytes(3_000_000))
    data = path.read_bytes()
    assert data.count(struct.pack("<I", 3_000_000)) == 2
    path.write_bytes(data.replace(struct.pack("<I", 3_000_000), struct.pack("<I", 100)))
    tracemalloc.start()
    bad = refusal(ImageRef(archive=str(path), member="a.png"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bad.reason == "unreadable_image" and peak < 1_000_000


def test_an_archive_that_was_replaced_is_opened_anew(tmp_path):
    path = tmp_path / "images.zip"
    for time, photo in [(1_700_000_000, PHOTO), (1_700_000_001, PHOTO.rotate(180))]:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.bmp", encode(photo, "BMP"))
        os.utime(path, (time, time))
        assert np.array_equal(load_image(ImageRef(archive=str(path), member="a.bmp"), "s").image, photo)


def test_files_larger_than_memory_should_hold(tmp_path, monkeypatch):
    path = tmp_path / "huge.tif"
    with open(path, "wb") as file:
        file.truncate(images.MAX_ENCODED_BYTES + 1)
    assert refusal(ImageRef(path=str(path))).reason == "image_too_large"


@pytest.mark.parametrize("damage", ["flip", "cut", "no zip"])
def test_damaged_archives(archive, damage):
    data = bytearray(archive.read_bytes())
    if damage == "flip":
        data[60] ^= 0xFF
    archive.write_bytes({"flip": data, "cut": data[:-40], "no zip": b"hello"}[damage])
    assert refusal(ImageRef(archive=str(archive), member="images/pmc_1_0.png")).reason == "unreadable_image"
