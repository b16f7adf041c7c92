"""Readers of checkpoint files: shapes first, then one tensor at a time, with little memory.

PyTorch files are read with `weights_only=True` (no code in a pickle is ever run) and mapped from
disk; of a sharded checkpoint one shard is open at a time.
"""

from __future__ import annotations

import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from sparvar_convert.pickles import distributed, foreign_name, foreign_names, stand_ins
from sparvar_convert.rules import ConversionError
from sparvar_jax.weights.files import refuse_pointer
from sparvar_jax.weights.json_file import read_json
from sparvar_jax.weights.storage import SAFETENSORS_DTYPES
from sparvar_jax.weights.told import listed, told

_MOST_INDEX = 256 << 20  # a million names
_MOST_SHARED = 16
_OTHER_PROTOCOL = "Unsupported operand"


def load_torch(file: Path) -> Any:
    """Content of a PyTorch file, tensors mapped from disk where the format allows.

    Raises ConversionError for files that are truncated, not PyTorch's, or carry code.
    """
    refuse_pointer(file)
    mappable = require_archive(file)
    try:
        return _load(file, mappable, [])
    except Exception as error:  # torch has no common class for damaged files
        failure = error
    names = foreign_names(file) if isinstance(failure, pickle.UnpicklingError) else []
    settings = stand_ins(names)
    if settings:
        try:
            return _load(file, mappable, settings)
        except Exception as error:
            failure = error
    raise _not_loaded(file, names, failure) from failure


def _not_loaded(file: Path, names: list[str], failure: Exception) -> ConversionError:
    shared, code = distributed(names), foreign_name(names)
    if shared:
        return ConversionError(
            f"{file} holds entries of unsupported kinds: {listed(shared)}; gather the full state "
            "dict in one process and save that"
        )
    if code:
        return ConversionError(
            f"{file} is refused: its pickle wants to use {told(code, 80)}, which could run code; "
            "save the plain state dict again and convert that"
        )
    if names and _OTHER_PROTOCOL in str(failure):  # a whole pickle, then
        return ConversionError(
            f"{file} was saved with a pickle protocol that PyTorch reads only as code: save it "
            "again with torch.save and its own protocol, 2"
        )
    return ConversionError(
        f"{file} is truncated or not a PyTorch file ({_first_sentence(failure)}): "
        "download or copy it again"
    )


def _load(file: Path, mappable: bool, allowed: list) -> Any:
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
        # torch warns of pickle protocols and of its own storage classes while it reads.
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)


def require_archive(file: Path) -> bool:
    """Whether a file is a zip archive, as PyTorch writes them.

    Raises ConversionError where the file cannot be read, or its entries would unpack to more than
    it holds: PyTorch compresses none.
    """
    try:
        if not zipfile.is_zipfile(file):
            return False
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except OSError as error:
        raise ConversionError(f"cannot read {file}: {error.strerror}") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise ConversionError(
            f"{file} is truncated or not a PyTorch file ({_first_sentence(error)}): "
            "download or copy it again"
        ) from error
    if unpacked > file.stat().st_size:
        raise ConversionError(
            f"{file} of {file.stat().st_size} bytes unpacks to {unpacked}: PyTorch's archives are "
            "not compressed, save it again"
        )
    return True


def _first_sentence(error: Exception) -> str:
    return told(told(error or type(error).__name__, 400).split(". ")[0], 160)


class TorchReader:
    """Tensors of a loaded state dict."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> np.dtype:
        dtype = _numpy_dtype(self._tensors[key])
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
                f"{file} is truncated or not a safetensors file ({_first_sentence(error)}): "
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
            if set(reader.names()) != wanted:
                odd = sorted(set(reader.names()) ^ wanted)
                raise ConversionError(
                    f"{index.name} and {file.name} disagree on {len(odd)} tensors, first "
                    f"{odd[0]}: download the folder again"
                )
            for key in reader.names():
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


def open_file(file: Path) -> TorchReader | SafetensorsReader:
    """Reader of a flat file: safetensors by its ending, else PyTorch."""
    if file.suffix == ".safetensors":
        return SafetensorsReader(file)
    return TorchReader(require_state_dict(load_torch(file), file))


def require_state_dict(value: Any, file: Path) -> Mapping[str, torch.Tensor]:
    """The value, if it is a dict of plain tensors; else a ConversionError that says what it holds.

    Plain are dense tensors in memory, each with its own entries, under names that are texts.
    """
    if not isinstance(value, Mapping) or not value:
        raise ConversionError(
            f"{file} holds {'an empty dict' if value == {} else type(value).__name__}, expected a "
            "dict of tensors: choose a checkpoint with weights"
        )
    strange = [f"{k} ({type(v).__name__})" for k, v in value.items() if not torch.is_tensor(v)]
    if strange:
        raise ConversionError(
            f"{file} holds entries that are not tensors: {listed(strange)}; expected a "
            "flat state dict, a training checkpoint (trainer) or a tokenizer file (vae)"
        )
    unsupported = [
        f"{key} ({reason})"
        for key, tensor in value.items()
        if (reason := _unsupported(key, tensor))
    ]
    if unsupported:
        raise ConversionError(
            f"{file} holds {len(unsupported)} entries of unsupported kinds: {listed(unsupported)}; "
            "save the full, dense state dict under text keys again"
        )
    _require_no_more_than_stored(value, file)
    return value


def _unsupported(key: Any, tensor: torch.Tensor) -> str | None:
    """Why an entry cannot be read as a plain array, None where it can."""
    if not isinstance(key, str):
        return f"its key is {type(key).__name__}"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return type(tensor).__name__
    if tensor.is_nested or tensor.layout is not torch.strided:
        return f"layout {'nested' if tensor.is_nested else str(tensor.layout)[6:]}"
    if tensor.is_quantized or tensor.device.type != "cpu":
        return "quantised" if tensor.is_quantized else f"on device {tensor.device.type}"
    if _numpy_dtype(tensor) is None:
        return f"dtype {str(tensor.dtype)[6:]}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"expanded: {list(tensor.shape)} from {tensor.untyped_storage().nbytes()} bytes"
    return None


def _require_no_more_than_stored(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """ConversionError where the tensors together are much larger than what is stored for them.

    Tied tensors share storage a few times.
    """
    stored = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()
    }
    claimed = sum(t.numel() * t.element_size() for t in tensors.values())
    if claimed > _MOST_SHARED * sum(stored.values()):
        raise ConversionError(
            f"{file} has tensors of {claimed} bytes that share {sum(stored.values())} stored ones: "
            "save it again with each tensor cloned"
        )


def _numpy_dtype(tensor: torch.Tensor) -> np.dtype | None:
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        return None


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
