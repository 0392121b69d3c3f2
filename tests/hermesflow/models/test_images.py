"""Images of every mode, size and orientation as the model sees them, and a line for every file that is none."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from hermesflow.models import images
from hermesflow.models.images import MAX_PIXELS, decode_image, fit_image, open_image, read_image, resize_images
from hermesflow.runtime.files import InputError

SIZE = 16
RED = (200, 40, 90)
GREY = 100


def plain(mode, value, size=(SIZE, SIZE)):
    return Image.new(mode, size, value)


def array(dtype, value):
    return Image.fromarray(np.full((SIZE, SIZE), value, dtype))


def palette(transparency=None):
    image = plain("P", 1)
    image.putpalette([0, 0, 0, *RED])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def with_info(image, **info):
    image.info.update(info)
    return image


WHITE = (255, 255, 255)
MODES = {
    "RGB": (plain("RGB", RED), RED),
    "RGB, one color transparent": (with_info(plain("RGB", RED), transparency=RED), WHITE),
    "RGBA, opaque": (plain("RGBA", (*RED, 255)), RED),
    "RGBA, clear": (plain("RGBA", (*RED, 0)), WHITE),
    "RGBA, half clear": (plain("RGBA", (0, 0, 0, 128)), (127, 127, 127)),
    "LA, opaque": (plain("LA", (GREY, 255)), (GREY,) * 3),
    "LA, clear": (plain("LA", (GREY, 0)), WHITE),
    "palette": (palette(), RED),
    "palette, another color transparent": (palette(0), RED),
    "palette, transparent": (palette(1), WHITE),
    "palette, transparency as bytes": (palette(b"\xff\x00"), WHITE),
    "1 bit": (plain("1", 1), WHITE),
    "grey": (plain("L", GREY), (GREY,) * 3),
    "grey, transparent": (with_info(plain("L", GREY), transparency=GREY), WHITE),
    "16-bit grey": (array(np.uint16, GREY * 257), (GREY,) * 3),
    "integers": (array(np.int32, GREY * 257), (GREY,) * 3),
    "integers out of range": (array(np.int32, -5), (0, 0, 0)),
    "floats to 1": (array(np.float32, GREY / 255), (GREY,) * 3),
    "floats to 255": (array(np.float32, GREY), (GREY,) * 3),
    "CMYK": (plain("CMYK", (55, 215, 165, 0)), RED),
    "YCbCr": (plain("RGB", (GREY,) * 3).convert("YCbCr"), (GREY,) * 3),
}


@pytest.mark.parametrize(("image", "color"), MODES.values(), ids=MODES.keys())
def test_every_mode_becomes_rgb(image, color):
    pixels = fit_image(image, SIZE)
    assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.uint8
    assert (pixels == color).all()


FORMATS = {
    "png": "RGB", "bmp": "RGB", "tiff": "CMYK", "webp": "RGBA", "ppm": "RGB", "gif": "L", "png 16": "I;16",
    "tiff float": "F", "jpeg": "CMYK",
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_files_of_many_formats(kind, tmp_path):
    deep = FORMATS[kind] == "I;16"
    image = array(np.uint16, GREY * 257) if deep else plain("RGB", (GREY,) * 3).convert(FORMATS[kind])
    image.save(tmp_path / "image", format=kind.partition(" ")[0])
    assert abs(read_image(tmp_path / "image", 8).astype(int) - GREY).max() <= 1


def torchvision_fit(image, size):
    """Resize(size) and CenterCrop(size) as torchvision's source has them."""
    width, height = image.size
    short, long = sorted(image.size)
    new_long = int(size * long / short)
    new = (size, new_long) if width <= height else (new_long, size)
    resized = np.array(image.resize(new, Image.Resampling.BICUBIC))
    top, left = (int(round((side - size) / 2.0)) for side in resized.shape[:2])
    return resized[top : top + size, left : left + size]


SIZES = [(1, 1), (SIZE, SIZE), (SIZE, 17), (17, SIZE), (19, SIZE), (40, 23), (100, 100), (301, 77), (7, 5), (2, 3),
         (1, 5000), (5000, 1), (5000, 3), (1200, 900)]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=[f"{width}x{height}" for width, height in SIZES])
def test_geometry_is_that_of_torchvision(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    np.testing.assert_array_equal(fit_image(image, SIZE), torchvision_fit(image, SIZE))


def test_an_image_of_the_right_size_keeps_its_pixels():
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit_image(Image.fromarray(noise), SIZE), noise)


@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
def test_a_long_thin_image_does_not_grow(turned, monkeypatch):
    row = (127 + 120 * np.sin(np.arange(5000) / 9))[None, :, None].repeat(3, 2).astype(np.uint8)
    image = Image.fromarray(row.transpose(1, 0, 2) if turned else row)
    expected = fit_image(image, 64).astype(int)
    sides = []
    resize = Image.Image.resize

    def noting_resize(self, size, *more, **named):
        sides.extend(size)
        return resize(self, size, *more, **named)

    monkeypatch.setattr(Image.Image, "resize", noting_resize)
    monkeypatch.setattr(images, "MAX_PIXELS", 1_000_000)
    assert abs(fit_image(image, 64) - expected).max() <= 1
    assert sides == [64, 64]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    upright = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    # What a camera stores, so that turning it as the tag says gives the upright image.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png", SIZE), upright)
    np.testing.assert_array_equal(open_image(tmp_path / "turned.png"), upright)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_the_first_frame_of_an_animation(kind, tmp_path):
    frames = [plain("RGB", RED), plain("RGB", (0, 0, 255))]
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / "moving", format=kind, save_all=True, append_images=frames[1:], **options)
    assert (read_image(tmp_path / "moving", SIZE) == RED).all()


def png_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def png_of_size(width, height):
    """A PNG whose header promises a size, with nearly no data."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


WHOLE = png_bytes(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
DAMAGED = {
    "empty": (b"", "not an image that can be read"),
    "text": (b"no image", "not an image that can be read"),
    "cut": (WHOLE[:2000], "not an image that can be read"),
    "header": (WHOLE[:20], "not an image that can be read"),
    "flipped": (WHOLE[:3000] + bytes([WHOLE[3000] ^ 255]) + WHOLE[3001:], "not an image that can be read"),
    "large": (png_of_size(9460, 9460), f"has more than {MAX_PIXELS:,} pixels; give a smaller image"),
    "bomb": (png_of_size(60_000, 60_000), f"has more than {MAX_PIXELS:,} pixels; give a smaller image"),
    "no data": (png_of_size(64, 64), "not an image that can be read"),
}


@pytest.mark.parametrize(("data", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_what_is_no_image_is_named(data, message, tmp_path, recwarn):
    path = tmp_path / "mine.png"
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"mine.png: {message}") as error:
        read_image(path, SIZE)
    assert "\n" not in str(error.value) and not recwarn.list
    with pytest.raises(InputError, match=f"mine.png: {message}"):
        open_image(path)
    with pytest.raises(InputError, match=f"record a: {message}"):
        decode_image(data, "record a", lambda image: fit_image(image, SIZE))


def test_the_limit_holds_whatever_pillow_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(InputError, match="has more than"):
        decode_image(png_of_size(9460, 9460), "mine.png", lambda image: fit_image(image, SIZE))


def test_formats_whose_reading_starts_a_program_are_refused(tmp_path, monkeypatch):
    plain("RGB", RED).save(tmp_path / "mine.eps")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(InputError, match="mine.eps: not an image that can be read"):
        read_image(tmp_path / "mine.eps", SIZE)


def test_odd_metadata_of_a_whole_image_says_nothing(tmp_path, recwarn):
    plain("RGB", RED).save(tmp_path / "mine.png", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    assert (read_image(tmp_path / "mine.png", SIZE) == RED).all() and not recwarn.list


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="none.png: no such file"):
        read_image(tmp_path / "none.png", SIZE)


def test_floats_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="expected finite values, got NaN or infinity"):
        fit_image(array(np.float32, np.nan), SIZE)


def saved(kind, image, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return bytearray(buffer.getvalue())


@pytest.mark.parametrize("kind", images.FORMATS)
def test_whatever_the_bytes_there_is_an_image_or_one_line(kind):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    whole, outcomes = saved(kind, noise), set()
    for _ in range(60):
        data = whole.copy()
        for place in rng.integers(0, min(len(data), 300), rng.integers(1, 4)):
            data[place] = rng.integers(256)
        if rng.random() < 0.3:
            del data[rng.integers(len(data)) :]
        try:
            pixels = decode_image(bytes(data), "mine", lambda image: fit_image(image, SIZE))
            assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.uint8
            outcomes.add("image")
        except InputError as error:
            assert str(error).startswith("mine: ") and "\n" not in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


@pytest.mark.parametrize("size", [4, 8, 16, 6, 20], ids=lambda size: f"8-to-{size}")
def test_images_of_one_size_as_another(size):
    """A picture of four squares stays one: whole multiples in every pixel, other sizes away from the edges."""
    squares = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], dtype=np.uint8)
    image = squares.repeat(4, axis=0).repeat(4, axis=1)
    (resized,) = resize_images(image[None], size)
    assert resized.shape == (size, size, 3) and resized.dtype == np.uint8
    if size % 8 == 0 or 8 % size == 0:
        assert (resized == squares.repeat(size // 2, axis=0).repeat(size // 2, axis=1)).all()
    assert (resized[[0, 0, -1, -1], [0, -1, 0, -1]].astype(int) - squares.reshape(4, 3) < 16).all()
