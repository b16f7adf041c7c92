"""Model directories whose large matrices are 8 bits, made from dense ones.

Parts join the new directory one by one, whole, and a run that was killed is gone on with: parts
that are there from the same model are left alone. The transformer, which takes the time, comes
last, so that a directory that lacks something lacks what drawing needs.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparvar_jax.models import eight_bits
from sparvar_jax.models.eight_bits import FORMS, Form
from sparvar_jax.pipelines import loading, sharing
from sparvar_jax.runtime.progress import Progress
from sparvar_jax.weights import checkpoint, orbax_calls
from sparvar_jax.weights.storage import OrbaxWriter
from sparvar_jax.weights.told import told


def quantise_model(
    model: str | Path, into: str | Path, form: Form = "int8", progress: Progress | None = None
) -> tuple[str, ...]:
    """Write a model directory in a form of `eight_bits`; names of the parts written now.

    model: directory or name, of any family with such products. What is loaded from `into` draws
    what `weights=form` draws from `model`. Raises ValueError, before anything is written, where the
    model is not whole, has no matrices to round, or has them in 8 bits already; and where `into`
    holds parts of another origin.
    """
    if form not in FORMS:
        raise ValueError(f"a form is {' or '.join(FORMS)}, got {form!r}")
    folder, into = loading.model_folder(model), Path(into)
    config, manifest = checkpoint.read_config(folder), checkpoint.read_manifest(folder)
    described = loading.describe_model(folder)
    for part, module in described.parts.items():
        checkpoint.require_fit(module, checkpoint.part_reader(folder, part).shapes)
    if eight_bits.form_of(described.transformer) is not None:
        raise ValueError(f"{folder} is in 8 bits already: take the model that it was made from")
    if not eight_bits.kernels(described.transformer, form):
        kind = config["transformer"]["kind"]
        raise ValueError(f"a model of kind {kind} has no 8-bit products: nothing to quantise")
    origin = {"model": folder.resolve().name, "json": _fingerprint(folder), "form": form}
    written = []
    for part, module in _transformer_last(described.parts):
        if _is_there(into, part, origin):
            continue
        with checkpoint.new_part(into, part) as new:
            new.config, new.defaults = dict(config[part]), config.get("defaults", {})
            made: dict[str, Any] = manifest.get(part, {})
            new.source = {"source": origin["model"], **made, "quantised": origin}
            dtypes = eight_bits.kernels(module, form)
            if not dtypes or eight_bits.form_of(module) is not None:
                with _writing(into):
                    shutil.copytree(folder / part, new.folder)
            else:
                new.config["matrices"] = form
                _round_part(folder, part, new.folder, into, dtypes, progress)
                if part == "text":
                    sharing.copy_tokenizer(described.text_tokenizer.file, new.folder)
        written.append(part)
    return tuple(written)


def _transformer_last(modules: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(modules.items(), key=lambda entry: entry[0] == "transformer")


def _round_part(
    folder: Path,
    part: str,
    out: Path,
    into: Path,
    dtypes: dict[str, Any],
    progress: Progress | None,
) -> None:
    """Write a part's parameters, as they are stored or rounded from that."""
    reader = checkpoint.part_reader(folder, part)
    writer, arrays = OrbaxWriter(out), checkpoint.load_batches(reader)
    for path, array in eight_bits.rounded(_counted(arrays, len(reader.shapes), progress), dtypes):
        with _writing(into):
            writer.write(path, np.asarray(array))
    with _writing(into):
        writer.close()


def _counted(
    arrays: Iterator[tuple[str, jax.Array]], total: int, progress: Progress | None
) -> Iterator[tuple[str, jax.Array]]:
    for done, entry in enumerate(arrays, 1):
        if progress:
            progress("quantise", done, total)
        yield entry


def _fingerprint(folder: Path) -> str:
    """Tells models apart by what their JSON files say: shapes, defaults and sources."""
    names = checkpoint.CONFIG, checkpoint.MANIFEST
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def _is_there(into: Path, part: str, origin: dict[str, str]) -> bool:
    """Whether a part of this origin has joined the directory; ValueError for one of another."""
    if not (into / checkpoint.CONFIG).is_file():
        return False
    if part not in checkpoint.read_config(into):
        return False
    found = checkpoint.read_manifest(into).get(part, {}).get("quantised")
    if found != origin:
        raise ValueError(
            f"{into} holds a {part} that is not from {origin['model']} in {origin['form']} "
            f"({told(found, 120)}): choose another folder"
        )
    return True


@contextmanager
def _writing(into: Path) -> Iterator[None]:
    """ValueError where the disk takes no more, or a folder may not be written."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore share no error class
        raise ValueError(
            f"cannot write to {into} ({orbax_calls.reason(error)}): check space and permission"
        ) from error
