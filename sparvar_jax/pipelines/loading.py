"""A model directory in memory: its parts, checked against each other, and its defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from sparvar_jax.models.text_tokens import Tokenizer, load_tokenizer
from sparvar_jax.pipelines.family import Family, families, family_of
from sparvar_jax.runtime.progress import Progress
from sparvar_jax.weights import checkpoint
from sparvar_jax.weights.told import told

DEMO = Path(__file__).parents[1] / "demo"


@dataclasses.dataclass(frozen=True)
class Model:
    """The loaded parts of one model directory; parts that its family lacks are None.

    Raises ValueError where the parts do not fit together.
    """

    family: Family
    transformer: Any
    tokenizer: Any
    text_encoder: Any = None
    text_tokenizer: Tokenizer | None = None
    defaults: Any = None
    name: str = "model"

    def __post_init__(self) -> None:
        if self.defaults is None:
            object.__setattr__(self, "defaults", self.family.defaults())
        self.family.agree(self)

    @property
    def parts(self) -> dict[str, Any]:
        """Module of every part."""
        modules = (self.transformer, self.tokenizer, self.text_encoder)
        named = zip(checkpoint.PARTS, modules, strict=True)
        return {part: module for part, module in named if part in self.family.parts}

    def with_parts(self, parts: Mapping[str, Any]) -> Model:
        """The model with other modules in place of some parts."""
        names = {"text": "text_encoder"}
        return dataclasses.replace(
            self, **{names.get(part, part): module for part, module in parts.items()}
        )

    @property
    def stride(self) -> int:
        """Pixels of a side that one token covers."""
        return self.family.stride(self)

    @property
    def codebook(self) -> Any:
        """What turns tokens into codes where that needs weights, else None."""
        return getattr(self.tokenizer, "codebook", None)


def model_folder(directory: str | Path | None) -> Path:
    """The folder of a model; None is the demo model of this installation."""
    if directory is not None:
        folder = Path(directory)
        if not folder.is_dir():
            raise ValueError(f"{folder} does not exist: give the folder `sparvar convert` wrote")
        return folder
    if not (DEMO / checkpoint.CONFIG).is_file():
        raise ValueError("this installation has no demo model: give --model DIR")
    return DEMO


def family_in(folder: Path) -> Family:
    """The family of a model directory."""
    return family_of(checkpoint.read_config(folder))


def part_config(config: dict[str, Any], part: str, dtype: str | None = None) -> tuple[type, Any]:
    """Module class and config of one part; `dtype` overrides the stored compute dtype."""
    entry = config.get(part)
    if not isinstance(entry, dict):
        raise ValueError(f"the model has no {part}: add it with `sparvar convert SOURCE --into`")
    kinds = {
        kind: classes
        for family in families()
        for kind, classes in family.parts.get(part, {}).items()
    }
    if not isinstance(entry.get("kind"), str) or entry["kind"] not in kinds:
        raise ValueError(
            f"unknown kind {told(entry.get('kind'), 60)} of {part}, expected {' or '.join(kinds)}"
        )
    module, config_class = kinds[entry["kind"]]
    values = checkpoint.config_from_json(config_class, entry)
    return module, values if dtype is None else dataclasses.replace(values, dtype=dtype)


def abstract_part(config: dict[str, Any], part: str, dtype: str | None = None) -> Any:
    """The module of one part with shapes and dtypes instead of arrays."""
    module, values = part_config(config, part, dtype)
    return nnx.eval_shape(lambda: module(values, rngs=nnx.Rngs(0)))


def load_part(folder: Path, config: dict[str, Any], part: str, dtype: str | None = None) -> Any:
    """One part with its weights on the default device, in the dtypes its config asks for."""
    abstract = abstract_part(config, part, dtype)
    shapes = checkpoint.abstract_parameters(abstract)
    stored = checkpoint.part_reader(folder, part).shapes
    checkpoint.require_fit(abstract, stored)  # before anything of the sizes in the file is read
    tree = checkpoint.load_part(
        folder, part, dtype=lambda path: shapes.get(path, stored[path]).dtype
    )
    return checkpoint.fill(abstract, tree)


def load_model(
    directory: str | Path | None = None,
    *,
    dtype: str | None = None,
    text_encoder: bool = True,
    progress: Progress | None = None,
) -> Model:
    """Load a model directory, or the demo model.

    dtype: of all parts, see `compute_dtype`. text_encoder: False leaves its weights on disk; the
    model then holds their shapes alone.
    """
    dtype = compute_dtype(dtype)
    folder = model_folder(directory)
    config = checkpoint.read_config(folder)
    # Everything cheap first: a model that does not fit together is found before any weights.
    model = describe_model(folder, dtype)
    wanted = [part for part in model.parts if text_encoder or part != "text"]
    parts = {}
    for done, part in enumerate(wanted, 1):
        parts[part] = load_part(folder, config, part, dtype)
        if progress:
            progress("load", done, len(wanted))
    return model.with_parts(parts)


def compute_dtype(dtype: str | None) -> str:
    """The dtype to compute in: what is asked for, else what suits the device.

    A CPU only emulates bfloat16, so it computes in float32; everything else in bfloat16, in which
    the models keep float32 where it matters: residual streams, norms, logits, sums of codes, the
    last layer of a decoder.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
    return dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def describe_model(folder: Path, dtype: str | None = None) -> Model:
    """The model with shapes and dtypes in place of weights; dtype None is the stored one."""
    config = checkpoint.read_config(folder)
    family = family_of(config)
    parts = {part: abstract_part(config, part, dtype) for part in family.parts}
    return Model(
        family,
        parts["transformer"],
        parts["tokenizer"],
        parts.get("text"),
        load_tokenizer(folder / "text") if "text" in parts else None,
        checkpoint.config_from_json(family.defaults, config.get("defaults", {})),
        folder.name,
    )
