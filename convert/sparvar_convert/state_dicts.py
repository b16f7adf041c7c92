"""What counts as a state dict: dense tensors of known dtypes under text keys, stored once each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from sparvar_convert.rules import ConversionError
from sparvar_jax.weights.told import listed

_MOST_SHARED = 16


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
    if numpy_dtype(tensor) is None:
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


def numpy_dtype(tensor: torch.Tensor) -> np.dtype | None:
    """The dtype of a tensor as numpy and ml_dtypes have it; None where they have none."""
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        return None
