"""Small pieces the Mosaic GPU kernels share: shared-memory types, barriers, the online softmax.

Hopper's named barriers are cheaper than shared-memory barriers for the turn taking of warpgroups,
but Pallas has no primitive for them, so they are inlined as PTX.
"""

# Mosaic GPU's references are dynamic: pyright cannot follow their attributes and operators.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false, reportOperatorIssue=false

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.hopper._names import keep_names
from pallas_kernels.xla.quantised import LARGEST

keep_names()
ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)
LOG2E = math.log2(math.e)
# Finite, so that a row whose keys are all masked so far keeps a defined rescaling factor.
LOWEST = -1e30
# The hardware has 16 named barriers; Mosaic takes its own from 0 upwards.
_FIRST_NAMED_BARRIER = 8


def tiled_smem(shape: tuple[int, ...], dtype: DTypeLike):
    """Shared memory in the tiling that TMA writes and WGMMA reads.

    Rows are swizzled as wide as they are, up to 128 bytes.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, shape[-1] * size)
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _named_barrier(operation: str, index: Array, threads: int) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def emit(_, barrier):
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [barrier.registers[()]],
            f"bar.{operation} $0, {threads};",
            "r",
            has_side_effects=True,
        )

    emit(index)


class Turns:
    """Warpgroups take turns on the tensor cores: `take` waits for the turn, `give` passes it on.

    With a single warpgroup there is nobody to wait for.
    """

    def __init__(self, warpgroup: Array, warpgroups: int):
        self._alone = warpgroups == 1
        self._own = _FIRST_NAMED_BARRIER + warpgroup
        self._next = _FIRST_NAMED_BARRIER + lax.rem(warpgroup + 1, warpgroups)
        self._is_last = warpgroup == warpgroups - 1

    def open(self) -> None:
        """Give the first warpgroup its first turn."""
        pl.when(self._is_last)(self.give)

    def take(self) -> None:
        if not self._alone:
            _named_barrier("sync", self._own, 256)

    def give(self) -> None:
        if not self._alone:
            _named_barrier("arrive", self._next, 256)


def pad_rows(x: Shaped[Array, "... T D"]) -> Shaped[Array, "... T3 D"]:
    """Pad rows to the multiples of 8 that tiled TMA takes (most token counts already fit)."""
    extra = -x.shape[-2] % 8
    return jnp.pad(x, (*[(0, 0)] * (x.ndim - 2), (0, extra), (0, 0))) if extra else x


def heads_major(x: Float[Array, "R T C"], heads: int) -> Float[Array, "R H T D"]:
    """Split a token-major output into heads. A caller that merges them again undoes the
    transpose, and XLA drops the pair."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def dispatch(consumers: int, consume: Callable[[Array], None], produce: Callable[[], None]) -> None:
    """Give this warpgroup its role: the first ones consume, by number, and the last produces."""
    warpgroup = lax.axis_index("wg")
    pl.when(warpgroup < consumers)(lambda: consume(warpgroup))
    pl.when(warpgroup == consumers)(produce)


def share(items: int) -> tuple[Int[Array, ""], int, Int[Array, ""]]:
    """(this CTA's first item, how far its next one is, how many it has) of items in turn."""
    cta, ctas = lax.axis_index("sm"), lax.axis_size("sm")
    return cta, ctas, lax.div(items - cta + ctas - 1, ctas)


def row_constant(value: float) -> Float[Array, "64"]:
    """One value per query row of a warpgroup, in the layout of WGMMA row reductions."""
    return plgpu.layout_cast(jnp.full((64,), value, jnp.float32), ROW)


def zero_output(head_dim: int) -> Float[Array, "64 D"]:
    """A zero output accumulator."""
    return plgpu.layout_cast(jnp.zeros((64, head_dim), jnp.float32), plgpu.Layout.WGMMA)


def spread(rows: Float[Array, "64"], like: Float[Array, "64 N"]) -> Float[Array, "64 N"]:
    """Repeat one value per row along columns (free in WGMMA layouts)."""
    return lax.broadcast_in_dim(rows, like.shape, [0])


@dataclass(frozen=True)
class Softmax:
    """Online softmax in base 2. `step` gives weights, new reference, new sum, rescaling factor.

    The reference of a row is its running maximum. With `fixed_reference` it is that constant
    instead: where logits are known to be bounded, no maximum and no rescaling are needed.
    """

    scale: float
    fixed_reference: float | None = None

    @property
    def rescales(self) -> bool:
        """Whether the output has to be multiplied by the rescaling factor."""
        return self.fixed_reference is None

    def start(self) -> tuple[Float[Array, "64"], Float[Array, "64"]]:
        """Reference and sum before the first key."""
        reference = LOWEST if self.fixed_reference is None else self.fixed_reference
        return row_constant(reference), row_constant(0.0)

    def step(
        self, scores: Float[Array, "64 N"], top: Float[Array, "64"], total: Float[Array, "64"]
    ) -> tuple[Array, Array, Array, Array]:
        """Fold one stage of scores in."""
        factor = self.scale * LOG2E
        if self.fixed_reference is not None:
            weights = jnp.exp2(scores * factor - self.fixed_reference)
            return weights, top, total + weights.sum(axis=1), top
        new_top = jnp.maximum(top, scores.max(axis=1) * factor)
        alpha = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores * factor - spread(new_top, scores))
        return weights, new_top, total * alpha + weights.sum(axis=1), alpha

    @classmethod
    def bounded(cls, scale: float, logit_bound: float | None, dtype: DTypeLike) -> Softmax:
        """A fixed reference when |scaled logits| stay below `logit_bound` and bfloat16 can hold it.

        The reference puts the largest possible weight at 2^100, so that sums over 2^27 keys fit
        float32. A row then needs one logit above `logit_bound - 156` to have a nonzero sum.
        """
        if logit_bound is None or dtype != jnp.bfloat16 or logit_bound > 100.0:
            return cls(scale)
        return cls(scale, max(logit_bound * LOG2E - 100.0, 0.0))


_BEFORE_0_11 = jax.__version_info__ < (0, 11)


def transposed(ref):
    """A [N, D] tile as the [D, N] operand of WGMMA."""
    return plgpu.transpose_ref(ref, (1, 0)) if _BEFORE_0_11 else ref.transpose((1, 0))


def load(ref, layout) -> Array:
    """A small array from global or shared memory in a given layout."""
    index = ((),) if _BEFORE_0_11 else ()  # required before, deprecated since
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def load_words(ref) -> Int[Array, "128"]:
    """One int32 per thread of a warpgroup from global memory."""
    return load(ref, plgpu.Layout.WG_STRIDED((128,), vec_size=1))


def apply_words(scores: Float[Array, "64 64"], words: Int[Array, "128"]) -> Float[Array, "64 64"]:
    """Keep the scores whose bit is set in the thread's word, set the others to -inf."""
    layout = plgpu.Layout.WG_STRIDED((128,), vec_size=1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, layout),
        return_type=plgpu.ShapeDtypeStruct((64, 64), jnp.float32, plgpu.Layout.WGMMA),
    )
    def emit(_, scores, words):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        word = vector.extract(words.registers.item(), [], [0])
        hidden, zero = mgpu.utils.c(-math.inf, f32), mgpu.utils.c(0, i32)
        registers = np.empty_like(scores.registers)
        for index, pair in np.ndenumerate(scores.registers):
            column, half = index[1], index[4]
            values = []
            for element in range(2):
                bit = mgpu.utils.c(_signed_bit(16 * half + 2 * column + element), i32)
                clear = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(word, bit), zero)
                value = vector.extract(pair, [], [element])
                values.append(arith.select(clear, hidden, value))
            registers[index] = vector.from_elements(pair.type, values)
        return mgpu.FragmentedArray(_registers=registers, _layout=scores.layout, _is_signed=None)

    return emit(scores, words)


def round_to_whole(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Numbers below 2^22 to the nearest integers."""
    shift = 12582912.0  # 1.5 * 2^23: with it added no bits are left behind the point
    return ((x + shift) - shift).astype(jnp.int32)


def eight_bits(x: Float[Array, "C"], dtype: jnp.dtype) -> tuple[Array, Array]:
    """A row as multiples of its scale, rounded to whole ones for int8, and that scale."""
    largest = LARGEST[jnp.dtype(dtype)]
    top = jnp.maximum(jnp.max(jnp.abs(x)), 1e-30)
    y = x * (largest / top)
    return round_to_whole(y) if dtype == jnp.int8 else y, top * (1.0 / largest)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by its tanh formula."""
    inner = x * (0.7978845608028654 + 0.035677408136300125 * (x * x))
    half = 0.5 * x
    return half + half * jnp.tanh(inner)


def _signed_bit(position: int) -> int:
    """The int32 with one bit set."""
    return -(1 << 31) if position == 31 else 1 << position


def compiler_params() -> plgpu.CompilerParams:
    """Barriers are placed by hand; row reductions stay inside a warp and need no scratch."""
    return plgpu.CompilerParams(
        approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
    )


kernel = functools.partial(plgpu.kernel, thread_name="wg", grid_names=("sm",))
