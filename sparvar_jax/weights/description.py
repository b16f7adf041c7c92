"""What a model directory says of itself: `config.json` and `manifest.json`, read and written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparvar_jax.weights.files import sync
from sparvar_jax.weights.json_file import (
    JsonObject,
    read_json,
    require_objects,
    require_text,
)
from sparvar_jax.weights.told import told

PARTS = ("transformer", "tokenizer", "text")
CONFIG, MANIFEST = "config.json", "manifest.json"
FORMAT = 1
_AGAIN = "convert the model again"


def read_config(model: str | Path) -> JsonObject:
    """The model's `config.json`; ValueError where it is missing, damaged or too new.

    Parts and `defaults` are objects, and each part has a `kind`.
    """
    config = _read(Path(model) / CONFIG)
    found = config.get("format")
    if isinstance(found, bool) or found != FORMAT:
        raise ValueError(
            f"{config.place} has format {told(found, 40)}, this version reads "
            f"{FORMAT}: convert the model again or update sparvar_jax"
        )
    require_objects(config, (*PARTS, "defaults"))
    for part in PARTS:
        if part in config:
            require_text(config[part], "kind")
    return config


def read_manifest(model: str | Path) -> JsonObject:
    """The model's `manifest.json`: by part its sources, tensor counts, dtypes and versions."""
    manifest = _read(Path(model) / MANIFEST)
    require_objects(manifest, PARTS)
    return manifest


def _read(file: Path) -> JsonObject:
    if not file.is_file():
        raise ValueError(f"{file} does not exist: {file.parent} is not a model directory")
    return read_json(file, _AGAIN)


def write_json(file: Path, value: Mapping[str, Any], stage: Path) -> None:
    """Write one JSON file of a model directory by way of a stage in it."""
    temporary = stage / file.name
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, file)
    sync(file.parent)
