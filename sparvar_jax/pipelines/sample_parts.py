"""Finished batches of a sampling job on disk: one .npy file each, with its digest at the end."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sparvar_jax.weights.files import whole_file

_DIGEST = hashlib.sha256().digest_size


def path(folder: Path, index: int) -> Path:
    """The file of one batch."""
    return folder / f"{index:06d}.npy"


def save(folder: Path, index: int, pictures: UInt8[np.ndarray, "B height width 3"]) -> None:
    """Write one batch, whole or not at all."""
    content = io.BytesIO()
    np.lib.format.write_array(content, np.ascontiguousarray(pictures), allow_pickle=False)
    with whole_file(path(folder, index)) as temporary, temporary.open("wb") as stream:
        stream.write(content.getbuffer())
        stream.write(hashlib.sha256(content.getbuffer()).digest())


def load(folder: Path, index: int, count: int) -> UInt8[np.ndarray, "B height width 3"]:
    """The pictures of one batch; ValueError that names a file which is damaged or not there."""
    file = path(folder, index)
    try:
        content = file.read_bytes()
        payload = memoryview(content)[:-_DIGEST]
        if hashlib.sha256(payload).digest() != content[-_DIGEST:]:
            raise ValueError("its digest is another")
        pictures = np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error}): run the job again") from error
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or len(pictures) != count:
        raise ValueError(f"{file} is damaged (not {count} pictures): run the job again")
    return pictures


def find(folder: Path, batches: int, count: Callable[[int], int]) -> dict[int, tuple[int, ...]]:
    """Batch -> size of its pictures, of every batch that is there and whole; others are removed.

    count: how many pictures a batch must hold.
    """
    there = {entry.name for entry in folder.iterdir()}
    found = {}
    for index in range(batches):
        if path(folder, index).name in there:
            with contextlib.suppress(ValueError):
                found[index] = load(folder, index, count(index)).shape[1:]
            if index not in found:
                path(folder, index).unlink()
    shape = shared_shape(found)
    for index in [index for index, other in found.items() if other != shape]:
        del found[index]
        path(folder, index).unlink()
    return found


def shared_shape(found: Mapping[int, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The size most batches have; None without batches."""
    common = collections.Counter(found.values()).most_common(1)
    return common[0][0] if common else None
