"""The kinds of checkpoints: how one is recognised, configured and described by rules.

A kind knows its part of a model directory, its signature (keys that no other kind has), how its
configuration is read from shapes, and its rule table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from sparvar_convert.rules import ConversionError, Table
from sparvar_convert.sources import Source
from sparvar_convert.tables import bsq_vae, hart, hart_vqvae, infinity, qwen2, t5, var, vqvae
from sparvar_jax.models.bsq_vae import BsqVae, BsqVaeConfig
from sparvar_jax.models.hart import Hart, HartConfig
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.models.prefix_tokens import open_prefix_tokenizer
from sparvar_jax.models.qwen2 import Qwen2, Qwen2Config
from sparvar_jax.models.t5 import T5Config, T5Encoder
from sparvar_jax.models.text_tokens import open_tokenizer
from sparvar_jax.models.var import Var, VarConfig
from sparvar_jax.models.vqvae import Vqvae, VqvaeConfig
from sparvar_jax.weights import checkpoint
from sparvar_jax.weights.json_file import build, place_of
from sparvar_jax.weights.told import listed, told

_LARGE_BITS = 56
_SCALES = "scales of heads (scale_mul_1H11) as [1, H, 1, 1]; a flash kernel wants [1, 1, H, 1]"


@dataclass(frozen=True)
class Family:
    """One kind of checkpoint; parts of one `model_family` make a model together.

    signature: regexes; a checkpoint is of this kind when each matches one of its keys.
    table: rules from the configuration and the source's keys. defaults: entries for `config.json`.
    beside: files of the source's folder that are copied into the part, which `open_beside` reads.
    note: what is written back otherwise than some sources have it.
    """

    kind: str
    title: str
    part: str
    model_family: str
    signature: tuple[str, ...]
    module: type[nnx.Module]
    config: type
    infer_config: Callable[[Source], Any]
    table: Callable[[Any, Iterable[str]], Table]
    defaults: Callable[[Any, Source], Mapping[str, Any]] = field(default=lambda config, source: {})
    beside: tuple[str, ...] = ()
    open_beside: Callable[[Path], Any] = open_tokenizer
    note: str = ""

    def expected(self, config: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Dotted path -> shape of every parameter of this configuration."""
        return checkpoint.abstract_parameters(self.abstract(config))

    def abstract(self, config: Any) -> nnx.Module:
        """The module of this configuration with shapes in the place of parameters."""
        module: Any = self.module
        return nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))


@dataclass(frozen=True)
class _HfT5:
    """Types of the fields of a Hugging Face `config.json` that `T5Config.from_hf` reads."""

    vocab_size: int = 1
    d_model: int = 1
    d_kv: int = 1
    d_ff: int = 1
    num_layers: int = 1
    num_heads: int = 1
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    model_type: str = "t5"


@dataclass(frozen=True)
class _HfRope:
    """Types of what a Hugging Face `config.json` says of rotary positions in an object."""

    rope_theta: float = 10000.0
    rope_type: str = "default"
    type: str = "default"


_NESTED = ("rope_parameters", "rope_scaling")


def _known(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What an object says of rotary positions, checked."""
    given = {f.name: values[f.name] for f in fields(_HfRope) if f.name in values}
    typed = asdict(build(_HfRope, given, place))
    return {name: typed[name] for name in given}


def _hf_config(kind: Any, described: type, source: Source) -> Any:
    """The configuration `kind.from_hf` makes of the `config.json` beside the weights.

    described: the types of its fields.
    """
    if source.settings is None:
        raise ConversionError(
            f"{source.name} has a text encoder's weights but no config.json beside them: give the "
            "whole folder"
        )
    place = place_of(source.settings)
    known = {field.name for field in fields(described)}
    given = {key: value for key, value in source.settings.items() if key in known}
    nested = {key: given.pop(key) for key in _NESTED if isinstance(given.get(key), Mapping)}
    try:
        typed = asdict(build(described, given, place))
        parts = {key: _known(values, place) for key, values in nested.items()}
        config = kind.from_hf({key: typed[key] for key in given} | parts)
        return build(kind, asdict(config), place)
    except ValueError as error:
        raise ConversionError(f"{source.name}: {error}") from error


@dataclass(frozen=True)
class _HfQwen2:
    """Types of the fields of a Hugging Face `config.json` that `Qwen2Config.from_hf` reads."""

    vocab_size: int = 1
    hidden_size: int = 1
    num_attention_heads: int = 1
    num_key_value_heads: int = 0
    intermediate_size: int = 1
    num_hidden_layers: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_parameters: None = None
    rope_scaling: None = None
    use_sliding_window: bool = False
    hidden_act: str = "silu"
    model_type: str = "qwen2"


def _infinity_defaults(config: Any, source: Source) -> dict[str, Any]:
    """What the authors' scripts use for this size of model."""
    small = "512x512" in source.name
    return {
        "plan": "dense",
        "guidance": 3.0,
        "temperature": 1.0 if config.bits == _LARGE_BITS else 0.5,
        "top_p": 0.97,
        "size": "0.25M" if small else "1M",
        "aspect_ratio": 1.0,
    }


def _from_reader(infer: Callable[[Any], Any], source: Source) -> Any:
    return infer(source.reader)


FAMILIES = (  # the first that fits counts: a VQVAE has the marks of a BSQ tokenizer too
    Family(
        "infinity",
        "Infinity transformer",
        "transformer",
        "infinity",
        (r"(block_chunks|blocks)\.\d+\..*ada_gss", r"text_proj_for_(ca|sos)\..+"),
        Infinity,
        InfinityConfig,
        partial(_from_reader, infinity.infer_config),
        lambda config, names: infinity.table(config),
        _infinity_defaults,
        note=_SCALES,
    ),
    Family(
        "t5",
        "T5 text encoder",
        "text",
        "infinity",
        (r"encoder\.block\.\d+\.layer\.0\.SelfAttention\..+",),
        T5Encoder,
        T5Config,
        partial(_hf_config, T5Config, _HfT5),
        lambda config, names: t5.table_for(names or (t5.SHARED,)),
        beside=("tokenizer.json", "spiece.model"),
    ),
    Family(
        "var",
        "VAR transformer",
        "transformer",
        "var",
        (r"class_emb\.weight",),
        Var,
        VarConfig,
        partial(_from_reader, var.infer_config),
        lambda config, names: var.table(config.sides),
        note=_SCALES,
    ),
    Family(
        "vqvae",
        "VAR VQVAE tokenizer",
        "tokenizer",
        "var",
        (r"quantize\.embedding\.weight",),
        Vqvae,
        VqvaeConfig,
        partial(_from_reader, vqvae.infer_config),
        lambda config, names: vqvae.TABLE,
    ),
    Family(
        "hart",
        "HART transformer",
        "transformer",
        "hart",
        (r"context_embed\.weight", r"diffloss\.net\..+"),
        Hart,
        HartConfig,
        hart.infer_config,
        lambda config, names: hart.table(config),
    ),
    Family(
        "hart_vqvae",
        "HART hybrid tokenizer",
        "tokenizer",
        "hart",
        (r"vae\.quantize\.embedding\.weight",),
        Vqvae,
        VqvaeConfig,
        partial(_from_reader, hart_vqvae.infer_config),
        lambda config, names: hart_vqvae.TABLE,
    ),
    Family(
        "qwen2",
        "Qwen2 text encoder",
        "text",
        "hart",
        (r"model\.layers\.\d+\.self_attn\.q_proj\.bias",),
        Qwen2,
        Qwen2Config,
        partial(_hf_config, Qwen2Config, _HfQwen2),
        lambda config, names: qwen2.TABLE,
        beside=("tokenizer.json",),
        open_beside=open_prefix_tokenizer,
    ),
    Family(
        "bsq_vae",
        "Infinity BSQ tokenizer",
        "tokenizer",
        "infinity",
        (r"encoder\.conv_out(\.conv)?\.(weight|bias)", r"decoder\.up\.\d+\..+"),
        BsqVae,
        BsqVaeConfig,
        partial(_from_reader, bsq_vae.infer_config),
        lambda config, names: bsq_vae.TABLE,
    ),
)


def family_of(kind: str) -> Family:
    """The family named `kind`; ConversionError for an unknown one."""
    for family in FAMILIES:
        if family.kind == kind:
            return family
    known = ", ".join(family.kind for family in FAMILIES)
    raise ConversionError(f"unknown kind of checkpoint {told(kind, 60)!r}: choose one of {known}")


def detect(source: Source) -> Family:
    """The kind of a checkpoint by its keys; ConversionError where it is none we know."""
    names = list(source.reader.names())
    for family in FAMILIES:
        if all(any(re.fullmatch(mark, name) for name in names) for mark in family.signature):
            return family
    titles = ", ".join(family.title for family in FAMILIES)
    raise ConversionError(
        f"{source.name} ({source.container}, {len(names)} tensors such as "
        f"{listed(names, 3)}) is of no known kind: expected one of {titles}"
    )
