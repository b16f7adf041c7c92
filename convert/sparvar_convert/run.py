"""Convert a released checkpoint into one part of a model directory."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparvar_convert.families import Family, detect, family_of
from sparvar_convert.rules import ConversionError, require_numbers
from sparvar_convert.sources import Source, open_source
from sparvar_convert.stream import Converted, Progress, convert_tensors
from sparvar_jax.weights import checkpoint, orbax_calls
from sparvar_jax.weights.storage import OrbaxWriter

_PACKAGES = ("sparvar-jax", "jax", "flax", "orbax-checkpoint", "numpy", "torch", "safetensors")


@dataclass(frozen=True)
class Conversion:
    """What was converted: kind, place, configuration and counts, for people and programs.

    `ignored` maps each reason to the keys left behind for it.
    """

    kind: str
    title: str
    container: str
    part: str
    folder: Path
    config: Any
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]
    ignored: Mapping[str, tuple[str, ...]]


def convert_source(
    source: str | Path,
    into: str | Path,
    progress: Progress | None = None,
    ema: bool = False,
    kind: str | None = None,
) -> Conversion:
    """Add one released checkpoint to the model directory `into`, as the part it belongs to.

    Args:
        source: checkpoint file or folder, or `hf://owner/name[/path][@revision]`.
        progress: called as (parameter path, done, total).
        ema: take the averaged weights of a training checkpoint.
        kind: refuse any other kind than this one, such as infinity or vqvae.

    Raises:
        ValueError: one line that says what is wrong with the source or the place (mostly as
            ConversionError); the directory is then as it was.
    """
    opened = open_source(source, ema=ema)
    family = detect(opened)
    if kind is not None and family is not family_of(kind):
        raise ConversionError(
            f"{opened.name} is of kind {family.kind} ({family.title}), expected {kind}: "
            "name another checkpoint"
        )
    config = family.infer_config(opened)
    names = list(opened.reader.names())
    require_numbers(names, "blocks", getattr(config, "depth", 1))
    with checkpoint.new_part(into, family.part) as new:
        config, others = _agree(Path(into), family, config)
        writer = _Writer(new.folder)
        done = convert_tensors(
            family.table(config, names),
            opened.reader,
            family.expected(config),
            writer.write,
            progress,
        )
        writer.close()
        _copy_beside(family, opened, config, new.folder)
        new.config = {"kind": family.kind, **checkpoint.config_to_json(config)}
        new.others = others
        new.source = _manifest(family, opened, done)
        new.defaults = family.defaults(config, opened)
    return Conversion(
        family.kind,
        family.title,
        opened.container,
        family.part,
        Path(into) / family.part,
        config,
        done.tensors,
        done.parameters,
        done.dtypes,
        _by_reason(done),
    )


class _Writer:
    """OrbaxWriter whose failures (full disk, lost permission) are one-line errors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer = OrbaxWriter(folder)

    def write(self, path: str, array: np.ndarray) -> None:
        self._guard(self._writer.write, path, array)

    def close(self) -> None:
        self._guard(self._writer.close)

    def _guard(self, call, *args) -> None:
        try:
            call(*args)
        except Exception as error:  # Orbax and tensorstore share no error class
            raise ConversionError(
                f"cannot write to {self._folder.parent.parent} ({orbax_calls.reason(error)}): "
                "check space and permission"
            ) from error


def _agree(into: Path, family: Family, config: Any) -> tuple[Any, dict[str, Mapping[str, Any]]]:
    """The configuration, and changed entries of other parts, so that all parts fit together.

    Whether tokens of an Infinity transformer cover 2x2 latents shows only beside its tokenizer.
    """
    if not (into / checkpoint.CONFIG).is_file():
        return config, {}
    present = checkpoint.read_config(into)
    values: dict[str, Any] = {}
    for part in checkpoint.PARTS:
        if part in present:
            kind = present[part]["kind"]
            other = family_of(kind)
            if other.model_family != family.model_family:
                raise ConversionError(
                    f"{into} holds a {part} of kind {kind}, which does not go with a "
                    f"{family.title}: choose another folder"
                )
            values[part] = checkpoint.config_from_json(other.config, present[part])
    values[family.part] = config
    transformer, tokenizer, text = (values.get(part) for part in checkpoint.PARTS)
    if transformer and text and transformer.text_width != text.width:
        raise ConversionError(
            f"the transformer expects text features of width {transformer.text_width}, the "
            f"text encoder gives {text.width}: convert the encoder it was trained with"
        )
    if family.model_family != "infinity":
        return config, {}
    if not (transformer and tokenizer):
        return config, {}
    patchify = _patchify(transformer.bits, tokenizer.code_width)
    if family.part == "transformer":
        return dataclasses.replace(config, patchify=patchify), {}
    return config, {"transformer": {**present["transformer"], "patchify": patchify}}


def _patchify(bits: int, code_width: int) -> bool:
    if bits not in (code_width, 4 * code_width):
        raise ConversionError(
            f"the transformer draws {bits} bits a token, the tokenizer's codes have {code_width}: "
            "these must be equal, or 4 times with spatial patchify; convert the tokenizer it was "
            "trained with"
        )
    return bits != code_width


def _copy_beside(family: Family, source: Source, config: Any, folder: Path) -> None:
    """Copy what belongs to the part; each file is opened first, as drawing will open it."""
    if not family.beside:
        return
    found = [source.folder / name for name in family.beside if (source.folder / name).is_file()]
    if not found:
        raise ConversionError(
            f"{source.folder} lacks {' and '.join(family.beside)}: one of them must lie beside "
            "the weights, to split prompts into tokens"
        )
    for file in found:
        try:
            vocab = family.open_beside(file).vocab
            if vocab > config.vocab:
                raise ConversionError(
                    f"{file} has {vocab} pieces, the text encoder {config.vocab}: take the "
                    "tokenizer that belongs to the weights"
                )
            shutil.copyfile(file, folder / file.name)
        except OSError as error:
            raise ConversionError(f"cannot copy {file} ({error.strerror})") from error
        except ValueError as error:
            raise ConversionError(str(error)) from error


def _manifest(family: Family, source: Source, done: Converted) -> dict[str, Any]:
    return {
        "kind": family.kind,
        "source": source.name,
        "container": source.container,
        **({"commit": source.commit} if source.commit else {}),
        "files": [
            {"name": file.name, "bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in source.files
        ],
        "tensors": done.tensors,
        "parameters": done.parameters,
        "dtypes": done.dtypes,
        "ignored": _by_reason(done),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _by_reason(done: Converted) -> dict[str, tuple[str, ...]]:
    reasons: dict[str, tuple[str, ...]] = {}
    for key, reason in done.ignored.items():
        reasons[reason] = (*reasons.get(reason, ()), key)
    return reasons


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
