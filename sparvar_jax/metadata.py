"""PNG files that say how they were made: prompt, seed, plan and versions as text chunks.

Files appear whole or not at all: they are written under a temporary name and renamed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator, Mapping
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


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends without an error.

    The temporary file is made at once, so that a folder that is missing or cannot be written to
    is reported before the work and not after it. Raises ValueError in these cases.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: expected the name of a file to write")
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    except FileNotFoundError:
        raise ValueError(f"cannot write {path}: folder {path.parent} does not exist") from None
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; choose a folder you may write to"
        ) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; give what an ordinary write would have given.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_png(
    path: str | Path, pixels: UInt8[ndarray, "height width 3"], metadata: Mapping[str, str]
) -> None:
    """Write an RGB picture to an open path (see `whole_file`) with its metadata."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    Image.fromarray(pixels).save(path, format="PNG", pnginfo=info)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a picture written by `write_png`; ValueError if the file is not a PNG."""
    with Image.open(path) as image:
        if not isinstance(image, PngImageFile):
            raise ValueError(f"{path} is not a PNG file, but {image.format}")
        return {key: str(value) for key, value in image.text.items()}
