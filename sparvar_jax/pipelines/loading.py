"""A model directory in memory: its parts, checked against each other, and its defaults."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from sparvar_jax.models import eight_bits
from sparvar_jax.models.eight_bits import FORMS
from sparvar_jax.models.layers import DtypeName, Precision
from sparvar_jax.pipelines import parts
from sparvar_jax.pipelines.family import Family, families, family_of
from sparvar_jax.pipelines.parts import DEMO, compute_dtype, model_folder
from sparvar_jax.runtime import unused_gpu
from sparvar_jax.runtime.devices import Asked, Devices, devices_of
from sparvar_jax.runtime.progress import Progress
from sparvar_jax.weights import checkpoint

__all__ = ["DEMO", "Model", "compute_dtype", "describe_model", "load_model", "model_folder"]


@dataclasses.dataclass(frozen=True)
class Model:
    """The loaded parts of one model directory; parts that its family lacks are None.

    Raises ValueError where the parts do not fit together.
    """

    family: Family
    transformer: Any
    tokenizer: Any
    text_encoder: Any = None
    text_tokenizer: Any = None
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

    def with_parts(self, modules: Mapping[str, Any]) -> Model:
        """The model with other modules in place of some parts."""
        names = {"text": "text_encoder"}
        return dataclasses.replace(
            self, **{names.get(part, part): module for part, module in modules.items()}
        )

    def with_stream(self, dtype: DtypeName) -> Model:
        """The model with its residual stream in another dtype; weights are the same arrays.

        Raises ValueError for other dtypes than float32 and bfloat16.
        """
        config = self.transformer.config
        if config.precision.stream == dtype:
            return self
        Precision(stream=dtype)
        transformer = nnx.merge(*nnx.split(self.transformer))
        transformer.config = dataclasses.replace(config, stream=dtype)
        return self.with_parts({"transformer": transformer})

    @property
    def stride(self) -> int:
        """Pixels of a side that one token covers."""
        return self.family.stride(self)

    @property
    def codebook(self) -> Any:
        """What turns tokens into codes where that needs weights, else None."""
        return getattr(self.tokenizer, "codebook", None)


def family_in(folder: Path) -> Family:
    """The family of a model directory."""
    return family_of(checkpoint.read_config(folder))


def part_config(config: dict[str, Any], part: str, dtype: str | None = None) -> parts.Kind:
    """Module class and config of one part of any family; see `parts.part_config`."""
    kinds = {
        kind: classes
        for family in families()
        for kind, classes in family.parts.get(part, {}).items()
    }
    return parts.part_config(config, part, kinds, dtype)


def abstract_part(
    config: dict[str, Any],
    part: str,
    dtype: str | None = None,
    weights: parts.Weights = "dense",
) -> Any:
    """The module of one part with shapes and dtypes instead of arrays.

    Which matrices a file stores in 8 bits its config does not say, so "stored" gives dense ones.
    """
    parts.check_weights(weights)
    kind = part_config(config, part, dtype)
    form = parts.stored_form(config, part, weights, kind)
    if form is None and weights in FORMS:
        form = weights
    return parts.abstract_module(*kind, form)


def load_part(
    folder: Path,
    config: dict[str, Any],
    part: str,
    dtype: str | None = None,
    weights: parts.Weights = "dense",
    sharding: jax.sharding.Sharding | None = None,
) -> Any:
    """One part with its weights, by default on the default device; see `parts.load_module`."""
    kind = part_config(config, part, dtype)
    stored = parts.stored_form(config, part, weights, kind)
    return parts.load_module(folder, part, *kind, weights, stored, sharding)


def load_model(
    directory: str | Path | None = None,
    *,
    dtype: str | None = None,
    text_encoder: bool = True,
    weights: parts.Weights = "dense",
    stream: DtypeName | None = None,
    devices: Devices | None = None,
    progress: Progress | None = None,
) -> Model:
    """Load a model directory, or the demo model.

    dtype: of all parts, see `compute_dtype`. text_encoder: False leaves its weights on disk; the
    model then holds their shapes alone. weights: see `parts.load_module`. stream: of the residual
    stream, None for what the model says (float32, unless it was changed). devices: transformer and
    tokenizer are restored to all of them; the text encoder runs on the default device.
    """
    dtype = compute_dtype(dtype)
    if unused := unused_gpu.advice(platforms=jax.config.values.get("jax_platforms")):
        warnings.warn(unused, stacklevel=3)
    folder = model_folder(directory)
    config = checkpoint.read_config(folder)
    # Everything cheap first: a model that does not fit together is found before any weights.
    model = describe_model(folder, dtype, weights, stream)
    wanted = [part for part in model.parts if text_encoder or part != "text"]
    loaded = {}
    for done, part in enumerate(wanted, 1):
        where = devices.whole if devices and part != "text" else None
        loaded[part] = load_part(folder, config, part, dtype, weights, where)
        if progress:
            progress("load", done, len(wanted))
    model = model.with_parts(loaded)
    return model if stream is None else model.with_stream(stream)


def devices_for(directory: str | Path | None, asked: Asked) -> Devices | None:
    """The devices asked for to draw with a model directory; see `devices_of`."""
    if asked is None:
        return None
    described = describe_model(model_folder(directory))
    return devices_of(asked, described.transformer.config.heads)


def describe_model(
    folder: Path,
    dtype: str | None = None,
    weights: parts.Weights = "dense",
    stream: DtypeName | None = None,
) -> Model:
    """The model with shapes and dtypes in place of weights; dtype None is the stored one.

    Other arguments as in `load_model`.
    """
    config = checkpoint.read_config(folder)
    family = family_of(config)
    modules = {part: abstract_part(config, part, dtype, weights) for part in family.parts}
    if weights == "stored":
        for part, module in modules.items():
            eight_bits.keep_stored(module, checkpoint.part_reader(folder, part).scaled)
    if weights in FORMS and eight_bits.form_of(modules["transformer"]) is None:
        kind = config["transformer"]["kind"]
        raise ValueError(f"a model of kind {kind} has no 8-bit products: leave out {weights}")
    model = Model(
        family,
        modules["transformer"],
        modules["tokenizer"],
        modules.get("text"),
        family.encoder.load_tokenizer(folder / "text") if "text" in modules else None,
        checkpoint.config_from_json(family.defaults, config.get("defaults", {})),
        folder.name,
    )
    return model if stream is None else model.with_stream(stream)
