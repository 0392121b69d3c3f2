"""Image files and images of any mode and size, as a model sees them: upright, RGB, square."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from hermesflow.runtime.files import InputError, StrPath, read_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "TGA", "QOI", "PCX", "SGI")
"""Formats that are read; Pillow knows others whose reading starts a program, such as EPS."""
MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded: a small file can unpack to gigabytes. Pillow warns from here."""

ImageLike = StrPath | Image.Image | np.ndarray
"""The path of an image file, an image of Pillow, or pixels, uint8 [H, W, 3] or [H, W]."""
_Result = TypeVar("_Result")


def read_image(path: StrPath, size: int) -> np.ndarray:
    """Read an image file of any kind and size as the model sees it.

    Args:
        path: a file of one of FORMATS; of an animation the first frame is taken.
        size: see fit_image.
    Returns: RGB, uint8 [size, size, 3].
    Raises: InputError if the file is missing, no image, damaged, or has more than MAX_PIXELS pixels.
    """
    return decode_image(read_bytes(path), str(path), lambda image: fit_image(image, size))


def open_image(path: StrPath) -> Image.Image:
    """An image file as it is, upright, in its own mode and size. Raises: InputError as read_image."""
    return decode_image(read_bytes(path), str(path), _upright)


def decode_image(data: bytes, name: str, use: Callable[[Image.Image], _Result]) -> _Result:
    """What use makes of an image file's bytes, opened by Pillow; errors call it by its name.

    Raises: InputError if it is no image, damaged, or has more than MAX_PIXELS pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF data and the like
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise _too_large(name)
                return use(opened)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _too_large(name) from error
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise many types: OSError, SyntaxError, ValueError, struct.error ...
        raise InputError(f"{name}: not an image that can be read; give a whole PNG, JPEG or WebP file") from error


def as_image(image: ImageLike) -> Image.Image:
    """An image of any mode and size, whatever holds it.

    Raises: InputError as read_image, or if it is no path, no image of Pillow and no uint8 [H, W, 3] or [H, W].
    """
    if isinstance(image, Image.Image):
        try:
            image.load()
        except OSError as error:
            raise InputError(f"image: cannot be read ({error}); give a whole one") from error
        return image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size:
        if image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3):
            return Image.fromarray(image)
    if isinstance(image, str | os.PathLike):
        return open_image(image)
    kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
    raise InputError(f"image: expected a path, an image of Pillow or uint8 [H, W, 3], got {kind}; convert it")


def fit_image(
    image: Image.Image,
    size: int,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    whole: Callable[[float], int] = round,
) -> np.ndarray:
    """An image of any mode and size as the model sees it.

    It is turned upright by its EXIF orientation, laid on white where it is transparent, resized so that its shorter
    side is `size`, and cropped at the center; one of size x size keeps its pixels.

    Args:
        image: the image. Grey of 16 bits and integers (mode I) go from 0 to 65,535; floats (mode F) from 0 to 1, or to
            255 where one is above 1.
        size: the side in pixels.
        resample: how it is resized.
        whole: makes the crop's offset a whole number of pixels.
    Returns: RGB, uint8 [size, size, 3].
    Raises: ValueError on floats that are not finite; whatever Pillow raises on a damaged file.
    Source: torchvision's Resize(size) and CenterCrop(size), as Show-o's training/utils.py composes them.
    """
    image = upright_rgb(image)
    width, height = image.size
    # The longer side is rounded down, and the offset half to even, as torchvision does.
    new_width, new_height = (size if side == min(image.size) else size * side // min(image.size) for side in image.size)
    left, top = whole((new_width - size) / 2), whole((new_height - size) / 2)
    crop = (left, top, left + size, top + size)
    if new_width * new_height <= MAX_PIXELS:
        return np.array(image.resize((new_width, new_height), resample).crop(crop))
    # A long thin image would grow to gigabytes; the crop alone is the same but for rounding between Pillow's passes.
    scales = (width / new_width, height / new_height) * 2
    box = tuple(edge * scale for edge, scale in zip(crop, scales, strict=True))
    return np.array(image.resize((size, size), resample, box=box))


def pad_image(image: Image.Image, size: int, fill: int) -> np.ndarray:
    """As fit_image, but the longer side becomes `size`, and grey of the level fill stands around the image."""
    image = upright_rgb(image)
    width, height = (max(1, round(size * side / max(image.size))) for side in image.size)
    padded = Image.new("RGB", (size, size), (fill, fill, fill))
    padded.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2))
    return np.array(padded)


def resize_images(images: np.ndarray, size: int) -> np.ndarray:
    """Square images of one size as another: whole multiples by repeating pixels, the rest by averages or bicubic.

    Args:
        images: uint8 [n, side, side, 3].
        size: the wanted side; images of that size are returned as they are.
    Returns: uint8 [n, size, size, 3].
    """
    side = images.shape[1]
    if side == size or not len(images):
        return images
    if size % side == 0:
        return images.repeat(size // side, axis=1).repeat(size // side, axis=2)
    method = Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), method)) for image in images])


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, turned upright, on white where it is transparent; see fit_image."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow would clip at 255
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65_535) // 257).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(_check_finite(image))
        top = 255 if values.max() <= 1 else 1
        image = Image.fromarray(np.clip(values * top, 0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    image = _check_finite(ImageOps.exif_transpose(image)).copy()
    image.info.pop("exif", None)  # done with, and where it is damaged the next to read it would stumble
    return image


def _check_finite(image: Image.Image) -> Image.Image:
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ValueError("fit_image: expected finite values, got NaN or infinity; write the image anew")
    return image


def _too_large(name: str) -> InputError:
    return InputError(f"{name}: has more than {MAX_PIXELS:,} pixels; give a smaller image")
