"""Names of class-conditional VAR transformers: released files and training checkpoints.

The buffers `lvl_1L` (level of every token) and `attn_bias_for_masking` follow from the sides of the
token grids; they are checked on import and recreated on export, as is `zero_k_bias`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sparvar_convert.rules import (
    KEEP,
    PER_HEAD,
    TRANSPOSE,
    ConversionError,
    Ignore,
    Rule,
    Table,
    must_be_zero,
    require_rank,
    squeeze,
)
from sparvar_convert.stream import Reader
from sparvar_jax.models.var_parts import HEAD_DIM, SIDES_256, SIDES_512, VarConfig
from sparvar_jax.weights.json_file import build

_BLOCK = "blocks.{i}."
_MOST_TOKENS = 16384  # the mask of the released files has a GiB then


def _linear(source: str, target: str) -> tuple[Rule, Rule]:
    return (
        Rule(source + ".weight", target + ".kernel", TRANSPOSE),
        Rule(source + ".bias", target + ".bias"),
    )


_RULES = (
    Rule("class_emb.weight", "class_embed"),
    Rule("pos_start", "pos_start", squeeze(0, 1)),
    Rule("pos_1LC", "pos_embed", squeeze(0)),
    Rule("lvl_embed.weight", "level_embed"),
    *_linear("word_embed", "word_embed"),
    *_linear("shared_ada_lin.1", "shared_ada"),
    *_linear(_BLOCK + "ada_lin.1", _BLOCK + "ada"),
    Rule(_BLOCK + "ada_gss", _BLOCK + "ada_gss", squeeze(0, 1)),
    Rule(_BLOCK + "attn.mat_qkv.weight", _BLOCK + "attn.qkv.kernel", TRANSPOSE),
    Rule(_BLOCK + "attn.{name:q_bias|v_bias}", _BLOCK + "attn.{name}", KEEP),
    Rule(_BLOCK + "attn.scale_mul_1H11", _BLOCK + "attn.log_temperature", PER_HEAD),
    *_linear(_BLOCK + "attn.proj", _BLOCK + "attn.proj"),
    *_linear(_BLOCK + "ffn.fc{n}", _BLOCK + "ffn.fc{n}"),
    *_linear("head_nm.ada_lin.1", "head_ada"),
    *_linear("head", "head"),
)


def _must_equal(
    shape: tuple[int, ...], expected: Callable[[], np.ndarray]
) -> Callable[[np.ndarray], str | None]:
    def check(array: np.ndarray) -> str | None:
        if array.shape == shape and np.array_equal(array.astype(np.float32), expected()):
            return None
        return f"must be the buffer of these token grids, {list(shape)}"

    return check


def table(sides: tuple[int, ...] = SIDES_256) -> Table:
    """Rules of a VAR whose token grids have these sides."""
    tokens = sum(side * side for side in sides)
    if tokens > _MOST_TOKENS:
        raise ConversionError(
            f"grids of {tokens} tokens are too large: at most {_MOST_TOKENS} are supported"
        )
    levels = np.repeat(np.arange(len(sides)), [side * side for side in sides])[None]

    def hidden() -> np.ndarray:  # made on demand: it has tokens x tokens entries
        return np.where(levels[0][:, None] >= levels[0][None], 0, -np.inf)[None, None]

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
            check=_must_equal(levels.shape, lambda: levels),
            like="pos_embed",
            recreate=lambda array: levels.astype(np.int64),
        ),
        Ignore(
            "attn_bias_for_masking",
            "follows from the sides of the token grids",
            check=_must_equal((1, 1, tokens, tokens), hidden),
            like="pos_start",
            recreate=lambda array: hidden().astype(array.dtype),
        ),
    )
    return Table("var", _RULES, ignored)


TABLE = table()


def infer_config(reader: Reader) -> VarConfig:
    """The shape of a VAR from its tensors; ConversionError where one is missing."""
    names = set(reader.names())

    def shape(key: str, rank: int = 2) -> tuple[int, ...]:
        if key not in names:
            raise ConversionError(
                f"this is not a complete VAR: {key} is missing; use a released file or the "
                "`var_wo_ddp` part of a training checkpoint"
            )
        return require_rank(reader.shape(key), key, rank)

    depth = 0
    while f"blocks.{depth}.attn.mat_qkv.weight" in names:
        depth += 1
    width, code_width = shape("word_embed.weight")
    temperature = "blocks.0.attn.scale_mul_1H11"
    l2_norm = temperature in names
    values = {
        "depth": depth,
        "width": width,
        "heads": max(shape(temperature, 4)[1:3]) if l2_norm else width // HEAD_DIM,
        "sides": _sides(reader, names, shape("pos_1LC", 3)[1]),
        "classes": shape("class_emb.weight")[0] - 1,
        "vocab": shape("head.weight")[0],
        "code_width": code_width,
        "mlp_width": shape("blocks.0.ffn.fc1.weight")[0],
        "shared_ada": "shared_ada_lin.1.weight" in names,
        "l2_norm": l2_norm,
    }
    try:
        return build(VarConfig, values, "shapes of the tensors")
    except ValueError as error:
        raise ConversionError(f"var checkpoint with impossible sizes: {error}") from error


def _counts(reader: Reader, tokens: int) -> np.ndarray:
    """How many tokens every level has, by the level buffer, whose size and values are checked."""
    shape, dtype = reader.shape("lvl_1L"), reader.dtype("lvl_1L")
    if shape not in ((tokens,), (1, tokens)):
        raise ConversionError(f"lvl_1L has shape {list(shape)}, expected [1, {tokens}] as pos_1LC")
    levels = reader.read("lvl_1L").reshape(-1).astype(np.float64)
    whole = levels == np.floor(levels)
    if not tokens or not (whole & (levels >= 0) & (levels < tokens)).all():
        raise ConversionError(
            f"lvl_1L ({dtype.name}) must hold level numbers below {tokens}, the number of tokens: "
            "the buffer is damaged, use the released file"
        )
    return np.bincount(levels.astype(np.int64))


def _sides(reader: Reader, names: set[str], tokens: int) -> tuple[int, ...]:
    """Sides of the token grids: from the level buffer, or the released ones of that length."""
    if "lvl_1L" in names:
        counts = _counts(reader, tokens)
        sides = tuple(round(float(count) ** 0.5) for count in counts)
        if all(side * side == count for side, count in zip(sides, counts, strict=True)):
            return sides
        raise ConversionError(
            f"lvl_1L counts {counts.tolist()} tokens a scale, expected squares: only square "
            "token grids are supported"
        )
    for sides in (SIDES_256, SIDES_512):
        if sum(side * side for side in sides) == tokens:
            return sides
    raise ConversionError(
        f"pos_1LC has {tokens} tokens and lvl_1L is missing: keep that buffer in the file"
    )
