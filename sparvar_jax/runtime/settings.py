"""What of jax's configuration could change a picture, fixed where programs are made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def fixed() -> Iterator[None]:
    """The settings that all programs are made under, whatever the process configures.

    Implicit broadcasts and promotions are what our formulas mean; random bits are those of
    partitionable Threefry, whose key kind `sampling.KEY_KIND` names; numbers have 32 bits at most.
    The precision of products stays with the user: it is a choice of speed.
    """
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.threefry_partitionable(True),
        jax.enable_x64(False),
    ):
        yield
