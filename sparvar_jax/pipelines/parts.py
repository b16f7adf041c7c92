"""Single parts of a model directory: where they lie, their configuration, their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
from flax import nnx

from sparvar_jax.models import eight_bits
from sparvar_jax.models.eight_bits import FORMS, Form
from sparvar_jax.pipelines import released
from sparvar_jax.weights import checkpoint
from sparvar_jax.weights.storage import PartReader
from sparvar_jax.weights.told import told

Weights = Literal["dense", "stored", "int8", "fp8"]
"""How matrices lie in memory: in the model's dtype; in 8 bits where they are stored so; or, for a
transformer's large products, in a form of `eight_bits`, with activations rounded to 8 bits too, and
for a T5 encoder's matrices in int8."""
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


def stored_form(
    config: Mapping[str, Any], part: str, weights: Weights = "dense", kind: Kind | None = None
) -> Form | None:
    """The form of `eight_bits` in which a part's large matrices are stored, None for dense ones.

    kind: of the part, whose matrices tell whether another form is another thing. Raises ValueError
    for an unknown form, and for one that `weights` contradicts.
    """
    found = config[part].get("matrices")
    if found is not None and found not in FORMS:
        raise ValueError(
            f"the matrices of {part} are in the form {told(found, 60)}, expected "
            f"{' or '.join(FORMS)}: make the model again or update sparvar_jax"
        )
    if found is None or weights not in FORMS or weights == found:
        return found
    module = abstract_module(*kind) if kind else None
    if module is None or eight_bits.kernels(module, weights) != eight_bits.kernels(module, found):
        raise ValueError(
            f"the matrices of {part} are stored as {found}, asked for was {weights}: leave that "
            "out, or take the model that it was made from"
        )
    return found


def abstract_module(module: type, values: Any, form: Form | None = None) -> Any:
    """A module with shapes and dtypes instead of arrays, its large matrices perhaps in 8 bits."""
    made = nnx.eval_shape(lambda: module(values, rngs=nnx.Rngs(0)))
    if form is not None:
        eight_bits.narrow(made, eight_bits.kernels(made, form))
    return made


def load_text(folder: Path, kinds: Mapping[str, Kind], dtype: str | None, weights: Weights) -> Any:
    """The text encoder of a model directory, of the kinds given, and nothing else."""
    config = checkpoint.read_config(folder)
    kind = part_config(config, "text", kinds, compute_dtype(dtype))
    stored = stored_form(config, "text", weights, kind)
    return load_module(folder, "text", *kind, weights, stored)


def check_weights(weights: str) -> None:
    """ValueError for a form of weights that there is not."""
    if weights not in get_args(Weights):
        raise ValueError(
            f"weights must be 'dense', 'stored' or 'int8', or else 'fp8', got {weights!r}"
        )


def load_module(
    folder: Path,
    part: str,
    module: type,
    values: Any,
    weights: Weights = "dense",
    stored: Form | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Any:
    """One part with its weights in the dtypes its config asks for.

    weights: "stored" leaves kernels of linear maps in 8 bits where they are stored so; everything
    else (embeddings, vectors, convolutions) is made dense. "int8" and "fp8" round the matrices of a
    transformer's or T5 encoder's blocks, see `eight_bits`, without ever holding all of them in
    full. stored: see `stored_form`; such matrices stay as they are. sharding: where weights are
    restored to, None is the default device.
    """
    check_weights(weights)
    reader = checkpoint.part_reader(folder, part)
    abstract = abstract_module(module, values, stored)
    checkpoint.require_fit(abstract, reader.shapes)  # before anything of the file's sizes is read
    if stored is not None:
        _require_form(folder, abstract, reader.shapes, stored)
    elif weights in FORMS:
        return _load_rounded(abstract, reader, weights, sharding)
    keep: frozenset[str] = frozenset()
    if weights == "stored":
        before = checkpoint.abstract_parameters(abstract)
        eight_bits.keep_stored(abstract, reader.scaled)
        after = checkpoint.abstract_parameters(abstract)
        keep = frozenset(path for path in before if after[path].dtype != before[path].dtype)
    shapes = checkpoint.abstract_parameters(abstract)
    tree = checkpoint.load_part(
        folder, part, dtype=lambda path: shapes[path].dtype, sharding=sharding, keep=keep
    )
    return checkpoint.fill(abstract, tree)


def _load_rounded(
    abstract: Any, reader: PartReader, form: Form, sharding: jax.sharding.Sharding | None
) -> Any:
    """The part with its large matrices rounded as they come, on the default device.

    They are rounded from what is stored, whatever dtype is computed in, so that the result is the
    same everywhere, and what was 8 bits before comes out as it was. sharding: where they go then.
    """
    dtypes, shapes = eight_bits.kernels(abstract, form), checkpoint.abstract_parameters(abstract)
    arrays = checkpoint.load_batches(
        reader, dtype=lambda path: (reader.shapes if path in dtypes else shapes)[path].dtype
    )
    made = eight_bits.rounded(arrays, dtypes)
    flat = {path: jax.device_put(x, sharding) if sharding else x for path, x in made}
    eight_bits.narrow(abstract, dtypes)
    return checkpoint.fill(abstract, flat)


def _require_form(folder: Path, abstract: Any, shapes: Mapping[str, Any], stored: Form) -> None:
    """ValueError where 8-bit matrices are not what the directory says that they are."""
    expected = checkpoint.abstract_parameters(abstract)
    for path, dtype in eight_bits.kernels(abstract, stored).items():
        if shapes[path].dtype != expected[path].dtype:
            raise ValueError(
                f"{folder} is damaged: {told(path, 80)} is {shapes[path].dtype}, expected {dtype}; "
                "make the model again"
            )


def compute_dtype(dtype: str | None) -> str:
    """The dtype to compute in: what is asked for, else what suits the device.

    A CPU only emulates bfloat16, so it computes in float32; everything else in bfloat16, in which
    the models keep float32 where it matters: residual streams, norms, logits, sums of codes, the
    last layer of a decoder.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
    return dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
