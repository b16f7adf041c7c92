"""Model directories: `config.json`, `manifest.json` and transformer, tokenizer and text parts.

Parts are added one at a time and appear complete or not at all. Needs no PyTorch; `convert` and
the training example write through the same functions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from flax import nnx

from sparvar_jax.weights import storage
from sparvar_jax.weights.storage import DtypeRule, ShardingRule

PARTS = ("transformer", "tokenizer", "text")
CONFIG, MANIFEST = "config.json", "manifest.json"
FORMAT = 1
_SHOWN = 6

Module = TypeVar("Module", bound=nnx.Module)
Config = TypeVar("Config")


def read_config(model: str | Path) -> dict[str, Any]:
    """The model's `config.json`; ValueError where it is missing, damaged or too new."""
    config = _read_json(Path(model) / CONFIG)
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{Path(model) / CONFIG} has format {config.get('format')}, this version reads "
            f"{FORMAT}: convert the model again or update sparvar_jax"
        )
    return config


def read_manifest(model: str | Path) -> dict[str, Any]:
    """The model's `manifest.json`: by part its sources, tensor counts, dtypes and versions."""
    return _read_json(Path(model) / MANIFEST)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist: {file.parent} is not a model directory")
    try:
        value = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): convert the model again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value


def config_to_json(config: Any) -> dict[str, Any]:
    """Frozen config dataclass to a JSON object."""
    return dataclasses.asdict(config)


def config_from_json(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Config dataclass from a part's JSON object; lists become tuples and `kind` is not a field.

    Raises ValueError for unknown or missing fields.
    """
    fields = {entry.name for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    given = {key: _tuples(value) for key, value in values.items() if key != "kind"}
    unknown = sorted(set(given) - fields)
    if unknown:
        raise ValueError(f"{cls.__name__} has no fields {', '.join(unknown)}: check config.json")
    try:
        return cls(**given)
    except TypeError as error:
        raise ValueError(f"config.json does not describe a {cls.__name__}: {error}") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def part_reader(model: str | Path, part: str) -> storage.PartReader:
    """Reader of one part: shapes, single parameters, whole restores."""
    if part not in PARTS:
        raise ValueError(f"a model has the parts {PARTS}, got {part!r}")
    directory = Path(model) / part
    if not directory.is_dir():
        raise ValueError(f"{model} has no {part}: convert one with `sparvar convert ... --into`")
    return storage.PartReader(directory)


def load_part(
    model: str | Path, part: str, *, dtype: DtypeRule = None, sharding: ShardingRule = None
) -> dict[str, Any]:
    """Restore one part into device arrays, a nested dict like `nnx.to_pure_dict`.

    Args:
        dtype: None keeps the stored dtypes; else a dtype, or a function of the dotted path.
        sharding: None puts everything on the default device; else a sharding, or a function of
            the dotted path and the shape.
    """
    reader = part_reader(model, part)
    return storage.nest(reader.restore_to_devices(dtype=dtype, sharding=sharding))


def abstract_parameters(module: nnx.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted path -> shape and dtype of every parameter, of a real or an abstract module."""
    return storage.flatten(nnx.to_pure_dict(nnx.state(module)))


def fill(module: Module, tree: Mapping[Any, Any]) -> Module:
    """The module (usually from `nnx.eval_shape`) with its parameters taken from a nested dict.

    Raises one ValueError that lists all missing and extra parameters and wrong shapes.
    """
    expected, given = abstract_parameters(module), storage.flatten(tree)
    problems = {
        "missing": [f"{p} {list(s.shape)}" for p, s in expected.items() if p not in given],
        "unknown": [f"{p} {list(a.shape)}" for p, a in given.items() if p not in expected],
        "wrong shapes": [
            f"{p} is {list(given[p].shape)}, expected {list(s.shape)}"
            for p, s in expected.items()
            if p in given and tuple(given[p].shape) != tuple(s.shape)
        ],
    }
    found = [
        f"{len(items)} {name}: {', '.join(items[:_SHOWN])}"
        + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
        for name, items in problems.items()
        if items
    ]
    if found:
        raise ValueError(
            f"the weights do not fit {type(module).__name__}: {'; '.join(found)}. "
            "Check that config.json belongs to these weights."
        )
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, storage.nest(given))
    return nnx.merge(graph, state)


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

    Whatever happens inside, no half-written part is left behind, nor a model directory that this
    call created. Raises ValueError where the part exists or the place cannot be written.
    """
    model, target = Path(model), Path(model) / part
    if part not in PARTS:
        raise ValueError(f"a model has the parts {PARTS}, got {part!r}")
    try:
        exists = target.exists()
        created = [folder for folder in (model, *model.parents) if not folder.exists()]
    except OSError as error:
        raise _no_writing(model, error) from error
    if exists:
        raise ValueError(f"{target} exists already: remove it first, or choose another folder")
    stage = None
    try:
        try:
            model.mkdir(parents=True, exist_ok=True)
            stage = Path(tempfile.mkdtemp(prefix=f".{part}-", dir=model))
        except OSError as error:
            raise _no_writing(model, error) from error
        building = NewPart(stage / part)
        yield building
        _join(model, part, building)
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        for folder in created:  # innermost first; rmdir refuses a folder that holds anything
            try:
                folder.rmdir()
            except OSError:
                break


def _no_writing(model: Path, error: OSError) -> ValueError:
    return ValueError(f"cannot write to {model} ({error.strerror}): choose a folder you can write")


def _join(model: Path, part: str, new: NewPart) -> None:
    """Move a finished part into the model directory and enter it into both JSON files."""
    config = read_config(model) if (model / CONFIG).exists() else {"format": FORMAT}
    manifest = read_manifest(model) if (model / MANIFEST).exists() else {}
    defaults = {**config.get("defaults", {}), **new.defaults}
    config = {**config, **new.others, part: dict(new.config), "defaults": defaults}
    os.replace(new.folder, model / part)
    try:
        _write_json(model / MANIFEST, {**manifest, part: dict(new.source)})
        _write_json(model / CONFIG, config)
    except BaseException:
        shutil.rmtree(model / part, ignore_errors=True)
        raise


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}.new")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, file)


def write_part(
    model: str | Path,
    part: str,
    tree: Mapping[Any, Any],
    *,
    config: Mapping[str, Any],
    source: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    form: Literal["orbax", "safetensors", "int8"] = "orbax",
) -> None:
    """Add one part from arrays in memory.

    Args:
        tree: nested dict of arrays, or a flat one with dotted paths.
        config, source, defaults: see `NewPart`.
        form: "int8" is safetensors with matrices in int8 (see `storage`).
    """
    flat = storage.flatten(tree)
    with new_part(model, part) as new:
        new.config, new.source, new.defaults = config, source, defaults or {}
        if form == "orbax":
            writer = storage.OrbaxWriter(new.folder)
            for path, array in flat.items():
                writer.write(path, array)
            writer.close()
        else:
            new.folder.mkdir()
            arrays = {path: np.asarray(array) for path, array in flat.items()}
            storage.write_safetensors(new.folder / storage.SAFETENSORS, arrays, int8=form == "int8")
