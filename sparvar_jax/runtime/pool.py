"""Cache buffers that one generation leaves for the next."""

from __future__ import annotations

from typing import Any


class CachePool:
    """At most one spare set of buffers, under a name that says what it fits.

    A set of another name is freed before new buffers are made, so that a process never holds more
    than one generation needs.
    """

    def __init__(self) -> None:
        self._spare: dict[Any, Any] = {}

    def take(self, name: Any) -> Any | None:
        """The spare set of that name; whatever else was kept is freed."""
        found = self._spare.pop(name, None)
        self.release()
        return found

    def keep(self, name: Any, buffers: Any) -> None:
        """Keep the buffers of a finished generation."""
        self._spare = {name: buffers}

    def release(self) -> None:
        """Free the buffers kept for the next generation."""
        self._spare.clear()
