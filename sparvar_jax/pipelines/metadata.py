"""PNG files that say how they were made: prompt, seed, plan and versions as text chunks."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
from collections.abc import Mapping
from pathlib import Path

from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from sparvar_jax import __version__

_PACKAGES = ("jax", "flax", "numpy")


def versions() -> dict[str, str]:
    """Versions of this package and of what decides its numbers."""
    found = {"sparvar-jax": __version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_png(
    path: str | Path, pixels: UInt8[ndarray, "height width 3"], metadata: Mapping[str, str]
) -> None:
    """Write an RGB picture to an open path (see `files.whole_file`) with its metadata."""
    Path(path).write_bytes(png_bytes(pixels, metadata))


def png_bytes(
    pixels: UInt8[ndarray, "height width 3"],
    metadata: Mapping[str, str],
    *,
    effort: int | None = None,
) -> bytes:
    """The file of an RGB picture with its metadata.

    effort: of the compression, 0 to 9; None is the library's own.
    """
    info, file = PngInfo(), io.BytesIO()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    options = {} if effort is None else {"compress_level": effort}
    Image.fromarray(pixels).save(file, format="PNG", pnginfo=info, **options)
    return file.getvalue()


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a picture written by `write_png`; ValueError if the file is not a PNG."""
    with Image.open(path) as image:
        if not isinstance(image, PngImageFile):
            raise ValueError(f"{path} is not a PNG file, but {image.format}")
        return {key: str(value) for key, value in image.text.items()}
