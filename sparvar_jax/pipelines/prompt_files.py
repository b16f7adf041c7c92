"""Files of prompts: one a line, or JSON lines with seeds, sizes and negative prompts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from sparvar_jax.pipelines.numbers import SEEDS
from sparvar_jax.weights.json_file import LONGEST_TEXT
from sparvar_jax.weights.told import told

MOST_BYTES = 256 << 20
MOST_PROMPTS = 1_000_000
JSON_LINES = (".jsonl", ".ndjson")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One picture of a file of prompts; None takes what the call says, else the model's default."""

    prompt: str
    seed: int
    size: str | None = None
    aspect_ratio: str | None = None
    negative: str | None = None

    @property
    def shape(self) -> tuple[Any, ...]:
        """What pictures that are drawn together have in common."""
        return self.size, self.aspect_ratio, self.negative is None


def read_prompts(file: str | Path, seed: int = 0) -> tuple[Entry, ...]:
    """The pictures a file asks for, in its order; empty lines are passed over.

    seed: entry i draws from `seed + i` unless it has a seed of its own. Files named .jsonl hold an
    object a line: `prompt`, and if wanted `seed`, `size`, `aspect_ratio`, `negative`. Raises
    ValueError that names the line which is wrong.
    """
    file = Path(file)
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"{file} has more than {MOST_BYTES >> 20} MiB: split it")
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error.reason}") from None
    entries: list[Entry] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(entries) == MOST_PROMPTS:
            raise ValueError(f"{file} has more than {MOST_PROMPTS} prompts: split it")
        place = f"{file}, line {number}"
        values = _object(line, place) if file.suffix in JSON_LINES else {"prompt": line.strip()}
        entries.append(_entry({"seed": seed + len(entries), **values}, place))
    if not entries:
        raise ValueError(f"{file} holds no prompt")
    return tuple(entries)


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {told(error, 80)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{place} is not a JSON object: {told(line, 60)}")
    return values


def _entry(values: dict[str, Any], place: str) -> Entry:
    known = [field.name for field in dataclasses.fields(Entry)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{place} has {told(unknown[0], 40)!r}: use {', '.join(known)}")
    if not isinstance(values.get("prompt"), str) or not values["prompt"].strip():
        raise ValueError(f"{place} has no prompt")
    for name in set(values) - {"seed"}:
        text = values[name]
        if text is not None and (not isinstance(text, str) or len(text) > LONGEST_TEXT):
            raise ValueError(f"{place}: {name} must be text of at most {LONGEST_TEXT} letters")
    seed = values["seed"]
    if type(seed) is not int or not 0 <= seed < SEEDS:
        raise ValueError(f"{place}: seeds lie in 0..{SEEDS - 1}, got {told(seed, 40)}")
    return Entry(**values)
