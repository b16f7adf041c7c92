"""Names of the released VQVAE, `vae_ch160v4096z32.pth`: without `.conv` and `.norm` wrappers.

The statistics of codebook use (`ema_vocab_hit_SV`) steer nothing; they are left behind and written
back as zeros, because the released loader wants every key.
"""

from __future__ import annotations

import re

import numpy as np

from sparvar_convert.rules import (
    CONV,
    KEEP,
    NUMBER,
    ConversionError,
    Ignore,
    Rule,
    Table,
    require_rank,
)
from sparvar_convert.stream import Reader
from sparvar_jax.models.vqvae import VqvaeConfig
from sparvar_jax.weights.json_file import build

RELEASED_SCALES = 10

_SIDE = "{side:encoder|decoder}"
_PLACE = _SIDE + ".{way:down|up}.{level}."
_NORMS = {"weight": ("scale", KEEP), "bias": ("bias", KEEP)}
_CONVS = {"weight": ("kernel", CONV), "bias": ("bias", KEEP)}


def _pairs(source: str, target: str, names: dict) -> list[Rule]:
    """Rules for the weight and the bias of one layer."""
    return [
        Rule(f"{source}.{theirs}", f"{target}.{ours}", transform)
        for theirs, (ours, transform) in names.items()
    ]


def _resblock(source: str, target: str) -> list[Rule]:
    return [
        *_pairs(source + ".norm{n}", target + ".norm{n}", _NORMS),
        *_pairs(source + ".conv{n}", target + ".conv{n}", _CONVS),
        *_pairs(source + ".nin_shortcut", target + ".shortcut", _CONVS),
    ]


def _attention(source: str, target: str) -> list[Rule]:
    return [
        *_pairs(source + ".norm", target + ".norm", _NORMS),
        *_pairs(source + ".qkv", target + ".qkv", _CONVS),
        *_pairs(source + ".proj_out", target + ".proj", _CONVS),
    ]


_RULES = (
    *_pairs(_SIDE + ".{end:conv_in|conv_out}", _SIDE + ".{end}", _CONVS),
    *_pairs(_SIDE + ".norm_out", _SIDE + ".norm_out", _NORMS),
    *_resblock(_PLACE + "block.{k}", _PLACE + "block.{k}"),
    *_attention(_PLACE + "attn.{k}", _PLACE + "attn.{k}"),
    *_pairs(_PLACE + "{change:downsample|upsample}.conv", _PLACE + "{change}", _CONVS),
    *_resblock(_SIDE + ".mid.block_1", _SIDE + ".mid.block.0"),
    *_resblock(_SIDE + ".mid.block_2", _SIDE + ".mid.block.1"),
    *_attention(_SIDE + ".mid.attn_1", _SIDE + ".mid.attn"),
    *_pairs("{name:quant_conv|post_quant_conv}", "{name}", _CONVS),
    *_pairs("quantize.quant_resi.qresi_ls.{k}", "codebook.phi.{k}", _CONVS),
    Rule("quantize.embedding.weight", "codebook.codes"),
)


def table(scales: int = RELEASED_SCALES) -> Table:
    """Rules of a VQVAE; `scales` is how many rows its statistics have when it is written back."""
    statistics = Ignore(
        "quantize.ema_vocab_hit_SV",
        "statistics of codebook use, of no effect",
        like="codebook.codes",
        recreate=lambda codes: np.zeros((scales, codes.shape[0]), codes.dtype),
    )
    return Table("vqvae", _RULES, (statistics,))


TABLE = table()


def infer_config(reader: Reader) -> VqvaeConfig:
    """The shape of a VQVAE from its tensors; ConversionError where one is missing."""
    names = set(reader.names())

    def shape(key: str, rank: int = 4) -> tuple[int, ...]:
        if key not in names:
            raise ConversionError(
                f"this is not a complete VQVAE: {key} is missing; use the released file"
            )
        return require_rank(reader.shape(key), key, rank)

    base = shape("encoder.conv_in.weight")[0]
    widths, level = [], 0
    while f"encoder.down.{level}.block.0.conv1.weight" in names:
        widths.append(shape(f"encoder.down.{level}.block.0.conv1.weight")[0])
        level += 1
    if not base or not widths or any(width % base for width in widths):
        raise ConversionError(
            f"encoder levels have {widths} channels, expected multiples of {base}: use the "
            "released VQVAE"
        )
    blocks = _count(names, rf"encoder\.down\.0\.block\.({NUMBER})\.conv1\.weight")
    phis = _count(names, rf"quantize\.quant_resi\.qresi_ls\.({NUMBER})\.weight")
    if not phis:
        raise ConversionError(
            "quantize.quant_resi.qresi_ls.0.weight is missing: only VQVAEs whose scales share a "
            "few convolutions are supported"
        )
    vocab, code_width = shape("quantize.embedding.weight", 2)
    values = {
        "vocab": vocab,
        "code_width": code_width,
        "base_width": base,
        "multipliers": [width // base for width in widths],
        "blocks": blocks,
        "phis": phis,
    }
    try:
        return build(VqvaeConfig, values, "shapes of the tensors")
    except ValueError as error:
        raise ConversionError(f"vqvae checkpoint with impossible sizes: {error}") from error


def _count(names: set[str], pattern: str) -> int:
    return len({match[1] for name in names if (match := re.fullmatch(pattern, name))})
