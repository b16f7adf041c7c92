"""Single parts of a model directory: where they lie, their configuration, their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
from flax import nnx

from sparvar_jax.models import layers
from sparvar_jax.pipelines import released
from sparvar_jax.weights import checkpoint
from sparvar_jax.weights.told import told

Weights = Literal["dense", "stored", "int8"]
"""How matrices lie in memory: in the model's dtype; in 8 bits where they are stored so; or, for a
transformer's large products, in 8 bits with activations rounded to 8 bits as well."""
Kind = tuple[type, Any]
"""A module class with its configuration, or configuration class."""
DEMO = Path(__file__).parents[1] / "demo"


def model_folder(directory: str | Path | None) -> Path:
    """The folder of a model; None is the demo model of this installation.

    A name that is no folder is looked for among the fetched models, see `released.find`.
    """
    if directory is not None:
        folder = Path(directory)
        return folder if folder.is_dir() else released.find(str(directory))
    if not (DEMO / checkpoint.CONFIG).is_file():
        raise ValueError("this installation has no demo model: give --model DIR")
    return DEMO


def part_config(
    config: Mapping[str, Any], part: str, kinds: Mapping[str, Kind], dtype: str | None = None
) -> Kind:
    """Module class and config of one part, of the kinds given.

    dtype: overrides the stored compute dtype. Raises ValueError for a part that is missing or of
    another kind.
    """
    entry = config.get(part)
    if not isinstance(entry, dict):
        raise ValueError(f"the model has no {part}: add it with `sparvar convert SOURCE --into`")
    if not isinstance(entry.get("kind"), str) or entry["kind"] not in kinds:
        raise ValueError(
            f"unknown kind {told(entry.get('kind'), 60)} of {part}, expected {' or '.join(kinds)}"
        )
    module, config_class = kinds[entry["kind"]]
    values = checkpoint.config_from_json(config_class, entry)
    return module, values if dtype is None else dataclasses.replace(values, dtype=dtype)


def abstract_module(module: type, values: Any) -> Any:
    """A module with shapes and dtypes instead of arrays."""
    return nnx.eval_shape(lambda: module(values, rngs=nnx.Rngs(0)))


def check_weights(weights: str) -> None:
    """ValueError for a form of weights that there is not."""
    if weights not in get_args(Weights):
        raise ValueError(f"weights must be 'dense', 'stored' or 'int8', got {weights!r}")


def described_module(
    folder: Path, part: str, module: type, values: Any, weights: Weights = "dense"
) -> Any:
    """What `load_module` gives, with shapes and dtypes instead of arrays."""
    check_weights(weights)
    abstract = abstract_module(module, values)
    if weights == "stored":
        layers.in_eight_bits(abstract, checkpoint.part_reader(folder, part).scaled)
    elif weights == "int8":
        layers.narrow(abstract)
    return abstract


def load_module(
    folder: Path, part: str, module: type, values: Any, weights: Weights = "dense"
) -> Any:
    """One part with its weights on the default device, in the dtypes its config asks for.

    weights: "stored" leaves kernels of linear maps in 8 bits where they are stored so; everything
    else (embeddings, vectors, convolutions, the text encoder) is made dense. "int8" rounds the
    matrices of a transformer's blocks, see `layers.narrow`.
    """
    check_weights(weights)
    abstract = abstract_module(module, values)
    reader = checkpoint.part_reader(folder, part)
    stored = dict(reader.shapes)
    checkpoint.require_fit(abstract, stored)  # before anything of the sizes in the file is read
    keep: frozenset[str] = frozenset()
    if weights == "stored":
        before = checkpoint.abstract_parameters(abstract)
        layers.in_eight_bits(abstract, reader.scaled)
        after = checkpoint.abstract_parameters(abstract)
        keep = frozenset(path for path in before if after[path].dtype != before[path].dtype)
    shapes = checkpoint.abstract_parameters(abstract)
    # Rounded from what is stored: in 8 bits again, values that are so come out as they were.
    exact = reader.scaled if weights == "int8" else frozenset()
    tree = checkpoint.load_part(
        folder,
        part,
        dtype=lambda path: (
            (stored[path] if path in exact else shapes.get(path, stored[path])).dtype
        ),
        keep=keep,
    )
    filled = checkpoint.fill(abstract, tree)
    if weights == "int8":
        layers.narrow(filled)
    return filled


def compute_dtype(dtype: str | None) -> str:
    """The dtype to compute in: what is asked for, else what suits the device.

    A CPU only emulates bfloat16, so it computes in float32; everything else in bfloat16, in which
    the models keep float32 where it matters: residual streams, norms, logits, sums of codes, the
    last layer of a decoder.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
    return dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
