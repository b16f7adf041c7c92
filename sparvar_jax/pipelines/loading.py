"""A model directory in memory: the three parts, checked against each other, and its defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from sparvar_jax.models.bsq_vae import BsqVae, BsqVaeConfig
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.models.t5 import T5Config, T5Encoder
from sparvar_jax.models.text_tokens import Tokenizer, load_tokenizer
from sparvar_jax.models.var import Var, VarConfig
from sparvar_jax.models.vqvae import Vqvae, VqvaeConfig
from sparvar_jax.weights import checkpoint
from sparvar_jax.weights.told import told

DEMO = Path(__file__).parents[1] / "demo"
KINDS: dict[str, dict[str, tuple[type, type]]] = {
    "transformer": {"infinity": (Infinity, InfinityConfig), "var": (Var, VarConfig)},
    "tokenizer": {"bsq_vae": (BsqVae, BsqVaeConfig), "vqvae": (Vqvae, VqvaeConfig)},
    "text": {"t5": (T5Encoder, T5Config)},
}
"""Part -> kind named in `config.json` -> module and config classes."""

PartProgress = Callable[[str, int, int], None]
"""(stage, done, total), called after each part."""


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a call uses where it does not say; the `defaults` of `config.json`.

    guidance, temperature: one value, or one a scale. aspect_ratio: width / height.
    """

    plan: str = "dense"
    guidance: float | tuple[float, ...] = 3.0
    temperature: float | tuple[float, ...] = 0.5
    top_p: float = 0.97
    size: str = "1M"
    aspect_ratio: float = 1.0


@dataclasses.dataclass(frozen=True)
class Model:
    """The loaded parts of one model directory."""

    transformer: Infinity
    tokenizer: BsqVae
    text_encoder: T5Encoder
    text_tokenizer: Tokenizer
    defaults: Defaults = Defaults()
    name: str = "model"

    def __post_init__(self) -> None:
        config, codes = self.transformer.config, self.tokenizer.config.code_width
        if self.text_encoder.config.width != config.text_width:
            raise ValueError(
                f"{self.name}: the transformer expects text features of width {config.text_width}, "
                f"the text encoder gives {self.text_encoder.config.width}: convert the text "
                "encoder this transformer was trained with"
            )
        if config.code_width != codes:
            raise ValueError(
                f"{self.name}: the transformer draws codes of width {config.code_width}, the "
                f"tokenizer has {codes}: convert the tokenizer this transformer was trained with"
            )

    @property
    def parts(self) -> dict[str, Any]:
        """Module of every part."""
        modules = (self.transformer, self.tokenizer, self.text_encoder)
        return dict(zip(checkpoint.PARTS, modules, strict=True))

    @property
    def stride(self) -> int:
        """Pixels of a side that one token covers."""
        return self.tokenizer.config.stride * (2 if self.transformer.config.patchify else 1)


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


def part_config(config: dict[str, Any], part: str, dtype: str | None = None) -> tuple[type, Any]:
    """Module class and config of one part; `dtype` overrides the stored compute dtype."""
    entry = config.get(part)
    if not isinstance(entry, dict):
        raise ValueError(f"the model has no {part}: add it with `sparvar convert SOURCE --into`")
    kinds = KINDS[part]
    if entry.get("kind") not in kinds:
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
    progress: PartProgress | None = None,
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
    loaded = checkpoint.PARTS if text_encoder else ("transformer", "tokenizer")
    parts = model.parts
    for done, part in enumerate(loaded, 1):
        parts[part] = load_part(folder, config, part, dtype)
        if progress:
            progress("load", done, len(loaded))
    return dataclasses.replace(
        model,
        transformer=parts["transformer"],
        tokenizer=parts["tokenizer"],
        text_encoder=parts["text"],
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


def describe_model(folder: Path, dtype: str | None = None) -> Model:
    """The model with shapes and dtypes in place of weights; dtype None is the stored one."""
    config = checkpoint.read_config(folder)
    transformer, tokenizer, text = (abstract_part(config, part, dtype) for part in checkpoint.PARTS)
    return Model(
        transformer,
        tokenizer,
        text,
        load_tokenizer(folder / "text"),
        checkpoint.config_from_json(Defaults, config.get("defaults", {})),
        folder.name,
    )
