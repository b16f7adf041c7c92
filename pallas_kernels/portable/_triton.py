"""Pieces that the Triton kernels share: the call, tiles of a cache, the softmax, the walk.

Triton lays out registers and shared memory, chooses the instructions of the tensor cores, and
brings the tiles of a loop in `num_stages` steps ahead. Kernels say which tiles they walk.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.portable.tuning import Launch

# jax has announced that it will give up these kernels' language in favour of packages that are none
# of ours yet. It says so when a program is lowered, long after our call, and to users who cannot
# act on it; `reasons` keeps releases without it away from here.
warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)

LOG2E = math.log2(math.e)
# Finite, so that a row whose keys are all masked so far keeps a defined rescaling factor.
LOWEST = -1e30
Running = tuple[Array, Array, Array]


def call(
    kernel: Callable[..., None],
    out_shape: Any,
    grid: tuple[int, ...],
    launch: Launch,
    *operands: Array,
    in_place: Mapping[int, int] | None = None,
    interpret: bool = False,
) -> Any:
    """Run a kernel whose references are whole arrays, in the order of operands and results.

    in_place: operands by number -> the results that are written over them.
    """
    params = pltriton.CompilerParams(num_warps=launch.warps, num_stages=launch.stages)
    return pl.pallas_call(
        kernel, out_shape=out_shape, grid=grid, compiler_params=params, interpret=interpret,
        input_output_aliases=dict(in_place or {}), name=kernel.__qualname__.partition(".")[0],
    )(*operands)  # fmt: skip


def load_rows(
    ref: Any, lead: tuple[Any, ...], rows: Int[Array, " N"], seen: Bool[Array, " N"] | None = None,
    tail: tuple[Any, ...] = (),
) -> Float[Array, "N D"]:  # fmt: skip
    """Rows of a reference, zero where not `seen`; `tail` indexes axes between rows and columns."""
    columns = jnp.arange(ref.shape[-1], dtype=jnp.int32)
    at = ref.at[(*lead, rows[:, None], *tail, columns[None, :])]
    if seen is None:
        return pltriton.load(at)
    return pltriton.load(at, mask=spread(seen, ref.shape[-1]), other=0.0)


def load_block(ref: Any, lead: tuple[Any, ...], start: Any, size: int) -> Float[Array, "N D"]:
    """`size` rows from `start` on, all of which are there."""
    return pltriton.load(ref.at[(*lead, pl.ds(start, size), slice(None))])


def store_rows(
    ref: Any, lead: tuple[Any, ...], rows: Int[Array, " N"], tail: tuple[Any, ...],
    seen: Bool[Array, " N"], value: Float[Array, "N D"],
) -> None:  # fmt: skip
    """Write the rows that are `seen`; `tail` indexes axes between rows and columns."""
    columns = jnp.arange(ref.shape[-1], dtype=jnp.int32)
    at = ref.at[(*lead, rows[:, None], *tail, columns[None, :])]
    pltriton.store(at, value.astype(ref.dtype), mask=spread(seen, ref.shape[-1]))


def product(a: Array, b: Array, axis: int) -> Float[Array, "M N"]:
    """Columns of `a` against an axis of `b`, accumulated in float32."""
    contract = ((1,), (axis,)), ((), ())
    return lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)


def spread(flags: Bool[Array, " N"], width: int) -> Bool[Array, "N D"]:
    return lax.broadcast_in_dim(flags, (flags.shape[0], width), (0,))


@dataclass(frozen=True)
class Softmax:
    """Online softmax in base 2. The reference of a row is its running maximum.

    With `fixed_reference` it is that constant instead: where logits are known to be bounded, no
    maximum and no rescaling are needed.
    """

    scale: float
    fixed_reference: float | None = None

    @classmethod
    def bounded(cls, scale: float, logit_bound: float | None, dtype: DTypeLike) -> Softmax:
        """A fixed reference when |scaled logits| stay below `logit_bound` and bfloat16 can hold it.

        The reference puts the largest possible weight at 2^100, so that sums over 2^27 keys fit
        float32. A row then needs one logit above `logit_bound - 156` to have a nonzero sum.
        """
        if logit_bound is None or dtype != jnp.bfloat16 or logit_bound > 100.0:
            return cls(scale)
        return cls(scale, max(logit_bound * LOG2E - 100.0, 0.0))

    def start(self, queries: int, head_dim: int) -> Running:
        """Output, reference and sum before the first key."""
        top = LOWEST if self.fixed_reference is None else self.fixed_reference
        return (
            jnp.zeros((queries, head_dim), jnp.float32),
            jnp.full((queries,), top, jnp.float32),
            jnp.zeros((queries,), jnp.float32),
        )

    def fold(
        self,
        running: Running,
        q: Float[Array, "M D"],
        k: Float[Array, "N D"],
        v: Float[Array, "N D"],
        keep: Bool[Array, "#M N"] | None,
    ) -> Running:
        """Take in one tile of keys, those that `keep` hides excepted."""
        out, top, total = running
        scores = product(q, k, 1) * (self.scale * LOG2E)
        if keep is not None:
            scores = jnp.where(jnp.broadcast_to(keep, scores.shape), scores, -jnp.inf)
        if self.fixed_reference is not None:
            weights = jnp.exp2(scores - self.fixed_reference)
        else:
            new_top = jnp.maximum(top, scores.max(1))
            alpha = jnp.exp2(top - new_top)
            weights = jnp.exp2(scores - new_top[:, None])
            out, top, total = out * alpha[:, None], new_top, total * alpha
        return out + product(weights.astype(v.dtype), v, 0), top, total + weights.sum(1)

    def finish(self, running: Running) -> tuple[Float[Array, "M D"], Float[Array, " M"]]:
        """Normalised output and natural log-sum-exp; rows that saw no key give 0 and -inf."""
        out, top, total = running
        share = 1.0 / jnp.where(total > 0, total, 1.0)
        return out * share[:, None], (jnp.log2(total) + top) * (1.0 / LOG2E)


def walk(
    softmax: Softmax,
    q: Float[Array, "M D"],
    running: Running,
    steps: tuple[Any, Any],
    fetch: Callable[[Any], tuple[Array, Array, Array | None]],
) -> Running:
    """Fold the tiles that `fetch` gives for the steps [first, last): keys, values, what to keep."""

    def step(number: Any, running: Running) -> Running:
        return softmax.fold(running, q, *fetch(number))

    first, last = (jnp.asarray(bound, jnp.int32) for bound in steps)
    return lax.fori_loop(first, last, step, running)
