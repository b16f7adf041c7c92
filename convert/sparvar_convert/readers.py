"""Readers of checkpoint files: shapes first, then one tensor at a time, with little memory.

PyTorch files are read with `weights_only=True` (no code in a pickle is ever run) and mapped from
disk; of a sharded checkpoint one shard is open at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from sparvar_convert.archives import first_sentence, load_torch
from sparvar_convert.rules import ConversionError
from sparvar_convert.state_dicts import numpy_dtype, require_state_dict
from sparvar_jax.weights.files import refuse_pointer
from sparvar_jax.weights.json_file import read_json
from sparvar_jax.weights.storage import SAFETENSORS_DTYPES
from sparvar_jax.weights.told import listed, told

_MOST_INDEX = 256 << 20  # a million names


class TorchReader:
    """Tensors of a loaded state dict."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> np.dtype:
        dtype = numpy_dtype(self._tensors[key])
        assert dtype is not None  # require_state_dict lets no other through
        return dtype

    def read(self, key: str) -> np.ndarray:
        tensor = self._tensors[key].detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


class SafetensorsReader:
    """Tensors of one safetensors file."""

    def __init__(self, file: Path) -> None:
        refuse_pointer(file)
        try:
            self._file = safe_open(file, framework="numpy")
            self._names = list(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise ConversionError(
                f"{file} is truncated or not a safetensors file ({first_sentence(error)}): "
                "download or copy it again"
            ) from error

    def names(self) -> Iterable[str]:
        return self._names

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(key).get_shape())

    def dtype(self, key: str) -> np.dtype:
        name = self._file.get_slice(key).get_dtype()
        if name not in SAFETENSORS_DTYPES:
            raise ConversionError(f"{key} is stored as {name}: convert it to bfloat16 first")
        return np.dtype(SAFETENSORS_DTYPES[name])

    def read(self, key: str) -> np.ndarray:
        return self._file.get_tensor(key)


class ShardedReader:
    """Tensors spread over several files by an index; names come shard by shard.

    Reading in the order of `names` opens every shard once and keeps one open.
    """

    def __init__(self, index: Path) -> None:
        self._shards = shards_of(index)
        self._facts: dict[str, tuple[Path, tuple[int, ...], np.dtype]] = {}
        self._open: tuple[Path, TorchReader | SafetensorsReader] | None = None
        for file, wanted in self._shards.items():
            reader = self._shard(file)
            unlisted = set(reader.names()) - wanted
            odd = sorted((wanted - set(reader.names())) | {k for k in unlisted if not _cut_off(k)})
            if odd:
                raise ConversionError(
                    f"{index.name} and {file.name} disagree on {len(odd)} tensors, first "
                    f"{odd[0]}: download the folder again"
                )
            for key in filter(wanted.__contains__, reader.names()):
                self._facts[key] = (file, reader.shape(key), reader.dtype(key))

    @property
    def files(self) -> tuple[Path, ...]:
        """The shards."""
        return tuple(self._shards)

    def names(self) -> Iterable[str]:
        return self._facts.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._facts[key][1]

    def dtype(self, key: str) -> np.dtype:
        return self._facts[key][2]

    def read(self, key: str) -> np.ndarray:
        return self._shard(self._facts[key][0]).read(key)

    def _shard(self, file: Path) -> TorchReader | SafetensorsReader:
        if self._open is None or self._open[0] != file:
            self._open = None  # let go of the last shard before the next one is mapped
            self._open = (file, open_file(file))
        return self._open[1]


def _cut_off(key: str) -> bool:
    """Whether a tensor may lie in a shard whose index does not list it.

    HART's text encoder was made from a model with a vision tower by a shorter index alone.
    """
    return key.startswith("visual.")


def open_file(file: Path) -> TorchReader | SafetensorsReader:
    """Reader of a flat file: safetensors by its ending, else PyTorch."""
    if file.suffix == ".safetensors":
        return SafetensorsReader(file)
    return TorchReader(require_state_dict(load_torch(file), file))


def shards_of(index: Path) -> dict[Path, set[str]]:
    """Shard files of an index, each with its keys; ValueError where it or a shard is damaged."""
    again = "download the folder again"
    names = read_json(index, again, _MOST_INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ConversionError(f"{index} is not an index with a weight_map: {again}")
    shards: dict[Path, set[str]] = {}
    for key, name in sorted(names.items(), key=lambda item: (item[1], item[0])):
        if Path(name).name != name or "\0" in name:
            raise ConversionError(f"{index} points outside its folder: {told(name, 80)}")
        shards.setdefault(index.parent / name, set()).add(key)
    missing = [file.name for file in shards if not os.path.isfile(file)]
    if missing or not shards:
        raise ConversionError(
            f"{index.parent} lacks the shards {listed(missing) or 'of its index'}: {again}"
        )
    return shards
