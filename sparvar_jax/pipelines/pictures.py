"""Pictures and masks from files and arrays, as what the models take: the one reader.

Every encoding that Pillow opens is decided here, by its mode:

| mode | as a picture | as a mask |
| --- | --- | --- |
| 1 | black and white | True where white |
| L, P, RGB, RGBX, YCbCr, CMYK | RGB | light from 128 on |
| the same with alpha | laid on white, with a warning | only where opaque throughout |
| I;16 in any order, I | 65,535 is white | light from 32,768 on |
| F, LAB, HSV | refused | F as 0 and full, below |

A mask of any mode whose values are 0 and one of 1, 255 and 65,535 alone means False and True. Of
several frames the first is taken, with a warning. Colour profiles are not applied.
"""

from __future__ import annotations

import contextlib
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import ExifTags, Image, ImageOps

from sparvar_jax.weights.files import refuse_pointer
from sparvar_jax.weights.told import shown, told

MOST_PIXELS = 1 << 27
MOST_BYTES = 1 << 29
FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "TGA",
    "ICO", "ICNS", "PCX", "DDS", "SGI", "QOI", "PSD",
)  # fmt: skip
"""What is opened. The rest of Pillow's formats runs other programs or holds no pictures."""
LIGHT = 128

_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")
_PLAIN = ("1", "L", "P", "RGB", "RGBX", "YCbCr", "CMYK")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Picture(NamedTuple):
    """The middle square of a picture, RGB, in the model's size; (width, height) of the file."""

    pixels: UInt8[np.ndarray, "side side 3"]
    size: tuple[int, int]


def read_picture(path: str | Path, side: int) -> Picture:
    """A picture upright, cropped to its middle square and resized to the model's size.

    Raises ValueError with the file for one that is damaged, too large, or of a mode that has no one
    meaning as a picture.
    """
    path = Path(path)
    image = _opened(path)
    pixels = np.asarray(ImageOps.fit(_colours(image, path), (side, side)))
    return Picture(pixels, image.size)


def read_mask(
    path: str | Path, side: int, of: tuple[int, int] | None = None
) -> Bool[np.ndarray, "side side"]:
    """Where a mask is light, cropped and resized as its picture is.

    of: (width, height) of that picture; the mask has its size or its shape, or the model's size.
    Raises ValueError, too, where nothing or everything is selected, with the values there are.
    """
    path = Path(path)
    image = _opened(path)
    if of is not None:
        _require_shape(path, image.size, of, side)
    light = _light(image, path)
    square = ImageOps.fit(Image.fromarray(light), (side, side))
    selected = np.asarray(square) >= LIGHT
    if selected.all() or not selected.any():
        what = "everything" if selected.any() else "nothing"
        values = f"{int(light.min())} to {int(light.max())}"
        raise ValueError(
            f"{path} selects {what} of the picture's middle square: its values are {values} (of "
            f"255), and {LIGHT} or more is drawn; give a mask with dark and light places"
        )
    return selected


def region_of(region: Any, shape: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """A region given as an array: booleans, or whole numbers 0 and 1, or 0 and 255.

    shape: what it must have. ValueError for others.
    """
    values = np.asarray(region)
    if values.shape != shape:
        raise ValueError(f"the region is {values.shape}, the pictures are {shape}")
    if values.dtype == bool:
        return values
    found = np.unique(values) if np.issubdtype(values.dtype, np.integer) else np.zeros(0)
    if not len(found) or not (set(found.tolist()) <= {0, 1} or set(found.tolist()) <= {0, 255}):
        raise ValueError(
            "a region is an array of True and False, or of 0 and 1 or 0 and 255, got "
            f"{values.dtype} with {shown(found[:6].tolist())}: compare it with a threshold first"
        )
    return values > 0


def _opened(path: Path) -> Image.Image:
    """The decoded first frame, turned upright; ValueError for what cannot be read.

    Whatever a decoder raises means that the file is damaged: decoders fail in more ways than they
    name.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): give a picture") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is no file: give a picture")
    if found.st_size > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES >> 20} MiB: save it smaller")
    refuse_pointer(path)
    Image.init()
    try:
        with warnings.catch_warnings(), path.open("rb") as stream:
            warnings.simplefilter("ignore")  # told below, or without a meaning for pixels
            image = Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN])
            _require_size(path, image.size)
            frames = image.format in _ANIMATED and getattr(image, "is_animated", False)
            with _without_stderr() if image.format == "TIFF" else contextlib.nullcontext():
                image.load()  # libtiff writes what it finds to the process's own stderr
            _require_size(path, image.size)  # some formats choose among several while decoding
            upright = _upright(image)
    except Image.DecompressionBombError:
        raise ValueError(f"{path} has {_most()}: save it smaller") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture that can be read: save it as PNG") from None
    except _TooLarge as error:
        raise ValueError(str(error)) from None
    except MemoryError:
        raise ValueError(f"{path} does not fit into memory: save it smaller") from None
    except Exception as error:
        raise ValueError(
            f"{path} is damaged ({told(error, 120) or type(error).__name__}): save it anew"
        ) from None
    if frames:
        warnings.warn(f"{path} has several frames: the first is taken", stacklevel=3)
    return upright


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Nothing of this process reaches its stderr in the block."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _TooLarge(Exception):
    """A picture of more pixels than are read."""


def _most() -> str:
    return f"more than {MOST_PIXELS >> 20} megapixels"


def _require_size(path: Path, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MOST_PIXELS:
        raise _TooLarge(f"{path} has {size[0]}x{size[1]} pixels, {_most()}: save it smaller")


def _upright(image: Image.Image) -> Image.Image:
    """The picture as its camera held it."""
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _colours(image: Image.Image, path: Path) -> Image.Image:
    """A picture of any mode as RGB; see the table above."""
    if image.mode in _DEEP:
        return Image.fromarray(_eight_bits(image, path)).convert("RGB")
    if _has_alpha(image):
        layer = _with_alpha(image)
        if layer.getextrema()[3][0] == 255:  # type: ignore[index]
            return layer.convert("RGB")
        warnings.warn(f"{path} has transparent places: they are laid on white", stacklevel=3)
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if image.mode not in _PLAIN:
        raise ValueError(f"{path} has the mode {image.mode}: save it with 8 or 16 bits a colour")
    return image.convert("RGB")


def _light(image: Image.Image, path: Path) -> UInt8[np.ndarray, "height width"]:
    """A mask of any mode as 0 (dark) to 255 (light); see the table above."""
    if image.mode in (*_DEEP, "F"):
        values = np.asarray(image)
        found = _two_values(values)
        if found is not None:
            return found
        if image.mode == "F":
            raise ValueError(f"{path} holds fractions: save the mask with 8 bits, black and white")
        return _eight_bits(image, path)
    if _has_alpha(image):
        layer = _with_alpha(image)
        if layer.getextrema()[3][0] < 255:  # type: ignore[index]
            raise ValueError(
                f"{path} has transparent places, which may mean either: save the mask without "
                "transparency, light where to draw"
            )
        image = layer.convert("RGB")
    if image.mode not in _PLAIN:
        raise ValueError(f"{path} has the mode {image.mode}: save the mask with 8 bits")
    grey = np.asarray(image.convert("L"))
    found = _two_values(grey)
    return grey if found is None else found


def _two_values(values: np.ndarray) -> UInt8[np.ndarray, "height width"] | None:
    """A mask of 0 and one full value (1, 255, 65,535) as 0 and 255; None for others."""
    most = values.max()
    if most in (1, 255, 65535) and bool(((values == 0) | (values == most)).all()):
        return np.where(values > 0, np.uint8(255), np.uint8(0))
    return None


def _eight_bits(image: Image.Image, path: Path) -> UInt8[np.ndarray, "height width"]:
    """Greys of 16 bits in 8, rounded; ValueError for values outside of 16 bits."""
    if "transparency" in image.info:
        raise ValueError(f"{path} has 16 bits and transparent greys: save it with 8 bits")
    values = np.asarray(image).astype(np.int32)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"{path} has greys {low} to {high}: save it with 8 or 16 bits")
    return ((values + 128) // 257).astype(np.uint8)


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in _ALPHA or "transparency" in image.info


def _with_alpha(image: Image.Image) -> Image.Image:
    """Any mode with transparency as RGBA."""
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    return image.convert("RGBA")


def _require_shape(mask: Path, size: tuple[int, int], of: tuple[int, int], side: int) -> None:
    """ValueError unless a mask lies on its picture: sides may differ by the rounding of a pixel."""
    same = abs(size[0] * of[1] - size[1] * of[0]) <= max(of)
    if not same and size != (side, side):
        raise ValueError(
            f"{mask} has {size[0]}x{size[1]} pixels and the picture {of[0]}x{of[1]}: give a mask "
            f"of the picture's size, or of the model's, {side}x{side}"
        )
