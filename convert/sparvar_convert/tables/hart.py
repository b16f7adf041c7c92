"""Names of HART transformers, `llm/` of the released repository: EMA weights or the others.

The buffers `lvl_1L` (level of every cache row) and `attn_bias_for_masking` follow from the text's
length and the sides of the token grids; they are checked on import and recreated on export, as is
`zero_k_bias`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from sparvar_convert.rules import (
    TRANSPOSE,
    ConversionError,
    Ignore,
    Rule,
    Table,
    must_be_zero,
    require_rank,
)
from sparvar_convert.sources import Source
from sparvar_convert.stream import Reader
from sparvar_jax.models.hart_parts import HEAD_DIM, HartConfig
from sparvar_jax.weights.json_file import build, place_of

_BLOCK = "blocks.{i}."
_HEAD = "diffloss.net."
_MOST_TOKENS = 16384  # the mask of the released files has a GiB then
_ROWS = 512  # of the mask, compared at a time


def _linear(source: str, target: str) -> tuple[Rule, Rule]:
    return (
        Rule(source + ".weight", target + ".kernel", TRANSPOSE),
        Rule(source + ".bias", target + ".bias"),
    )


def _pair(source: str, target: str) -> tuple[Rule, ...]:
    """Entries 0 and 2 of a sequence with an activation between them."""
    return (*_linear(source + ".0", target + ".fc1"), *_linear(source + ".2", target + ".fc2"))


_RESIDUAL = (
    *_pair(_HEAD + "time_embed.mlp", "residual.time_embed"),
    *_linear(_HEAD + "{name:cond_embed|input_proj}", "residual.{name}"),
    Rule(_HEAD + "res_blocks.{i}.in_ln.weight", "residual.blocks.{i}.norm.scale"),
    Rule(_HEAD + "res_blocks.{i}.in_ln.bias", "residual.blocks.{i}.norm.bias"),
    *_pair(_HEAD + "res_blocks.{i}.mlp", "residual.blocks.{i}"),
    *_linear(_HEAD + "res_blocks.{i}.adaLN_modulation.1", "residual.blocks.{i}.ada"),
    *_linear(_HEAD + "final_layer.adaLN_modulation.1", "residual.final_ada"),
    *_linear(_HEAD + "final_layer.linear", "residual.final"),
)
_RULES = (
    Rule("context_norm.weight", "context_norm.scale"),
    *_linear("{name:context_embed|word_embed}", "{name}"),
    *_pair("lvl_embed.mlp", "level_embed"),
    Rule("lvl_embed.weight", "level_embed"),
    Rule(_BLOCK + "ln_wo_grad.weight", _BLOCK + "norm.scale"),
    Rule(_BLOCK + "attn.qkv_proj.weight", _BLOCK + "attn.qkv.kernel", TRANSPOSE),
    Rule(_BLOCK + "attn.{name:q_bias|v_bias}", _BLOCK + "attn.{name}"),
    *_linear(_BLOCK + "attn.proj", _BLOCK + "attn.proj"),
    Rule(_BLOCK + "ffn.{name:gate|up|down}_proj.weight", _BLOCK + "ffn.{name}.kernel", TRANSPOSE),
    Rule("head_nm.ln_wo_grad.weight", "head_norm.scale"),
    *_linear("head_nm.ada_lin.1", "head_ada"),
    *_linear("head", "head"),
    Rule("decoder_norm.weight", "residual_norm.scale"),
    *_RESIDUAL,
)


def levels_of(config: HartConfig) -> np.ndarray:
    """The scale of every cache row, int64 [rows]."""
    schedule = config.schedule
    return np.repeat(np.arange(len(schedule)), [scale.tokens for scale in schedule.scales])


def _hidden(levels: np.ndarray, start: int, stop: int, dtype: Any) -> np.ndarray:
    """Rows of the training mask: 0 where a key is of the query's scale or an earlier one."""
    seen = levels[start:stop, None] >= levels[None]
    return np.where(seen, dtype.type(0), dtype.type(-np.inf))


def _mask_check(levels: np.ndarray) -> Callable[[np.ndarray], str | None]:
    def check(array: np.ndarray) -> str | None:
        rows = len(levels)
        if array.shape == (1, 1, rows, rows):
            starts = range(0, rows, _ROWS)  # in slices: all of it is as large as the array
            same = (
                np.array_equal(array[0, 0, at : at + _ROWS], _hidden(levels, at, at + _ROWS, f4))
                for at in starts
            )
            if all(same):
                return None
        return f"must be the mask of these token grids, {[1, 1, rows, rows]}"

    f4 = np.dtype(np.float32)
    return check


def table(config: HartConfig) -> Table:
    """Rules of a HART of this configuration."""
    tokens = config.schedule.tokens
    if tokens > _MOST_TOKENS:
        raise ConversionError(
            f"grids of {tokens} tokens are too large: at most {_MOST_TOKENS} are supported"
        )
    levels = levels_of(config)

    def level_check(array: np.ndarray) -> str | None:
        same = array.shape == (1, tokens) and np.array_equal(array[0], levels)
        return None if same else f"must be the levels of these token grids, {[1, tokens]}"

    ignored = (
        Ignore(
            _BLOCK + "attn.zero_k_bias",
            "keys have no bias: a zero buffer",
            check=must_be_zero,
            like=_BLOCK + "attn.q_bias",
            recreate=np.zeros_like,
        ),
        Ignore(
            "lvl_1L",
            "follows from the sides of the token grids",
            check=level_check,
            like="residual_norm.scale",
            recreate=lambda array: levels[None].astype(np.int64),
        ),
        Ignore(
            "attn_bias_for_masking",
            "follows from the sides of the token grids",
            check=_mask_check(levels),
            like="residual_norm.scale",
            recreate=lambda array: _hidden(levels, 0, tokens, array.dtype)[None, None],
        ),
    )
    return Table("hart", _RULES, ignored)


@dataclass(frozen=True)
class _Settings:
    """The fields of the released `config.json` that shapes do not tell, or that must be so.

    num_sampling_steps is a text there.
    """

    num_heads: int = 0
    num_sampling_steps: str = "8"
    norm_eps: float = 1e-6
    attn_type: str = "llama"
    mlp_type: str = "llama"
    sampler: str = "iddpm"
    disable_aln: bool = True
    shared_aln: bool = False
    attn_l2_norm: bool = False
    use_cross_attn: bool = False


_FREE = ("num_heads", "num_sampling_steps")


def _settings(source: Source) -> _Settings:
    """What `config.json` says; ConversionError for what is not built."""
    known = {field.name for field in fields(_Settings)}
    given = {key: value for key, value in (source.settings or {}).items() if key in known}
    steps = given.get("num_sampling_steps", "8")
    if type(steps) is int:
        given["num_sampling_steps"] = str(steps)
    place = place_of(source.settings) if source.settings is not None else "config.json"
    try:
        found = build(_Settings, given, place)
    except ValueError as error:
        raise ConversionError(f"{source.name}: {error}") from error
    for field in fields(_Settings):
        value = getattr(found, field.name)
        if field.name not in _FREE and value != field.default:
            raise ConversionError(
                f"{source.name}: config.json has {field.name} {value!r}, expected "
                f"{field.default!r}: only the released kind of HART is supported"
            )
    if not found.num_sampling_steps.isascii() or not found.num_sampling_steps.isdigit():
        raise ConversionError(
            f"{source.name}: config.json has num_sampling_steps {found.num_sampling_steps!r}, "
            "expected a number of steps such as '8'"
        )
    return found


def infer_config(source: Source) -> HartConfig:
    """The shape of a HART from its tensors, and from `config.json` what they do not tell.

    Without `config.json` heads have 64 channels and residuals take 8 steps, as released.
    """
    reader, settings = source.reader, _settings(source)
    names = set(reader.names())

    def shape(key: str, rank: int = 2) -> tuple[int, ...]:
        if key not in names:
            raise ConversionError(
                f"this is not a complete HART: {key} is missing; use the released folder llm/"
            )
        return require_rank(reader.shape(key), key, rank)

    if "blocks.0.ffn.fc1.weight" in names:
        raise ConversionError(
            "this HART has GELU feed-forward layers (ffn.fc1), expected gated ones "
            "(ffn.gate_proj): only the released kind of HART is supported"
        )
    width, text_width = shape("context_embed.weight")
    text_tokens, sides = _grids(reader, names)
    values = {
        "depth": _count(names, "blocks.{}.attn.qkv_proj.weight"),
        "width": width,
        "heads": settings.num_heads or width // HEAD_DIM,
        "sides": sides,
        "text_tokens": text_tokens,
        "text_width": text_width,
        "vocab": shape("head.weight")[0],
        "code_width": shape("word_embed.weight")[1],
        "mlp_width": shape("blocks.0.ffn.gate_proj.weight")[0],
        "context_norm": "context_norm.weight" in names,
        "sinusoidal": "lvl_embed.mlp.0.weight" in names,
        "residual_width": shape(_HEAD + "cond_embed.weight")[0],
        "residual_depth": _count(names, _HEAD + "res_blocks.{}.in_ln.weight"),
        "residual_steps": int(settings.num_sampling_steps[:9]),
    }
    try:
        return build(HartConfig, values, "shapes of the tensors")
    except ValueError as error:
        raise ConversionError(f"hart checkpoint with impossible sizes: {error}") from error


def _count(names: set[str], template: str) -> int:
    count = 0
    while template.format(count) in names:
        count += 1
    return count


def _grids(reader: Reader, names: set[str]) -> tuple[int, list[int]]:
    """(tokens of the text, sides of the token grids) by the level buffer, whose values are checked.

    The text stands where a 1x1 grid would: its first token map has that size.
    """
    if "lvl_1L" not in names:
        raise ConversionError(
            "lvl_1L is missing, which tells the token grids: keep that buffer in the file"
        )
    shape = reader.shape("lvl_1L")
    if len(shape) != 2 or shape[0] != 1 or not 0 < shape[1] <= _MOST_TOKENS:
        raise ConversionError(
            f"lvl_1L has shape {list(shape)}, expected [1, tokens] of at most {_MOST_TOKENS}"
        )
    levels = reader.read("lvl_1L").reshape(-1).astype(np.float64)
    if not ((levels == np.floor(levels)) & (levels >= 0) & (levels < len(levels))).all():
        raise ConversionError(
            f"lvl_1L must hold level numbers below {len(levels)}, the number of tokens: the "
            "buffer is damaged, use the released file"
        )
    text, *counts = np.bincount(levels.astype(np.int64)).tolist()
    sides = [round(count**0.5) for count in counts]
    if any(side * side != count for side, count in zip(sides, counts, strict=True)):
        raise ConversionError(
            f"lvl_1L counts {counts} tokens a scale, expected squares: only square token grids "
            "are supported"
        )
    return text, [1, *sides]
