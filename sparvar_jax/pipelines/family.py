"""The model families: what loading, conversion, memory, commands and benchmarks know of them.

A new family is one entry: its parts, what it draws, its options, and when its parts fit together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sparvar_jax.models.bsq_vae import BsqVae, BsqVaeConfig
from sparvar_jax.models.hart import Hart, HartConfig
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.models.qwen2 import Qwen2, Qwen2Config
from sparvar_jax.models.t5 import T5Config, T5Encoder
from sparvar_jax.models.var import Var, VarConfig
from sparvar_jax.models.vqvae import Vqvae, VqvaeConfig
from sparvar_jax.pipelines.class_requests import ClassDefaults, ClassOptions
from sparvar_jax.pipelines.prefix_requests import PrefixDefaults, PrefixOptions
from sparvar_jax.pipelines.requests import Defaults, Options
from sparvar_jax.pipelines.subjects import Classes, PrefixPrompted, Prompted

Kind = tuple[type, type]
"""Module and configuration class."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    kind: of its transformer, as `config.json` names it. parts: part -> kind -> classes. subject:
    what it draws from, made for a loaded model. defaults, options: what a call may say. agree:
    raises ValueError unless parts fit together. stride: pixels of a side that a token covers.
    """

    kind: str
    parts: Mapping[str, Mapping[str, Kind]]
    subject: Callable[..., Any]
    defaults: type
    options: type
    agree: Callable[[Any], None]
    stride: Callable[[Any], int]

    @property
    def draws(self) -> str:
        """What its pictures are drawn from: "prompts" or "classes"."""
        return self.subject.draws

    @property
    def encoder(self) -> Any:
        """Class of what makes text features of prompts, None where there are none."""
        return self.subject.encoder

    def asked(self, name: str, options: Mapping[str, Any]) -> Any:
        """The options of a call to the model `name`; ValueError for any that are unknown."""
        known = [field.name for field in dataclasses.fields(self.options)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(
                f"{name} draws {self.draws} and has no option {', '.join(unknown)}: "
                f"use {', '.join(known)}"
            )
        return self.options(**options)


def _infinity_agrees(model: Any) -> None:
    config, codes = model.transformer.config, model.tokenizer.config.code_width
    if model.text_encoder.config.width != config.text_width:
        raise ValueError(
            f"{model.name}: the transformer expects text features of width {config.text_width}, "
            f"the text encoder gives {model.text_encoder.config.width}: convert the text "
            "encoder this transformer was trained with"
        )
    if config.code_width != codes:
        raise ValueError(
            f"{model.name}: the transformer draws codes of width {config.code_width}, the "
            f"tokenizer has {codes}: convert the tokenizer this transformer was trained with"
        )


def _var_agrees(model: Any) -> None:
    config, tokenizer = model.transformer.config, model.tokenizer.config
    shape = (config.vocab, config.code_width)
    if shape != (tokenizer.vocab, tokenizer.code_width):
        raise ValueError(
            f"{model.name}: the transformer draws from {shape[0]} codes of width {shape[1]}, "
            f"the tokenizer has {tokenizer.vocab} of width {tokenizer.code_width}: convert "
            "the VQVAE this transformer was trained with"
        )


def _hart_agrees(model: Any) -> None:
    config = model.transformer.config
    _var_agrees(model)
    if model.text_encoder.config.width != config.text_width:
        raise ValueError(
            f"{model.name}: the transformer expects text features of width {config.text_width}, "
            f"the text encoder gives {model.text_encoder.config.width}: convert the text "
            "encoder this transformer was trained with"
        )


INFINITY = Family(
    kind="infinity",
    parts={
        "transformer": {"infinity": (Infinity, InfinityConfig)},
        "tokenizer": {"bsq_vae": (BsqVae, BsqVaeConfig)},
        "text": {"t5": (T5Encoder, T5Config)},
    },
    subject=Prompted,
    defaults=Defaults,
    options=Options,
    agree=_infinity_agrees,
    stride=lambda model: (
        model.tokenizer.config.stride * (2 if model.transformer.config.patchify else 1)
    ),
)
VAR = Family(
    kind="var",
    parts={
        "transformer": {"var": (Var, VarConfig)},
        "tokenizer": {"vqvae": (Vqvae, VqvaeConfig)},
    },
    subject=Classes,
    defaults=ClassDefaults,
    options=ClassOptions,
    agree=_var_agrees,
    stride=lambda model: model.tokenizer.config.stride,
)
HART = Family(
    kind="hart",
    parts={
        "transformer": {"hart": (Hart, HartConfig)},
        "tokenizer": {"hart_vqvae": (Vqvae, VqvaeConfig)},
        "text": {"qwen2": (Qwen2, Qwen2Config)},
    },
    subject=PrefixPrompted,
    defaults=PrefixDefaults,
    options=PrefixOptions,
    agree=_hart_agrees,
    stride=lambda model: model.tokenizer.config.stride,
)
_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known to loading and to every command. Raises ValueError for a taken kind."""
    if _FAMILIES.get(family.kind, family) != family:
        raise ValueError(f"another family has the kind {family.kind!r} already: name it otherwise")
    _FAMILIES[family.kind] = family


def families() -> tuple[Family, ...]:
    """All known families."""
    return tuple(_FAMILIES.values())


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model directory's `config.json`.

    Raises ValueError where the transformer is missing or of an unknown kind.
    """
    entry = config.get("transformer")
    if not isinstance(entry, Mapping):
        raise ValueError(
            "the model has no transformer: add it with `sparvar convert SOURCE --into`"
        )
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise ValueError(f"unknown kind {kind!r} of transformer, expected {' or '.join(_FAMILIES)}")
    return _FAMILIES[kind]


for _family in (INFINITY, VAR, HART):
    register_family(_family)
