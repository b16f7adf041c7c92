"""PyTorch files: archives whose size is bounded, pickles of which nothing is run."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from sparvar_convert.pickles import distributed, foreign_name, foreign_names, stand_ins
from sparvar_convert.rules import ConversionError
from sparvar_jax.weights.files import refuse_pointer
from sparvar_jax.weights.told import listed, told

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
        f"{file} is truncated or not a PyTorch file ({first_sentence(failure)}): "
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
            f"{file} is truncated or not a PyTorch file ({first_sentence(error)}): "
            "download or copy it again"
        ) from error
    if unpacked > file.stat().st_size:
        raise ConversionError(
            f"{file} of {file.stat().st_size} bytes unpacks to {unpacked}: PyTorch's archives are "
            "not compressed, save it again"
        )
    return True


def first_sentence(error: Exception) -> str:
    """What an error says first, in one short line."""
    return told(told(error or type(error).__name__, 400).split(". ")[0], 160)
