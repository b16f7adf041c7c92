"""Prompts to token ids, by the tokenizer that lies beside the text encoder's weights.

Ids follow T5: the prompt's pieces, then the end token 1, then padding 0. The padded length is one
of a few buckets, so that a compiled text encoder serves many prompts. Control tokens written
inside a prompt count as plain text with `spiece.model` and as control tokens with
`tokenizer.json`.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sparvar_jax.weights.files import refuse_pointer
from sparvar_jax.weights.told import shown, told

PAD_ID = 0
EOS_ID = 1
_MOST_BYTES = 256 << 20
BUCKETS = (32, 64, 128, 512)


@dataclass(frozen=True)
class Tokenizer:
    """Splits prompts into ids: `split` maps one prompt to its ids without the end token.

    file: where it was read from.
    """

    file: Path
    vocab: int
    split: Callable[[str], list[int]]

    def encode(
        self, prompts: Sequence[str], max_length: int = 512
    ) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
        """Ids padded to a bucket, and lengths with the end token, both int32.

        A prompt of more than `max_length` tokens is cut, with a warning, and keeps its end token.
        Raises ValueError for an empty prompt.
        """
        if isinstance(prompts, str):
            raise ValueError("expected a list of prompts, got one string: put it into a list")
        if not prompts:
            raise ValueError("expected at least one prompt, got none")
        rows = [self._encode_one(prompt, max_length) for prompt in prompts]
        lengths = np.array([len(row) for row in rows], np.int32)
        ids = np.full((len(rows), padded_length(int(lengths.max()), max_length)), PAD_ID, np.int32)
        for row, target in zip(rows, ids, strict=True):
            target[: len(row)] = row
        return ids, lengths

    def count(self, prompt: str) -> int:
        """Tokens of a prompt with its end token, uncut; ValueError for an empty one."""
        return len(self._pieces(prompt)) + 1

    def _pieces(self, prompt: str) -> list[int]:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"the prompt {shown(prompt)} is no Unicode text: it holds half of a character"
            ) from None
        pieces = self.split(prompt)
        if not prompt.strip() or not pieces:
            raise ValueError(
                f"the prompt is empty ({shown(prompt)}): describe the picture in at least one word"
            )
        return pieces

    def _encode_one(self, prompt: str, max_length: int) -> list[int]:
        pieces = self._pieces(prompt)
        if len(pieces) + 1 > max_length:
            warnings.warn(
                f"the prompt has {len(pieces) + 1} tokens and is cut to {max_length}; "
                f"it starts with {prompt[:40]!r}",
                stacklevel=3,
            )
        return [*pieces[: max_length - 1], EOS_ID]


def padded_length(length: int, max_length: int = 512) -> int:
    """The smallest bucket that holds `length` tokens, at most `max_length`."""
    return min([bucket for bucket in BUCKETS if bucket >= length] + [max_length])


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read the tokenizer of a T5 folder: `tokenizer.json` where there is one, else `spiece.model`.

    Raises ValueError where neither is there or the control tokens are not T5's.
    """
    directory = Path(directory)
    for name in ("tokenizer.json", "spiece.model"):
        if (directory / name).is_file():
            return open_tokenizer(directory / name)
    raise ValueError(
        f"no tokenizer in {directory}: "
        "expected spiece.model or tokenizer.json beside the text encoder"
    )


def open_tokenizer(path: Path) -> Tokenizer:
    """Read one tokenizer file, by its ending .json or SentencePiece's.

    Raises ValueError where it is too large, damaged, a git-lfs pointer or not T5's.
    """
    if path.suffix == ".json":
        return _from_json(path)
    _bounded(path)
    return _from_sentencepiece(path)


def open_json(path: Path) -> Any:
    """The `tokenizers` library's own object of a `tokenizer.json`, which pads and cuts nothing.

    Raises ValueError where the file is too large, damaged or a git-lfs pointer.
    """
    from tokenizers import Tokenizer as Library

    _bounded(path)
    try:
        library = Library.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise _unreadable(path, "a tokenizer", error) from None
    library.no_padding()
    library.no_truncation()
    return library


def _bounded(path: Path) -> None:
    refuse_pointer(path)
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(
            f"{path} has {size >> 20} MiB, a tokenizer at most {_MOST_BYTES >> 20}: "
            "take the text encoder's own tokenizer"
        )


def _from_json(path: Path) -> Tokenizer:
    library = open_json(path)
    _check_specials(path, library.token_to_id("<pad>"), library.token_to_id("</s>"))

    def split(prompt: str) -> list[int]:
        return library.encode(prompt, add_special_tokens=False).ids

    return Tokenizer(path, library.get_vocab_size(), split)


def _from_sentencepiece(path: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        library = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise _unreadable(path, "a SentencePiece model", error) from None
    _check_specials(path, library.pad_id(), library.eos_id())
    return Tokenizer(path, library.vocab_size(), library.encode)


def _unreadable(path: Path, what: str, error: Exception) -> ValueError:
    said = told(str(error) or type(error).__name__, 160)
    return ValueError(f"{path} cannot be read as {what}: {said}; download it again")


def _check_specials(path: Path, pad: int | None, eos: int | None) -> None:
    if (pad, eos) != (PAD_ID, EOS_ID):
        raise ValueError(
            f"{path}: expected <pad> = {PAD_ID} and </s> = {EOS_ID} as T5 has them, "
            f"got {pad} and {eos}: take T5's own tokenizer"
        )
