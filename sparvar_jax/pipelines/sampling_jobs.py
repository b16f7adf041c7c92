"""Long sampling jobs: many pictures of many classes into one npz file, resumable after a kill.

Every picture has its own seed, given by its place in the job, and batches are cut from fixed
places. Finished batches are files that appear whole, so a job that is run again draws the missing
ones and ends with the same file as one that was never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from sparvar_jax.pipelines import sample_parts
from sparvar_jax.runtime.hosts import Host
from sparvar_jax.runtime.progress import Progress
from sparvar_jax.weights.files import remove_temporaries, sync, whole_file
from sparvar_jax.weights.json_file import read_json
from sparvar_jax.weights.locks import locked
from sparvar_jax.weights.numbers import whole
from sparvar_jax.weights.told import shown, told

Draw = Callable[[Sequence[int], Sequence[int]], UInt8[np.ndarray, "B height width 3"]]
"""(classes, seeds) of one batch -> pictures; must depend on nothing else."""

MOST_PICTURES = 10_000_000
MOST_IN_A_BATCH = 65_536
_JOB, _LOCK, _WHOLE = "job.json", "lock", "whole.npz"
_LONGEST_NAME = 255
_MOST_JOB = 64 << 20


@dataclasses.dataclass(frozen=True)
class SampleJob:
    """What a job draws: `per_class` pictures of every class, class after class.

    Picture i draws from `seed + i`. settings: whatever else decides the pictures (model, plan,
    guidance), as text; a job is resumed only with the same.
    """

    classes: Sequence[int]
    per_class: int
    batch: int = 64
    seed: int = 0
    settings: Sequence[Sequence[str]] = ()

    def __post_init__(self):
        for name in ("per_class", "batch", "seed"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"a job needs classes, each once, got {told(self.classes, 80)}")
        if self.per_class < 1 or self.batch < 1 or self.seed < 0:
            raise ValueError(
                "pictures a class and batch must be at least 1 and the seed at least 0, got "
                f"{shown(self.per_class)}, {shown(self.batch)} and {shown(self.seed)}"
            )
        if self.total > MOST_PICTURES or self.batch > MOST_IN_A_BATCH:
            raise ValueError(
                f"a job has at most {MOST_PICTURES} pictures in batches of at most "
                f"{MOST_IN_A_BATCH}, got {told(self.total, 20)} in batches of "
                f"{told(self.batch, 20)}: draw several files"
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
    classes: dict[int, None] = {}
    for item in text.split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", item.strip())
        if match is None:
            raise ValueError(
                "classes must be 'all', or numbers and ranges such as 0-9,207, "
                f"got {told(text, 60)!r}"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= count:  # by their ends: ranges can be of any length
            raise ValueError(f"classes must lie in 0..{count - 1}, got {match[0]}")
        classes |= dict.fromkeys(range(first, last + 1))
    return tuple(classes)


def run_job(
    job: SampleJob,
    draw: Draw,
    out: str | Path,
    progress: Progress | None = None,
    host: Host = Host(),  # noqa: B008
) -> bool:
    """Draw what is missing of a job and write `out`; False where `out` was complete already.

    The npz holds `arr_0` (pictures, uint8 [total, height, width, 3]), `arr_1` (classes) and `job`.
    Until it is whole, batches wait in the folder `<out>.parts`, which goes away in the end; batches
    that are damaged are drawn again. `draw` always gets a full batch; what a short last batch
    repeats is thrown away. host: of several processes that share the folder of `out`, each draws
    its part, and the first joins them.

    Raises ValueError where `out` or its parts belong to another job, or another process is at it.
    """
    out = Path(out)
    if out.suffix != ".npz":
        raise ValueError(f"samples go into a .npz file, got {out}")
    folder = parts_folder(out)
    if out.exists():
        if _job_of(out) != job.describe():
            raise ValueError(
                f"{out} exists already and is damaged or of another job: name another file"
            )
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)
        return False
    with _claim(folder, job, host):
        found = sample_parts.find(folder, job.batches, lambda index: len(job.places(index)))
        host.wait("found")  # damaged batches are gone before others are drawn
        shape = sample_parts.shared_shape(found)
        missing = host.mine(index for index in range(job.batches) if index not in found)
        for done, index in enumerate(missing, job.batches - len(missing) + 1):
            pictures = _draw_batch(job, draw, index, shape)
            shape = shape or pictures.shape[1:]
            sample_parts.save(folder, index, pictures)
            if progress:
                progress("sample", done, job.batches)
        host.wait("drawn")
        if not host.leads:
            return True
        with whole_file(folder / _WHOLE) as temporary:
            _join(job, folder, temporary)
        os.replace(folder / _WHOLE, out)
        sync(out.parent)
        shutil.rmtree(folder, ignore_errors=host.count > 1)  # the others remove their locks
    return True


def parts_folder(out: Path) -> Path:
    """Where the batches of a file wait: a name beside it, hashed where it would be too long."""
    name = f"{out.name}.parts"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".sparvar-{hashlib.sha256(os.fsencode(out.name)).hexdigest()[:32]}.parts"
    return out.with_name(name)


def _draw_batch(
    job: SampleJob, draw: Draw, index: int, shape: tuple[int, ...] | None
) -> UInt8[np.ndarray, "B height width 3"]:
    places = job.places(index)
    padded = [*places, *([places[-1]] * (job.batch - len(places)))]
    labels = [job.classes[place // job.per_class] for place in padded]
    pictures = np.asarray(draw(labels, [job.seed + place for place in padded]))
    fits = pictures.ndim == 4 and shape in (None, pictures.shape[1:])
    if pictures.dtype != np.uint8 or pictures.shape[0] != job.batch or not fits:
        raise ValueError(
            f"expected uint8 pictures [{job.batch}, height, width, 3] of one size, got "
            f"{pictures.dtype} {list(pictures.shape)}"
        )
    return pictures[: len(places)]


@contextlib.contextmanager
def _claim(folder: Path, job: SampleJob, host: Host) -> Iterator[None]:
    """Hold the parts folder for this process and this job; the lock ends with the process.

    The first of several processes tidies up before the others begin.
    """
    if not host.leads:
        host.wait("claimed")
        with locked(folder / f"{_LOCK}-{host.index}"):
            _require_job(folder / _JOB, job)
            yield
        return
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError:
        raise ValueError(f"cannot write {folder}: its folder does not exist") from None
    except OSError as error:
        raise ValueError(
            f"cannot write {folder} ({error.strerror}): choose a folder you may write to"
        ) from error
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
        raise ValueError(f"{folder} is a link or another user's: remove it, or name another file")
    with locked(folder / _LOCK):
        remove_temporaries(folder)
        _require_job(folder / _JOB, job)
        host.wait("claimed")
        yield


def _require_job(file: Path, job: SampleJob) -> None:
    """Write down which job the folder serves; ValueError where it serves another one."""
    if not file.exists():
        with whole_file(file) as temporary:
            temporary.write_text(job.describe(), encoding="utf-8")
        return
    mend = "repeat that job's options, or remove the folder to start over"
    found = read_json(file, f"remove {told(file.parent, 120)} to start over", _MOST_JOB)
    if json.dumps(found, sort_keys=True) != job.describe():
        raise ValueError(
            f"{file.parent} holds batches of another job: {mend}; it was "
            f"{told(json.dumps(found, sort_keys=True), 200)}"
        )


def _join(job: SampleJob, folder: Path, target: Path) -> None:
    """One npz from all batches, a batch in memory at a time."""
    first = sample_parts.load(folder, 0, len(job.places(0)))
    header = {
        "descr": np.lib.format.dtype_to_descr(first.dtype),
        "fortran_order": False,
        "shape": (job.total, *first.shape[1:]),
    }
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for index in range(job.batches):
                pictures = sample_parts.load(folder, index, len(job.places(index)))
                stream.write(pictures.tobytes())
        for name, array in (("arr_1", job.labels), ("job", np.array(job.describe()))):
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


def _job_of(out: Path) -> str | None:
    """The job that made a file, None where that cannot be told."""
    try:
        with zipfile.ZipFile(out) as archive:
            entry = archive.getinfo("job.npy")
            if entry.file_size > _MOST_JOB or entry.compress_type != zipfile.ZIP_STORED:
                return None
            with archive.open(entry) as stream:
                np.lib.format.read_magic(stream)
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
                if shape != () or dtype.kind != "U" or dtype.itemsize > entry.file_size:
                    return None
                return str(np.frombuffer(stream.read(dtype.itemsize), dtype)[0])
    except Exception:  # zipfile and numpy fail in many ways at what is damaged
        return None
