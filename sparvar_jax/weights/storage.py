"""How the parameters of one part of a model lie on disk: an Orbax checkpoint or a safetensors file.

Both hold the same dotted parameter paths. Orbax parts are written in batches, so that a checkpoint
larger than memory can pass through, and restored straight into device arrays, sharded if asked.
A safetensors part (`weights.safetensors`) suits small models; there a tensor `X` may be stored as
int8 beside float32 `X.__scale`, one scale for each index of the last axis, and is restored as
`X * X.__scale`. Integer steps in a path (list items) are digits on disk and `int` in trees.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array
from orbax.checkpoint.experimental import v1 as ocp_v1
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparvar_jax.weights import orbax_calls
from sparvar_jax.weights.files import refuse_pointer
from sparvar_jax.weights.told import told

SAFETENSORS = "weights.safetensors"
SAFETENSORS_DTYPES = {"BOOL": "bool", "BF16": "bfloat16"} | {
    f"{letter}{bits}": f"{name}{bits}"
    for letter, name in (("F", "float"), ("I", "int"), ("U", "uint"))
    for bits in (8, 16, 32, 64)
    if (letter, bits) != ("F", 8)
}
"""Names of dtypes in safetensors files -> names of numpy and ml_dtypes."""
SCALE_SUFFIX = ".__scale"
BATCH_BYTES = 256 << 20
_MIN_INT8_SIZE = 1024

DtypeRule = Any
"""None (as stored), a dtype, or a function `path -> dtype`."""
ShardingRule = (
    jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None
)
"""None (default device), one sharding, or a function `(path, shape) -> sharding`."""


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested dict to dotted paths."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{path}."))
        else:
            flat[path] = value
    return flat


def nest(flat: Mapping[str, Any], *, integers: bool = True) -> dict:
    """Dotted paths to a nested dict; digits become `int` keys unless `integers` is off."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = [
            int(step) if integers and step.isdigit() else step for step in path.split(".")
        ]
        node = tree
        for step in parents:
            node = node.setdefault(step, {})
        node[leaf] = value
    return tree


class OrbaxWriter:
    """Writes one Orbax checkpoint batch by batch; nothing is at `directory` before `close`."""

    def __init__(self, directory: Path, batch_bytes: int = BATCH_BYTES) -> None:
        self._directory = str(directory.absolute())
        self._batch_bytes = batch_bytes
        self._batch: dict[str, Any] = {}
        self._bytes = 0

    def write(self, path: str, array: np.ndarray | Array) -> None:
        """Add one parameter; it is on disk when its batch is full or at `close`."""
        self._batch[path] = array
        self._bytes += array.nbytes
        if self._bytes >= self._batch_bytes:
            self._flush()

    def close(self) -> None:
        """Write what is left and move the checkpoint into place."""
        self._flush()
        with orbax_calls.quiet():
            ocp_v1.partial.finalize(self._directory)

    def _flush(self) -> None:
        if self._batch:
            with orbax_calls.quiet():
                ocp_v1.partial.save(self._directory, nest(self._batch, integers=False))
            self._batch, self._bytes = {}, 0


def write_safetensors(file: Path, tensors: Mapping[str, np.ndarray], *, int8: bool = False) -> None:
    """Write a small part; with `int8`, matrices and kernels are stored as int8 with scales."""
    stored = {}
    for path, tensor in tensors.items():
        array = np.asarray(tensor, order="C")
        if int8 and array.ndim >= 2 and array.size >= _MIN_INT8_SIZE:
            stored[path], stored[path + SCALE_SUFFIX] = quantize_int8(array)
        else:
            stored[path] = array
    save_file(stored, file)


def quantize_int8(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 values and their float32 scales, one for each index of the last axis."""
    wide = array.astype(np.float32)
    peak = np.abs(wide).max(axis=tuple(range(wide.ndim - 1)))
    scale = np.where(peak > 0, peak / 127, 1).astype(np.float32)
    return np.round(wide / scale).astype(np.int8), scale


def require_scale(name: str, values: np.ndarray, scale: np.ndarray) -> None:
    """ValueError unless these are int8 values with one finite float32 scale a last index."""
    fits = values.dtype == np.int8 and scale.dtype == np.float32 and values.ndim >= 2
    if not fits or scale.shape != values.shape[-1:] or not np.isfinite(scale).all():
        raise ValueError(
            f"{name} is damaged: expected int8 values and one finite float32 scale for each of the "
            f"last axis, got {values.dtype} {list(values.shape)} and {scale.dtype} "
            f"{list(scale.shape)}; fetch or make it again"
        )


class PartReader:
    """Parameters of one part: shapes without reading data, single reads, whole restores.

    Raises ValueError where the folder holds no readable weights.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file = directory / SAFETENSORS
        self._orbax: Any = None if self._file.is_file() else _orbax_folder(directory)
        self._handler = ocp.PyTreeCheckpointHandler()
        self.shapes: dict[str, jax.ShapeDtypeStruct] = (
            self._safetensors_shapes() if self._orbax is None else self._orbax_shapes()
        )
        """Dotted path -> shape and stored dtype (float32 where int8 is restored)."""

    def read(self, path: str) -> np.ndarray:
        """One parameter as numpy, in its stored dtype."""
        return self.restore([path])[path]

    def restore(self, paths: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Parameters as numpy arrays by dotted path, in their stored dtype; all by default."""
        paths = list(self.shapes if paths is None else paths)
        if self._orbax is None:
            return self._read_safetensors(paths)
        args = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in paths}
        return self._restore_orbax(args)

    @functools.cached_property
    def scaled(self) -> frozenset[str]:
        """The paths that are stored in 8 bits with scales; none in an Orbax part."""
        if self._orbax is not None:
            return frozenset()
        with safe_open(self._file, framework="numpy") as file:
            names = set(file.keys())
        return frozenset(name for name in self.shapes if name + SCALE_SUFFIX in names)

    def restore_to_devices(
        self,
        dtype: DtypeRule = None,
        sharding: ShardingRule = None,
        keep: Collection[str] = (),
        paths: Iterable[str] | None = None,
    ) -> dict[str, Array]:
        """Parameters, all by default, as device arrays by dotted path, cast and sharded as asked.

        keep: paths of `scaled` that stay int8; their scales are beside them as `PATH_scale`.
        """
        paths = list(self.shapes if paths is None else paths)
        if self._orbax is None:
            arrays = self._read_safetensors([path for path in paths if path not in keep])
            placed = {
                path: jax.device_put(
                    array.astype(self._dtype(path, dtype)), self._sharding(path, sharding)
                )
                for path, array in arrays.items()
            }
            return placed | {
                name: jax.device_put(array, self._sharding(name, sharding, array.shape))
                for path in keep
                for name, array in zip((path, f"{path}_scale"), self._stored(path), strict=True)
            }
        args = {
            path: ocp.ArrayRestoreArgs(
                restore_type=jax.Array,
                dtype=self._dtype(path, dtype),
                sharding=self._sharding(path, sharding),
            )
            for path in paths
        }
        return self._restore_orbax(args)

    def _dtype(self, path: str, rule: DtypeRule) -> np.dtype:
        if rule is None:
            return self.shapes[path].dtype
        by_path = callable(rule) and not isinstance(rule, type)
        dtype: Any = rule(path) if by_path else rule
        return np.dtype(dtype)

    def _sharding(
        self, path: str, rule: ShardingRule, shape: tuple[int, ...] | None = None
    ) -> jax.sharding.Sharding:
        if rule is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        if isinstance(rule, jax.sharding.Sharding):
            return rule
        return rule(path, self.shapes[path].shape if shape is None else shape)

    def _orbax_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        with orbax_calls.reading(self.directory):
            tree = self._handler.metadata(self._orbax).tree
            return {
                path: jax.ShapeDtypeStruct(tuple(leaf.shape), np.dtype(leaf.dtype))
                for path, leaf in flatten(tree).items()
            }

    def _restore_orbax(self, args: Mapping[str, ocp.RestoreArgs]) -> dict[str, Any]:
        item = {path: self.shapes[path] for path in args}
        with orbax_calls.reading(self.directory):
            tree = self._handler.restore(
                self._orbax,
                args=ocp.args.PyTreeRestore(
                    item=nest(item, integers=False),
                    restore_args=nest(args, integers=False),
                    partial_restore=True,
                ),
            )
        return flatten(tree)

    def _safetensors_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = {}
        refuse_pointer(self._file)
        try:
            with safe_open(self._file, framework="numpy") as file:
                names = set(file.keys())
                for name in names:
                    if name.endswith(SCALE_SUFFIX):
                        continue
                    scaled = name + SCALE_SUFFIX in names
                    part = file.get_slice(name)
                    stored = SAFETENSORS_DTYPES.get(part.get_dtype())
                    if stored is None:
                        raise ValueError(f"{self._file} has {part.get_dtype()}: make it again")
                    dtype = np.dtype("float32" if scaled else stored)
                    shapes[name] = jax.ShapeDtypeStruct(tuple(part.get_shape()), dtype)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self._file} is damaged: {told(error, 160)}; fetch or make it again"
            ) from error
        return dict(sorted(shapes.items()))

    def _stored(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        """(int8 values, scales) of a path of `scaled`."""
        with safe_open(self._file, framework="numpy") as file:
            values, scale = file.get_tensor(path), file.get_tensor(path + SCALE_SUFFIX)
        require_scale(f"{self._file}: {told(path, 80)}", values, scale)
        return values, scale

    def _read_safetensors(self, paths: list[str]) -> dict[str, np.ndarray]:
        arrays = {}
        with safe_open(self._file, framework="numpy") as file:
            names = set(file.keys())
            for path in paths:
                array = file.get_tensor(path)
                if path + SCALE_SUFFIX in names:
                    scale = file.get_tensor(path + SCALE_SUFFIX)
                    require_scale(f"{self._file}: {told(path, 80)}", array, scale)
                    array = array.astype(np.float32) * scale
                arrays[path] = array
        return arrays


def _orbax_folder(directory: Path) -> epath.Path:
    """Folder of the Orbax tree: the part itself or the one item in it."""
    for folder in (directory, *sorted(p for p in directory.glob("*") if p.is_dir())):
        if (folder / "_METADATA").is_file():
            return epath.Path(folder.absolute())
    raise ValueError(
        f"{directory} holds neither an Orbax checkpoint nor {SAFETENSORS}: "
        "convert this part into the model directory first"
    )
