"""Readers of checkpoint files: shapes first, then one tensor at a time, with little memory.

PyTorch files are read with `weights_only=True` (no code in a pickle is ever run) and mapped from
disk; of a sharded checkpoint one shard is open at a time.
"""

from __future__ import annotations

import argparse
import json
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from sparvar_convert.pickles import foreign_name
from sparvar_convert.rules import ConversionError

_SAFETENSORS_DTYPES = {"BOOL": "bool", "BF16": "bfloat16"} | {
    f"{letter}{bits}": f"{name}{bits}"
    for letter, name in (("F", "float"), ("I", "int"), ("U", "uint"))
    for bits in (8, 16, 32, 64)
    if (letter, bits) != ("F", 8)
}


def load_torch(file: Path) -> Any:
    """Content of a PyTorch file, tensors mapped from disk where the format allows.

    Raises ConversionError for files that are truncated, not PyTorch's, or carry code.
    """
    try:
        with file.open("rb") as stream:
            mappable = zipfile.is_zipfile(stream)
    except OSError as error:
        raise ConversionError(f"cannot read {file}: {error.strerror}") from error
    try:
        # argparse.Namespace is where training checkpoints keep settings; it holds plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # torch warns of newer pickle protocols before it reads or refuses them.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # torch has no common class for damaged files
        code = foreign_name(file) if isinstance(error, pickle.UnpicklingError) else None
        if code:
            raise ConversionError(
                f"{file} is refused: its pickle wants to use {code}, which could run code; "
                "save the plain state dict again and convert that"
            ) from error
        raise ConversionError(
            f"{file} is truncated or not a PyTorch file ({_first_sentence(error)}): "
            "download or copy it again"
        ) from error


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0][:160]


class TorchReader:
    """Tensors of a loaded state dict."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> np.dtype:
        name = str(self._tensors[key].dtype).removeprefix("torch.")
        return np.dtype(getattr(ml_dtypes, name, name))

    def read(self, key: str) -> np.ndarray:
        tensor = self._tensors[key].detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


class SafetensorsReader:
    """Tensors of one safetensors file."""

    def __init__(self, file: Path) -> None:
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
        if name not in _SAFETENSORS_DTYPES:
            raise ConversionError(f"{key} is stored as {name}: convert it to bfloat16 first")
        return np.dtype(_SAFETENSORS_DTYPES[name])

    def read(self, key: str) -> np.ndarray:
        return self._file.get_tensor(key)


class ShardedReader:
    """Tensors spread over several files by an index; names come shard by shard.

    Reading in the order of `names` opens every shard once and keeps one open.
    """

    def __init__(self, index: Path) -> None:
        self._shards = _shards_of(index)
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
    """The value, if it is a dict of tensors; else a ConversionError that says what it holds."""
    if not isinstance(value, Mapping) or not value:
        raise ConversionError(
            f"{file} holds {'an empty dict' if value == {} else type(value).__name__}, expected a "
            "dict of tensors: choose a checkpoint with weights"
        )
    strange = [f"{k} ({type(v).__name__})" for k, v in value.items() if not torch.is_tensor(v)]
    if strange:
        raise ConversionError(
            f"{file} holds entries that are not tensors: {', '.join(strange[:6])}; expected a "
            "flat state dict, a training checkpoint (trainer) or a tokenizer file (vae)"
        )
    return value


def _shards_of(index: Path) -> dict[Path, set[str]]:
    try:
        names = json.loads(index.read_text())["weight_map"]
        shards: dict[Path, set[str]] = {}
        for key, name in sorted(names.items(), key=lambda item: (item[1], item[0])):
            if Path(name).name != name:
                raise ConversionError(f"{index} points outside its folder: {name}")
            shards.setdefault(index.parent / name, set()).add(key)
    except (OSError, json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ConversionError(
            f"{index} is not an index with a weight_map ({_first_sentence(error)}): "
            "download the folder again"
        ) from error
    missing = [file.name for file in shards if not file.is_file()]
    if missing or not shards:
        raise ConversionError(
            f"{index.parent} lacks the shards {', '.join(missing) or 'of its index'}: "
            "download the folder again"
        )
    return shards
