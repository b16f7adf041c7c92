"""JSON files as typed values: sizes are bounded, and a wrong field is named with its file.

Everything read from JSON comes through `read_json`; dataclasses are built by `build`, which checks
each field against its annotation and against `BOUNDS` before the class sees it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sparvar_jax.weights.files import refuse_pointer
from sparvar_jax.weights.told import told

Config = TypeVar("Config")

SMALL = 4 << 20
"""Most bytes of a JSON file; an index of shards may be larger."""
LONGEST_TEXT = 4096
LONGEST_LIST = 256

_WIDTH = (1, 1 << 16)
_COUNT = (1, 512)
_VOCABULARY = (1, 1 << 21)
BOUNDS: Mapping[str, tuple[float, float]] = {
    "depth": _COUNT,
    "chunks": _COUNT,
    "levels": (1, 1024),
    "heads": (1, 1024),
    "width": _WIDTH,
    "text_width": _WIDTH,
    "head_dim": _WIDTH,
    "code_width": _WIDTH,
    "base_width": _WIDTH,
    "mlp_width": (0, 1 << 19),  # 0: the class computes it
    "bits": (1, 1024),
    "text_max_length": _WIDTH,
    "text_tokens": (1, 1 << 13),
    "kv_heads": (1, 1024),
    "rope_theta": (1, 1e12),
    "residual_width": _WIDTH,
    "residual_depth": _COUNT,
    "residual_steps": (2, 1000),
    "buckets": _WIDTH,
    "max_distance": (1, 1 << 20),
    "vocab": _VOCABULARY,
    "classes": _VOCABULARY,
    "sides": (1, 128),
    "stride": (1, 256),
    "multipliers": (1, 64),
    "encoder_multipliers": (1, 64),
    "decoder_multipliers": (1, 64),
    "encoder_blocks": (1, 64),
    "decoder_blocks": (1, 64),
    "blocks": (1, 64),
    "phis": (1, 64),
    "residual": (-1e6, 1e6),
    "norm_eps": (0, 1),
    "top_k": (0, 1 << 21),
    "top_p": (0, 1),
    "guidance": (-1e6, 1e6),
    "temperature": (0, 1e6),
    "aspect_ratio": (1e-3, 1e3),
    # Options of calls and commands.
    "num": (1, 4096),
    "pixels": (1, 1 << 16),
    "keep_scales": (0, 32),
    # Names of Hugging Face for the sizes of a text encoder.
    "vocab_size": _VOCABULARY,
    "d_model": _WIDTH,
    "d_kv": _WIDTH,
    "d_ff": (1, 1 << 19),
    "num_layers": _COUNT,
    "num_heads": (1, 1024),
    "relative_attention_num_buckets": _WIDTH,
    "relative_attention_max_distance": (1, 1 << 20),
    "layer_norm_epsilon": (0, 1),
    "hidden_size": _WIDTH,
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (0, 1024),  # 0: as many as heads
    "intermediate_size": (1, 1 << 19),
    "num_hidden_layers": _COUNT,
    "rms_norm_eps": (0, 1),
}
"""Smallest and largest value of every number in a configuration, by field name.

The largest released models have depth 48, width 4608 and vocabularies of 32,128; the bounds leave
room for models ten times as large, and keep what is built from a damaged file small.
"""
ABOUT = ("kind", "matrices")
"""What an entry of a part says besides its configuration."""
LENGTHS: Mapping[str, int] = {
    "sides": 32,
    "multipliers": 16,
    "encoder_multipliers": 16,
    "decoder_multipliers": 16,
}
"""Most entries of a list, by field name; others have at most `LONGEST_LIST`."""


class JsonObject(dict):
    """An object of a JSON file that knows its place, for messages: `file` or `file: field`."""

    place = "config.json"


def read_json(file: Path, mend: str, most: int = SMALL) -> JsonObject:
    """The object in a JSON file.

    Raises ValueError where the file is missing, larger than `most` bytes, not UTF-8, not JSON, or
    holds no object; `mend` ends the message.
    """
    refuse_pointer(file)
    try:
        with file.open("rb") as stream:
            content = stream.read(most + 1)
    except OSError as error:
        raise ValueError(f"cannot read {file} ({error.strerror}): {mend}") from error
    if len(content) > most:
        raise ValueError(f"{file} has more than {most >> 20} MiB, too much for JSON: {mend}")
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}): {mend}") from error
    except (ValueError, RecursionError) as error:  # numbers of 5000 digits, 1000 brackets
        raise ValueError(f"{file} is not valid JSON ({told(error, 120)}): {mend}") from error
    if not isinstance(value, JsonObject):
        raise ValueError(f"{file} must hold a JSON object, got {_shown(value)}: {mend}")
    _name_places(value, str(file))
    return value


def _object(pairs: list[tuple[str, Any]]) -> JsonObject:
    return JsonObject(pairs)


def _name_places(value: JsonObject, place: str) -> None:
    """Give an object and the objects right below it their places."""
    value.place = place
    for key, entry in value.items():
        if isinstance(entry, JsonObject):
            entry.place = f"{place}: {told(key, 60)}"


def require_objects(values: JsonObject, names: Iterable[str]) -> None:
    """ValueError where one of these entries is there and is no object."""
    for name in names:
        if name in values and not isinstance(values[name], dict):
            raise ValueError(
                f"{values.place}: {name} must be an object, got {_shown(values[name])}"
            )


def require_text(values: Mapping[str, Any], name: str) -> None:
    """ValueError where an entry is no text, or one longer than any of ours."""
    _checked(name, str, values.get(name), place_of(values))


def place_of(values: Mapping[str, Any]) -> str:
    """Where these values were read, as messages name it."""
    return getattr(values, "place", JsonObject.place)


def build(cls: type[Config], values: Mapping[str, Any], place: str | None = None) -> Config:
    """A dataclass from a JSON object; lists become tuples, and what `ABOUT` names is no field.

    Raises ValueError with the place and the field for an unknown or missing field, one of another
    type than its annotation, and a number or a length outside its bounds.
    """
    place = place or place_of(values)
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    given = {key: value for key, value in values.items() if key not in ABOUT}
    unknown = sorted(told(key, 60) for key in set(given) - set(fields))
    if unknown:
        raise ValueError(f"{place}: {cls.__name__} has no fields {', '.join(unknown[:6])}")
    missing = [
        name
        for name, entry in fields.items()
        if name not in given
        and entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{place} does not describe a {cls.__name__}: no {', '.join(missing)}")
    hints = _hints(cls)
    checked = {key: _checked(key, hints[key], value, place) for key, value in given.items()}
    try:
        return cls(**checked)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def require_bounds(name: str, value: float, place: str) -> None:
    """ValueError where a number is infinite, or outside the bounds of fields of this name."""
    low, high = BOUNDS.get(name, (-(1 << 31), 1 << 31))
    if not low <= value <= high:  # false for what is not a number, too
        raise ValueError(f"{place}: {name} must be {low:g} to {high:g}, got {_shown(value)}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _checked(name: str, hint: Any, value: Any, place: str) -> Any:
    """The value as its annotation says; ValueError with place and field."""
    for option in _options(hint):
        if get_origin(option) is tuple and isinstance(value, list | tuple):
            most = LENGTHS.get(name, LONGEST_LIST)
            if len(value) > most:
                raise ValueError(
                    f"{place}: {name} may have {most} entries at most, got {len(value)}"
                )
            return tuple(_checked(name, get_args(option)[0], item, place) for item in value)
        if get_origin(option) is Literal and value in get_args(option):
            return value
        found = _scalar(option, value)
        if found is not None:
            if isinstance(found, str) and len(found) > LONGEST_TEXT:
                break
            if not isinstance(found, str | bool):
                require_bounds(name, found, place)
            return found
        if option is types.NoneType and value is None:
            return None
    raise ValueError(f"{place}: {name} must be {_wanted(hint)}, got {_shown(value)}")


def _scalar(option: Any, value: Any) -> bool | int | float | str | None:
    """The value where it is of this plain type, else None; 3.0 is a whole number too."""
    if option is bool or option is str:
        return value if isinstance(value, option) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if option is int and isinstance(value, float):
        return int(value) if value.is_integer() else None
    if option is float and isinstance(value, int):
        return float(value) if abs(value) < 1 << 64 else math.inf
    return value if option in (int, float) else None


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _wanted(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return " or ".join(
        f"a list with {_wanted(get_args(option)[0])} each"
        if get_origin(option) is tuple
        else " or ".join(map(repr, get_args(option)))
        if get_origin(option) is Literal
        else words.get(option, "null")
        for option in _options(hint)
    )


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple | dict):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 64:
        return "a number of more than 19 digits"
    return told(json.dumps(value), 60)
