"""Long sampling jobs: many pictures of many classes into one npz file, resumable after a kill.

Every picture has its own seed, given by its place in the job, and batches are cut from fixed
places. Finished batches are files that appear whole, so a job that is run again draws the missing
ones and ends with the same file as one that was never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from sparvar_jax.runtime.progress import Progress

Draw = Callable[[Sequence[int], Sequence[int]], UInt8[np.ndarray, "B height width 3"]]
"""(classes, seeds) of one batch -> pictures; must depend on nothing else."""

_JOB, _LOCK, _WHOLE = "job.json", "lock", "whole.npz"


@dataclasses.dataclass(frozen=True)
class SampleJob:
    """What a job draws: `per_class` pictures of every class, class after class.

    Picture i draws from `seed + i`. settings: whatever else decides the pictures (model, plan,
    guidance), as text; a job is resumed only with the same.
    """

    classes: tuple[int, ...]
    per_class: int
    batch: int = 64
    seed: int = 0
    settings: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"a job needs classes, each once, got {self.classes}")
        if self.per_class < 1 or self.batch < 1 or self.seed < 0:
            raise ValueError(
                "pictures a class and batch must be at least 1 and the seed at least 0, got "
                f"{self.per_class}, {self.batch} and {self.seed}"
            )

    @property
    def total(self) -> int:
        """Pictures of the whole job."""
        return len(self.classes) * self.per_class

    @property
    def batches(self) -> int:
        return -(-self.total // self.batch)

    @property
    def labels(self) -> Int[np.ndarray, "total"]:
        """The class of every picture."""
        return np.repeat(np.asarray(self.classes, np.int64), self.per_class)

    def places(self, index: int) -> range:
        """Which pictures a batch holds; the last batch may be short."""
        return range(index * self.batch, min((index + 1) * self.batch, self.total))

    def describe(self) -> str:
        """The job as one line of JSON, equal for equal jobs."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def parse_classes(text: str, count: int) -> tuple[int, ...]:
    """Classes from "all", or from numbers and ranges such as "0-9,207"; ValueError for others."""
    if text.strip() == "all":
        return tuple(range(count))
    classes: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item.strip())
        if match is None:
            raise ValueError(
                f"classes must be 'all', or numbers and ranges such as 0-9,207, got {text!r}"
            )
        classes += range(int(match[1]), int(match[2] or match[1]) + 1)
    outside = [c for c in classes if not 0 <= c < count]
    if outside or not classes:
        raise ValueError(f"classes must lie in 0..{count - 1}, got {outside or text!r}")
    return tuple(dict.fromkeys(classes))


def run_job(job: SampleJob, draw: Draw, out: str | Path, progress: Progress | None = None) -> bool:
    """Draw what is missing of a job and write `out`; False where `out` was complete already.

    The npz holds `arr_0` (pictures, uint8 [total, height, width, 3]), `arr_1` (classes) and `job`.
    Until it is whole, batches wait in the folder `<out>.parts`, which goes away in the end.
    `draw` always gets a full batch; what a short last batch repeats is thrown away.

    Raises ValueError where `out` or its parts belong to another job, or another process is at it.
    """
    out = Path(out)
    if out.suffix != ".npz":
        raise ValueError(f"samples go into a .npz file, got {out}")
    parts = out.with_name(out.name + ".parts")
    if out.exists():
        if _job_of(out) != job.describe():
            raise ValueError(f"{out} exists already and is of another job: name another file")
        shutil.rmtree(parts, ignore_errors=True)
        return False
    with _claim(parts, job):
        missing = [i for i in range(job.batches) if not _part(parts, i).exists()]
        for done, index in enumerate(missing, job.batches - len(missing) + 1):
            _save(_part(parts, index), _draw_batch(job, draw, index))
            if progress:
                progress("sample", done, job.batches)
        _join(job, parts, parts / _WHOLE)
        os.replace(parts / _WHOLE, out)
    shutil.rmtree(parts)
    return True


def _draw_batch(job: SampleJob, draw: Draw, index: int) -> UInt8[np.ndarray, "B height width 3"]:
    places = job.places(index)
    padded = [*places, *([places[-1]] * (job.batch - len(places)))]
    labels = [job.classes[place // job.per_class] for place in padded]
    pictures = np.asarray(draw(labels, [job.seed + place for place in padded]))
    if pictures.dtype != np.uint8 or pictures.shape[0] != job.batch or pictures.ndim != 4:
        raise ValueError(
            f"expected uint8 pictures [{job.batch}, height, width, 3], got {pictures.dtype} "
            f"{list(pictures.shape)}"
        )
    return pictures[: len(places)]


@contextlib.contextmanager
def _claim(parts: Path, job: SampleJob) -> Iterator[None]:
    """Hold the parts folder for this process and this job; the lock ends with the process."""
    try:
        parts.mkdir(exist_ok=True)
    except FileNotFoundError:
        raise ValueError(f"cannot write {parts}: its folder does not exist") from None
    with (parts / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is working on {parts}: let it finish") from None
        described = parts / _JOB
        if not described.exists():
            _write_whole(described, job.describe().encode())
        elif described.read_text() != job.describe():
            raise ValueError(
                f"{parts} holds batches of another job: repeat that job's options, or remove the "
                f"folder to start over; it was {described.read_text()}"
            )
        yield


def _part(parts: Path, index: int) -> Path:
    return parts / f"{index:06d}.npy"


def _save(file: Path, array: np.ndarray) -> None:
    temporary = file.with_suffix(".writing")
    with temporary.open("wb") as stream:
        np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def _write_whole(file: Path, content: bytes) -> None:
    temporary = file.with_suffix(".writing")
    temporary.write_bytes(content)
    os.replace(temporary, file)


def _join(job: SampleJob, parts: Path, target: Path) -> None:
    """One npz from all batches, a batch in memory at a time."""
    first = np.load(_part(parts, 0), mmap_mode="r")
    header = {
        "descr": np.lib.format.dtype_to_descr(first.dtype),
        "fortran_order": False,
        "shape": (job.total, *first.shape[1:]),
    }
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for index in range(job.batches):
                stream.write(np.load(_part(parts, index)).tobytes())
        for name, array in (("arr_1", job.labels), ("job", np.array(job.describe()))):
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


def _job_of(out: Path) -> str | None:
    """The job that made a file, None where that cannot be told."""
    try:
        with np.load(out, allow_pickle=False) as archive:
            return str(archive["job"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
