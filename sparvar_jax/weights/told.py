"""Text of unknown origin, fit to be shown: one short line without control characters."""

from __future__ import annotations

import unicodedata
from typing import Any

LONGEST = 480
"""Most characters of one message; with what a command puts before it, it stays below 500."""

_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # controls, bidi marks, surrogates, unassigned


def told(text: object, most: int = LONGEST) -> str:
    """The text in one line: white space is one blank, control characters are escaped.

    Beyond `most` characters the middle is left out, because messages end with the mend.
    """
    line = str(text)
    if len(line) > 4 * most:  # more cannot be shown: do not look at it
        line = f"{line[: 2 * most]}{line[-2 * most :]}"
    line = escaped(" ".join(line.split()))
    if len(line) <= most:
        return line
    tail = (most - 3) // 3
    return f"{line[: most - 3 - tail]}...{line[-tail:]}"


def escaped(text: str) -> str:
    """The text with its control characters written out."""
    return "".join(map(_visible, text))


def shown(value: Any, most: int = 60) -> str:
    """A value of unknown size as a message shows it."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a number of more than 19 digits"
    if isinstance(value, str | bytes):
        return told(repr(value[: 4 * most]), most)
    if isinstance(value, list | tuple | set | frozenset | dict) and len(value) > most:
        return f"{type(value).__name__} of {len(value)}"
    return told(repr(value), most)


def listed(items: list[str], most: int = 6, each: int = 60) -> str:
    """The first items of a list, each cut, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(told(item, each) for item in items[:most]) + more


def _visible(letter: str) -> str:
    if unicodedata.category(letter) in _HIDDEN:
        return letter.encode("unicode_escape", "surrogatepass").decode("ascii")
    return letter
