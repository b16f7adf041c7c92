"""Model directories: `config.json`, `manifest.json` and transformer, tokenizer and text parts.

Parts are added one at a time and appear complete or not at all. Needs no PyTorch; `convert` and
the training example write through the same functions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from flax import nnx

from sparvar_jax.weights import storage
from sparvar_jax.weights.description import (
    CONFIG,
    FORMAT,
    MANIFEST,
    PARTS,
    read_config,
    read_manifest,
)
from sparvar_jax.weights.joining import NewPart, new_part
from sparvar_jax.weights.json_file import build
from sparvar_jax.weights.storage import DtypeRule, ShardingRule
from sparvar_jax.weights.told import listed

__all__ = [
    "CONFIG",
    "FORMAT",
    "MANIFEST",
    "PARTS",
    "NewPart",
    "abstract_parameters",
    "config_from_json",
    "config_to_json",
    "fill",
    "load_batches",
    "load_part",
    "new_part",
    "part_reader",
    "read_config",
    "read_manifest",
    "require_fit",
    "write_part",
]

LOAD_BYTES = 1 << 30
Module = TypeVar("Module", bound=nnx.Module)
Config = TypeVar("Config")


def config_to_json(config: Any) -> dict[str, Any]:
    """Frozen config dataclass to a JSON object."""
    return dataclasses.asdict(config)


def config_from_json(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Config dataclass from a part's JSON object; lists become tuples and `kind` is not a field.

    Raises ValueError for unknown or missing fields, and for values of another type or size than
    `json_file` allows; the message names the file where `values` come from `read_config`.
    """
    return build(cls, values)


def part_reader(model: str | Path, part: str) -> storage.PartReader:
    """Reader of one part: shapes, single parameters, whole restores."""
    if part not in PARTS:
        raise ValueError(f"a model has the parts {PARTS}, got {part!r}")
    directory = Path(model) / part
    if not directory.is_dir():
        raise ValueError(f"{model} has no {part}: convert one with `sparvar convert ... --into`")
    return storage.PartReader(directory)


def load_part(
    model: str | Path,
    part: str,
    *,
    dtype: DtypeRule = None,
    sharding: ShardingRule = None,
    keep: Collection[str] = (),
) -> dict[str, Any]:
    """Restore one part into device arrays, a nested dict like `nnx.to_pure_dict`.

    Args:
        dtype: None keeps the stored dtypes; else a dtype, or a function of the dotted path.
        sharding: None puts everything on the default device; else a sharding, or a function of
            the dotted path and the shape.
        keep: paths that stay 8 bits with scales, see `PartReader.restore_to_devices`.
    """
    reader = part_reader(model, part)
    return storage.nest(reader.restore_to_devices(dtype=dtype, sharding=sharding, keep=keep))


def load_batches(
    reader: storage.PartReader, *, dtype: DtypeRule = None, batch_bytes: int | None = None
) -> Iterator[tuple[str, jax.Array]]:
    """Parameters of a part on the default device, one by one, with few bytes of others loaded.

    dtype: as in `load_part`. batch_bytes: stored bytes that are read in one go,
    by default `LOAD_BYTES`.
    """
    most = batch_bytes or LOAD_BYTES
    batches: list[list[str]] = [[]]
    size = 0
    for path, shape in reader.shapes.items():
        size += math.prod(shape.shape) * shape.dtype.itemsize
        if size > most and batches[-1]:
            batches.append([])
            size = math.prod(shape.shape) * shape.dtype.itemsize
        batches[-1].append(path)
    for paths in batches:
        loaded = reader.restore_to_devices(dtype=dtype, paths=paths)
        while loaded:
            yield loaded.popitem()


def abstract_parameters(module: nnx.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted path -> shape and dtype of every parameter, of a real or an abstract module."""
    leaves = storage.flatten(nnx.to_pure_dict(nnx.state(module)))
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in leaves.items()}


def fill(module: Module, tree: Mapping[Any, Any]) -> Module:
    """The module (usually from `nnx.eval_shape`) with its parameters taken from a nested dict.

    Raises one ValueError that lists all missing and extra parameters and wrong shapes.
    """
    given = storage.flatten(tree)
    require_fit(module, given)
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, storage.nest(given))
    return nnx.merge(graph, state)


def require_fit(module: nnx.Module, given: Mapping[str, Any]) -> None:
    """ValueError that lists every parameter, by dotted path, that does not fit the module.

    given: anything with a shape by path, so that a part can be checked before it is read.
    """
    expected = abstract_parameters(module)
    problems = {
        "missing": [f"{p} {list(s.shape)}" for p, s in expected.items() if p not in given],
        "unknown": [f"{p} {list(a.shape)}" for p, a in given.items() if p not in expected],
        "wrong shapes": [
            f"{p} is {list(given[p].shape)}, expected {list(s.shape)}"
            for p, s in expected.items()
            if p in given and tuple(given[p].shape) != tuple(s.shape)
        ],
    }
    found = [f"{len(items)} {name}: {listed(items)}" for name, items in problems.items() if items]
    if found:
        raise ValueError(
            f"the weights do not fit {type(module).__name__}: {'; '.join(found)}. "
            "Check that config.json belongs to these weights."
        )


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
