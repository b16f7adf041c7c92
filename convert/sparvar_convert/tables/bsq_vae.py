"""Names of Infinity's BSQ tokenizers in released checkpoints, and the configuration from shapes.

Released files wrap every convolution and norm (`X.conv.weight`, `X.norm.weight`); files without
the wrappers, which the public loader accepts too, are renamed first.
"""

from __future__ import annotations

import re

import numpy as np

from sparvar_convert.rules import (
    CONV,
    NUMBER,
    ConversionError,
    Ignore,
    Rule,
    Table,
    require_numbers,
)
from sparvar_convert.stream import Reader
from sparvar_jax.models.bsq_vae import BsqVaeConfig
from sparvar_jax.weights.json_file import build

_FLAT = re.compile(
    r"((?:encoder|decoder)\.(?:.+\.)?"
    r"(?:conv_in|conv_out|conv1|conv2|nin_shortcut|downsample\.conv|upsample\.conv|(norm1|norm2|norm_out)))"
    r"\.(weight|bias)"
)
_SIDE = "{side:encoder|decoder}"
_LEVEL = "{side:encoder|decoder}.{way:down|up}.{level}"
_MIDDLE = {"block_1": "0", "block_2": "1"}


def canonical(key: str) -> str:
    """The released name of a key that may lack its `.conv` or `.norm` wrapper."""
    match = _FLAT.fullmatch(key)
    return f"{match[1]}.{'norm' if match[2] else 'conv'}.{match[3]}" if match else key


def _conv(source: str, target: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{source}.conv.weight", f"{target}.kernel", CONV),
        Rule(f"{source}.conv.bias", f"{target}.bias"),
    )


def _norm(source: str, target: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{source}.norm.weight", f"{target}.scale"),
        Rule(f"{source}.norm.bias", f"{target}.bias"),
    )


def _block(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *_norm(f"{source}.norm{{n:1|2}}", f"{target}.norm{{n}}"),
        *_conv(f"{source}.conv{{n:1|2}}", f"{target}.conv{{n}}"),
        *_conv(f"{source}.nin_shortcut", f"{target}.shortcut"),
    )


_RULES = (
    *_conv(f"{_SIDE}.conv_{{end:in|out}}", f"{_SIDE}.conv_{{end}}"),
    *_norm(f"{_SIDE}.norm_out", f"{_SIDE}.norm_out"),
    *_block(f"{_LEVEL}.block.{{k}}", f"{_LEVEL}.block.{{k}}"),
    *(
        rule
        for theirs, ours in _MIDDLE.items()
        for rule in _block(f"{_SIDE}.mid.{theirs}", f"{_SIDE}.mid.{ours}")
    ),
    *_conv("encoder.down.{level}.downsample.conv", "encoder.down.{level}.downsample"),
    *_conv("decoder.up.{level}.upsample.conv", "decoder.up.{level}.upsample"),
)


def _powers_of_two(bias: np.ndarray) -> np.ndarray:
    return 2 ** np.arange(bias.size - 1, -1, -1, dtype=np.int64)


TABLE = Table(
    "bsq_vae",
    _RULES,
    tuple(
        Ignore(
            f"{name}.lfq.mask",
            "powers of two for integer labels: bit labels need none",
            like="encoder.conv_out.bias",
            recreate=_powers_of_two,
        )
        for name in ("quantizer", "quantize")
    ),
    canonical,
)


def infer_config(reader: Reader) -> BsqVaeConfig:
    """Configuration of a tokenizer from its names and shapes.

    Raises ConversionError where keys that carry a size are missing or do not fit together.
    """
    shapes = {canonical(key): reader.shape(key) for key in reader.names()}
    base = _width(shapes, "encoder.conv_in.conv.bias")
    sides = {"encoder": "down", "decoder": "up"}
    levels = {
        side: _count(shapes, rf"{side}\.{way}\.({NUMBER})\.block\.0\..+")
        for side, way in sides.items()
    }
    halvings = {re.match(r"encoder\.down\.\d+\.downsample", key) for key in shapes}
    multipliers = {}
    for side, way in sides.items():
        widths = [
            _width(shapes, f"{side}.{way}.{level}.block.0.conv1.conv.bias")
            for level in range(levels[side])
        ]
        if not base or any(width % base for width in widths):
            raise ConversionError(f"bsq_vae checkpoint: {side} widths {widths} not times {base}")
        multipliers[side] = tuple(width // base for width in widths)
    try:
        values = {
            "code_width": _width(shapes, "encoder.conv_out.conv.bias"),
            "stride": 2 ** min(len({match[0] for match in halvings if match}), 31),
            "encoder_multipliers": multipliers["encoder"],
            "decoder_multipliers": multipliers["decoder"],
            "base_width": base,
            "encoder_blocks": _count(shapes, rf"encoder\.down\.0\.block\.({NUMBER})\..+"),
            "decoder_blocks": _count(shapes, rf"decoder\.up\.0\.block\.({NUMBER})\..+"),
        }
        return build(BsqVaeConfig, values, "shapes of the tensors")
    except ValueError as error:
        raise ConversionError(f"bsq_vae checkpoint with impossible sizes: {error}") from error


def _width(shapes: dict[str, tuple[int, ...]], key: str) -> int:
    if len(shapes.get(key, ())) != 1:
        raise ConversionError(
            f"bsq_vae checkpoint lacks the vector {key}, which carries a size of the model: "
            "use the complete checkpoint"
        )
    return shapes[key][0]


def _count(shapes: dict[str, tuple[int, ...]], pattern: str) -> int:
    """How many numbers the group of `pattern` takes, counted to the largest one."""
    found = [int(m[1]) for m in (re.fullmatch(pattern, key) for key in shapes) if m]
    count = max(found, default=-1) + 1
    require_numbers(shapes, "levels or blocks", count)
    return count
