"""Prompts as a prefix of fixed length, as HART takes them: padded behind a system prompt.

A prompt is plain text (no chat template, no special tokens) and is padded on the right. Padding is
drawn with like any other token; what tells it apart are its positions, which stay at the last real
token's, and that the text encoder does not look at it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from sparvar_jax.models.text_tokens import open_json

PADDING = "<|endoftext|>"
SYSTEM_PROMPT = """\
Given a user prompt, generate an "Enhanced prompt" that provides detailed visual descriptions \
suitable for image generation.

Examples:
- User Prompt: A cat sleeping -> A small, fluffy white cat curled up in a round shape, sleeping \
peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> A bustling city street scene at dusk, featuring glowing \
street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by \
towering glass skyscrapers.

Please generate only the enhanced description for the prompt below and DO NOT include any \
additional sentences. Start your response with "Enhanced Prompt:".

User Prompt:
"""
"""What stands before every prompt, as released. Nothing is generated: it steers the features."""


@dataclasses.dataclass(frozen=True)
class PrefixTokenizer:
    """Splits prompts into ids: `split` maps a text to its ids. padding: the id that fills up."""

    source: str
    vocab: int
    padding: int
    split: Callable[[str], list[int]]

    def encode(
        self, prompts: Sequence[str], length: int
    ) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """Ids of exactly `length` tokens, int32, and which of them are no padding.

        A longer prompt is cut, with a warning. Raises ValueError for an empty one.
        """
        if isinstance(prompts, str):
            raise ValueError("expected a list of prompts, got one string: put it into a list")
        if not prompts:
            raise ValueError("expected at least one prompt, got none")
        ids = np.full((len(prompts), length), self.padding, np.int32)
        for prompt, row in zip(prompts, ids, strict=True):
            pieces = self.split(prompt)
            if not prompt.strip() or not pieces:
                raise ValueError(
                    f"the prompt is empty ({prompt!r}): describe the picture in at least one word"
                )
            if len(pieces) > length:
                warnings.warn(
                    f"the prompt has {len(pieces)} tokens and is cut to {length}; "
                    f"it starts with {prompt[:40]!r}",
                    stacklevel=3,
                )
            row[: len(pieces)] = pieces[:length]
        return ids, ids != self.padding

    def system(self) -> Int[np.ndarray, "P"]:
        """Ids of the system prompt."""
        return np.array(self.split(SYSTEM_PROMPT), np.int32)


def positions(mask: Bool[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
    """The position of every token, int32: padding repeats the last real token's."""
    return (np.cumsum(mask, axis=1) - 1).astype(np.int32)


def load_prefix_tokenizer(directory: str | Path) -> PrefixTokenizer:
    """The tokenizer of a Qwen2 folder, `tokenizer.json`; ValueError where it is not there."""
    file = Path(directory) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"no tokenizer in {directory}: expected tokenizer.json beside the text encoder"
        )
    return open_prefix_tokenizer(file)


def open_prefix_tokenizer(path: Path) -> PrefixTokenizer:
    """Read a `tokenizer.json`; ValueError where it is damaged or has no padding as Qwen2 has it."""
    library = open_json(path)
    padding = library.token_to_id(PADDING)
    if padding is None:
        raise ValueError(
            f"{path} has no token {PADDING}, with which Qwen2 pads: take the text encoder's own "
            "tokenizer"
        )

    def split(text: str) -> list[int]:
        return library.encode(text, add_special_tokens=False).ids

    return PrefixTokenizer(path.name, library.get_vocab_size(), padding, split)
