"""How a part joins a model directory: built aside, moved in, entered into both JSON files.

One process at a time writes to a directory. What a finished part brings is first written to a
journal, so that the next run can complete a joining that was killed between its steps.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparvar_jax.weights import files
from sparvar_jax.weights.description import (
    CONFIG,
    FORMAT,
    MANIFEST,
    PARTS,
    read_config,
    read_manifest,
    write_json,
)
from sparvar_jax.weights.json_file import JsonObject, read_json, require_objects
from sparvar_jax.weights.locks import locked
from sparvar_jax.weights.told import told

_LOCK, _JOURNAL = ".lock", ".joining.json"
_BUILT = "_CHECKPOINT_METADATA"  # a file of every part that `convert` wrote
_ENTRIES = ("config", "source", "defaults", "others")


@dataclass
class NewPart:
    """A part under construction: the folder to build, and what the model's JSON files will say.

    `config` is the part's entry in `config.json` (its `kind` and the config fields), `source` its
    entry in `manifest.json`, `defaults` joins the defaults of `config.json`. `others` replaces
    entries of parts that are there already.
    """

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@contextmanager
def new_part(model: str | Path, part: str) -> Iterator[NewPart]:
    """Build a part; it joins the model directory when the block ends without an error.

    Waits for another process that writes to the directory. Whatever happens inside, no half-written
    part is left behind, nor a model directory that this call created; what a killed run left is
    completed or removed. Raises ValueError where the part exists or the place cannot be written.
    """
    model = Path(model)
    if part not in PARTS:
        raise ValueError(f"a model has the parts {PARTS}, got {part!r}")
    with _held(model):
        _complete(model, part)
        _require_free(model, part)
        with _stage(model) as stage:
            building = NewPart(stage / part)
            yield building
            try:
                _join(model, part, building, stage)
            except OSError as error:
                raise _no_writing(model, error) from error


def _require_free(model: Path, part: str) -> None:
    """ValueError where the part is there; one that no JSON file names is a stopped run's."""
    target = model / part
    present = read_config(model) if (model / CONFIG).exists() else {}
    if target.is_symlink() or target.exists():
        if part in present or not (target / _BUILT).is_file():
            raise ValueError(f"{target} exists already: remove it first, or choose another folder")
        warnings.warn(f"{target} was left by a run that was stopped: it is replaced", stacklevel=4)


@contextmanager
def _held(model: Path) -> Iterator[None]:
    """The directory, made where it is missing, and its lock; it goes again if it stays empty."""
    created: list[Path] = []
    with contextlib.ExitStack() as exits:
        exits.callback(_remove_empty, created)
        try:
            while True:
                created += [p for p in (model, *model.parents) if not p.exists()]
                model.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # removed by a run that failed
                    exits.enter_context(locked(model / _LOCK, wait=True))
                    break
        except OSError as error:
            raise _no_writing(model, error) from error
        yield


def _remove_empty(created: list[Path]) -> None:
    for folder in created:  # innermost first; rmdir refuses a folder that holds anything
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextmanager
def _stage(model: Path) -> Iterator[Path]:
    with contextlib.ExitStack() as exits:
        try:
            place = exits.enter_context(files.stage(model))
        except OSError as error:
            raise _no_writing(model, error) from error
        yield place


def _no_writing(model: Path, error: OSError) -> ValueError:
    return ValueError(f"cannot write to {model} ({error.strerror}): choose a folder you can write")


def _join(model: Path, part: str, new: NewPart, stage: Path) -> None:
    """Move a finished part into the model directory and enter it into both JSON files."""
    entries = json.loads(json.dumps({name: dict(getattr(new, name)) for name in _ENTRIES}))
    try:
        if (model / part).exists():
            os.replace(model / part, stage / "left")
        write_json(model / _JOURNAL, {"part": part, "stage": stage.name, **entries}, stage)
        files.replace_folder(new.folder, model / part)
        _enter(model, part, entries, stage)
    except BaseException:
        if not _entered(model, part, entries):
            with contextlib.suppress(OSError):
                os.replace(model / part, stage / "undone")
        raise
    finally:
        (model / _JOURNAL).unlink(missing_ok=True)


def _enter(model: Path, part: str, entries: Mapping[str, Any], stage: Path) -> None:
    """Write what a part brings into `manifest.json` and, last, into `config.json`."""
    config: dict = read_config(model) if (model / CONFIG).exists() else {"format": FORMAT}
    manifest: dict = read_manifest(model) if (model / MANIFEST).exists() else {}
    defaults = {**config.get("defaults", {}), **entries["defaults"]}
    config = {**config, **entries["others"], part: entries["config"], "defaults": defaults}
    write_json(model / MANIFEST, {**manifest, part: entries["source"]}, stage)
    write_json(model / CONFIG, config, stage)


def _entered(model: Path, part: str, entries: Mapping[str, Any]) -> bool:
    try:
        return read_config(model).get(part) == entries["config"]
    except ValueError:
        return False


def _complete(model: Path, part: str) -> None:
    """Complete a joining that was killed, and remove what else killed runs left.

    A part that is about to be built anew is taken out again instead.
    """
    journal = _read_journal(model)
    if journal and not _entered(model, journal["part"], journal):
        left, target = model / journal["stage"] / journal["part"], model / journal["part"]
        with _stage(model) as stage:
            if journal["part"] == part and target.is_dir():
                os.replace(target, stage / "left")
            elif journal["part"] != part:
                if left.is_dir() and not target.exists():
                    files.replace_folder(left, target)
                if target.is_dir():
                    _enter(model, journal["part"], journal, stage)
            (model / _JOURNAL).unlink(missing_ok=True)
    (model / _JOURNAL).unlink(missing_ok=True)
    files.remove_stages(model)


def _read_journal(model: Path) -> JsonObject | None:
    file = model / _JOURNAL
    if file.is_symlink() or not file.exists():
        return None
    journal = read_json(file, "remove it and convert the part again")
    require_objects(journal, _ENTRIES)
    stage = told(journal.get("stage"), 60)
    known = journal.get("part") in PARTS and all(name in journal for name in _ENTRIES)
    if not known or not files.is_stage(stage):
        raise ValueError(f"{file} is damaged: remove it and convert the part again")
    return journal
