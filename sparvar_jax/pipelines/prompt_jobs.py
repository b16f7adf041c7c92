"""Many prompts to a folder of pictures: resumable after a kill, and divided over processes.

Batches are cut from fixed places of the list, and a picture is a file that appears whole, so that
a job that is run again draws what is missing, and ends with the pictures of one never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sparvar_jax.pipelines import metadata
from sparvar_jax.pipelines.prompt_files import Entry
from sparvar_jax.runtime.hosts import Host
from sparvar_jax.runtime.progress import Progress
from sparvar_jax.weights.files import remove_temporaries, whole_file, writing
from sparvar_jax.weights.json_file import read_json
from sparvar_jax.weights.locks import locked
from sparvar_jax.weights.told import told

Draw = Callable[[Sequence[Entry]], UInt8[np.ndarray, "B height width 3"]]
"""Entries of one shape -> their pictures; must depend on nothing else."""
Describe = Callable[[Entry], Mapping[str, str]]
_JOB, _ENTRY = "job.json", "entry"


@dataclasses.dataclass(frozen=True)
class PromptJob:
    """What a job draws. settings: what else decides the pictures (model, plan), as text.

    batch: most pictures drawn together; the last of a run of one shape may be fewer.
    """

    entries: tuple[Entry, ...]
    batch: int = 1
    settings: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"a batch has at least one picture, got {self.batch}")

    @property
    def batches(self) -> tuple[tuple[int, ...], ...]:
        """The places of the entries that are drawn together, run by run of one shape."""
        found: list[tuple[int, ...]] = []
        places = range(len(self.entries))
        for _, run in itertools.groupby(places, lambda place: self.entries[place].shape):
            whole = tuple(run)
            found += [whole[i : i + self.batch] for i in range(0, len(whole), self.batch)]
        return tuple(found)

    def digest(self) -> str:
        """Tells jobs apart."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()

    def name_of(self, place: int) -> str:
        """Tells an entry's picture apart from every other one."""
        entry = json.dumps(dataclasses.asdict(self.entries[place]))
        text = json.dumps([self.settings, place, entry])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def drawer(pipe: Any, drawing: Mapping[str, Any]) -> tuple[Draw, Describe]:
    """What draws entries with a pipeline, and says so; what they say goes before `drawing`."""

    def draw(batch: Sequence[Entry]) -> UInt8[np.ndarray, "B height width 3"]:
        own: dict[str, Any] = {"size": batch[0].size, "aspect_ratio": batch[0].aspect_ratio}
        if batch[0].negative is not None:
            own["negative"] = [entry.negative for entry in batch]
        own = {name: value for name, value in own.items() if value is not None}
        seeds = [entry.seed for entry in batch]
        return pipe([entry.prompt for entry in batch], **{**drawing, **own, "seed": seeds})

    def describe(entry: Entry) -> dict[str, str]:
        told_of = {**drawing, **{k: v for k, v in vars(entry).items() if v is not None}}
        told_of |= {"model": pipe.model.name, "dtype": pipe.model.transformer.config.dtype}
        return {name: str(value) for name, value in told_of.items() if value is not None}

    return draw, describe


def picture_file(folder: Path, place: int) -> Path:
    """The picture of an entry."""
    return folder / f"{place:06d}.png"


def run_prompts(
    job: PromptJob,
    draw: Draw,
    out: str | Path,
    *,
    describe: Describe = lambda entry: {},
    host: Host = Host(),  # noqa: B008
    progress: Progress | None = None,
) -> int:
    """Draw what is missing of a job into a folder; returns how many pictures this process drew.

    Picture i is `i` in six digits; its metadata holds what `describe` says of its entry. `draw`
    always gets a full batch; what a short one repeats is thrown away. Raises ValueError where the
    folder holds another job, or another process with this one's part is at it.
    """
    out = Path(out)
    with claim(out, job, host):
        drawn, mine = 0, host.mine(range(len(job.batches)))
        for done, index in enumerate(mine, 1):
            drawn += draw_batch(job, index, draw, out, describe)
            if progress:
                progress("prompts", done, len(mine))
    return drawn


def draw_batch(job: PromptJob, index: int, draw: Draw, out: Path, describe: Describe) -> int:
    """Draw a batch of a job if a picture of it is missing; returns how many were."""
    places = job.batches[index]
    missing = [place for place in places if not _is_there(job, out, place)]
    if not missing:
        return 0
    padded = [*places, *([places[-1]] * (job.batch - len(places)))]
    pictures = draw([job.entries[place] for place in padded])
    for place, picture in zip(places, pictures, strict=False):
        if place in missing:
            told_of = {**describe(job.entries[place]), _ENTRY: job.name_of(place)}
            with whole_file(picture_file(out, place)) as temporary:
                metadata.write_png(temporary, picture, told_of)
    return len(missing)


def _is_there(job: PromptJob, out: Path, place: int) -> bool:
    """Whether an entry's picture is there and whole: its name is written in it."""
    try:
        return metadata.read_metadata(picture_file(out, place)).get(_ENTRY) == job.name_of(place)
    except (OSError, ValueError, SyntaxError):  # what damaged PNG files raise
        return False


@contextlib.contextmanager
def claim(out: Path, job: PromptJob, host: Host) -> Iterator[None]:
    """Hold the folder for this process's part of this job.

    The leading process holds what a process alone would hold, and tidies up before all begin.
    """
    if not host.leads:
        host.wait("claimed")
    with writing(out):
        out.mkdir(exist_ok=True)
    with locked(out / (".lock" if host.leads else f".lock-{host.index}")):
        _require_job(out / _JOB, job, host)
        if host.leads:
            remove_temporaries(out)
            host.wait("claimed")
        yield


def _require_job(file: Path, job: PromptJob, host: Host) -> None:
    """Write down which job the folder serves; ValueError where it serves another one."""
    if not file.exists() and host.leads:
        if any(file.parent.glob("[0-9]*.png")):
            raise ValueError(f"{file.parent} holds pictures of something else: name another folder")
        with whole_file(file) as temporary:
            text = json.dumps({"digest": job.digest(), "pictures": len(job.entries)})
            temporary.write_text(text, encoding="utf-8")
    found = read_json(file, f"remove {told(file.parent, 120)} to start over")
    if found.get("digest") != job.digest():
        raise ValueError(
            f"{file.parent} holds pictures of another job: repeat its prompts and options, or name "
            "another folder"
        )
