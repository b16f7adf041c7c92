"""Names of Infinity transformers in released checkpoints, and the configuration read from shapes.

Released files number blocks within chunks (`block_chunks.i.module.j`); models built with one chunk
use `blocks.n`. Rules are written for `blocks.n`, and `table` renames for the chunks of a config.
"""

from __future__ import annotations

import re

import numpy as np

from sparvar_convert.rules import (
    KEEP,
    NUMBER,
    PER_HEAD,
    TRANSPOSE,
    ConversionError,
    Ignore,
    Rule,
    Table,
    must_be_zero,
    require_numbers,
    require_rank,
    squeeze,
)
from sparvar_convert.stream import Reader
from sparvar_jax.models.infinity import InfinityConfig
from sparvar_jax.weights.json_file import build

_CHUNKED = re.compile(rf"block_chunks\.({NUMBER})\.module\.({NUMBER})\.(.+)")
_BLOCK = re.compile(rf"blocks\.({NUMBER})\.(.+)")
_STALE = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
_PATCHIFY_BITS = 56  # the one released width whose tokens cover 2x2 latents: 4 x 14


def _linear(source: str, target: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{source}.weight", f"{target}.kernel", TRANSPOSE),
        Rule(f"{source}.bias", f"{target}.bias", KEEP),
    )


def _attention(source: str, target: str, theirs: str, ours: str) -> tuple[Rule, ...]:
    """The joint projection without bias, the value bias, and the output projection."""
    return (
        Rule(f"{source}.{theirs}.weight", f"{target}.{ours}.kernel", TRANSPOSE),
        Rule(f"{source}.v_bias", f"{target}.v_bias"),
        *_linear(f"{source}.proj", f"{target}.proj"),
    )


_B = "blocks.{i}"
_RULES = (
    Rule("cfg_uncond", "uncond_text"),
    Rule("text_norm.weight", "text_norm.scale"),
    Rule("text_proj_for_sos.ca.mat_q", "text_pool.query", squeeze(0)),
    *_attention("text_proj_for_sos.ca", "text_pool", "mat_kv", "kv"),
    *_linear("text_proj_for_ca.0", "text_proj.fc1"),
    *_linear("text_proj_for_ca.2", "text_proj.fc2"),
    Rule("pos_start", "pos_start", squeeze(0, 1)),
    Rule("lvl_embed.weight", "level_embed"),
    *_linear("word_embed", "word_embed"),
    *_linear("shared_ada_lin.1", "shared_ada"),
    Rule(f"{_B}.ada_gss", f"{_B}.ada_gss", squeeze(0, 1)),
    *_attention(f"{_B}.sa", f"{_B}.attn", "mat_qkv", "qkv"),
    Rule(f"{_B}.sa.q_bias", f"{_B}.attn.q_bias"),
    Rule(f"{_B}.sa.scale_mul_1H11", f"{_B}.attn.log_temperature", PER_HEAD),
    Rule(f"{_B}.ca_norm.weight", f"{_B}.cross_norm.scale"),
    Rule(f"{_B}.ca_norm.bias", f"{_B}.cross_norm.bias"),
    *_linear(f"{_B}.ca.mat_q", f"{_B}.cross.q"),
    *_attention(f"{_B}.ca", f"{_B}.cross", "mat_kv", "kv"),
    *_linear(f"{_B}.ffn.fc1", f"{_B}.ffn.fc1"),
    *_linear(f"{_B}.ffn.fc2", f"{_B}.ffn.fc2"),
    *_linear("head_nm.ada_lin.1", "head_ada"),
    *_linear("head", "head"),
)


def _zero_bias(source: str, like: str) -> Ignore:
    return Ignore(
        f"{source}.zero_k_bias",
        "the bias of keys is a zero buffer",
        check=must_be_zero,
        like=f"{like}.v_bias",
        recreate=np.zeros_like,
    )


_IGNORED = (
    _zero_bias("text_proj_for_sos.ca", "text_pool"),
    _zero_bias(f"{_B}.sa", f"{_B}.attn"),
    _zero_bias(f"{_B}.ca", f"{_B}.cross"),
    *(Ignore(name, "a stale buffer of training: masks and scale indices") for name in _STALE),
)


def table(config: InfinityConfig) -> Table:
    """Rules with the block numbering of `config.chunks` chunks (1: plain `blocks.n`)."""
    per_chunk = config.depth // config.chunks

    def canonical(key: str) -> str:
        match = _CHUNKED.fullmatch(key)
        if match is None or int(match[2]) >= per_chunk or config.chunks == 1:
            return key
        return f"blocks.{int(match[1]) * per_chunk + int(match[2])}.{match[3]}"

    def released(key: str) -> str:
        match = _BLOCK.fullmatch(key)
        if match is None or config.chunks == 1:
            return key
        chunk, block = divmod(int(match[1]), per_chunk)
        return f"block_chunks.{chunk}.module.{block}.{match[2]}"

    return Table("infinity", _RULES, _IGNORED, canonical, released)


def infer_config(reader: Reader, *, patchify: bool | None = None) -> InfinityConfig:
    """Configuration of a checkpoint from its names and shapes.

    `text_max_length` follows the rows of `cfg_uncond`: a model with a shorter table of
    unconditional features has nothing to set against longer prompts. Whether tokens cover 2x2
    latents is not in the file: None takes the released 56-bit models as such.

    Raises ConversionError where a key that carries a size is missing, or blocks are.
    """
    depth, chunks, first = _blocks(list(reader.names()))
    text_length, text_width = _sizes(reader, "cfg_uncond", 2)
    levels, width = _sizes(reader, "lvl_embed.weight", 2)
    bits = _sizes(reader, "word_embed.weight", 2)[1]
    try:
        values = {
            "depth": depth,
            "width": width,
            "heads": max(_sizes(reader, f"{first}.sa.scale_mul_1H11", 4)[1:3]),
            "text_width": text_width,
            "bits": bits,
            "mlp_width": _sizes(reader, f"{first}.ffn.fc1.weight", 2)[0],
            "chunks": chunks,
            "patchify": bits == _PATCHIFY_BITS if patchify is None else patchify,
            "text_max_length": text_length,
            "levels": levels,
        }
        return build(InfinityConfig, values, "shapes of the tensors")
    except ValueError as error:
        raise ConversionError(f"infinity checkpoint with impossible sizes: {error}") from error


def _sizes(reader: Reader, key: str, rank: int) -> tuple[int, ...]:
    if key not in set(reader.names()):
        raise ConversionError(
            f"infinity checkpoint lacks {key}, which carries a size of the model: "
            "use the complete checkpoint"
        )
    return require_rank(reader.shape(key), key, rank)


def _blocks(names: list[str]) -> tuple[int, int, str]:
    """Depth, chunks and the first block's prefix; every chunk must hold the same blocks."""
    chunked = {(int(m[1]), int(m[2])) for m in map(_CHUNKED.fullmatch, names) if m}
    plain = {int(m[1]) for m in map(_BLOCK.fullmatch, names) if m}
    if bool(chunked) == bool(plain):
        raise ConversionError(
            "infinity checkpoint needs either `block_chunks.i.module.j` or `blocks.n`, "
            f"it has {'both' if chunked else 'neither'}"
        )
    if plain:
        require_numbers(names, "blocks", max(plain) + 1)
        missing = sorted(set(range(max(plain) + 1)) - plain)
        if missing:
            raise ConversionError(f"infinity checkpoint lacks {len(missing)} blocks: {missing[:6]}")
        return len(plain), 1, "blocks.0"
    chunks, per_chunk = (max(pair[axis] for pair in chunked) + 1 for axis in (0, 1))
    require_numbers(names, "blocks", chunks * per_chunk)
    missing = sorted({(i, j) for i in range(chunks) for j in range(per_chunk)} - chunked)
    if missing:
        raise ConversionError(
            f"infinity checkpoint lacks {len(missing)} blocks (chunk, block): {missing[:6]}"
        )
    return chunks * per_chunk, chunks, "block_chunks.0.module.0"
