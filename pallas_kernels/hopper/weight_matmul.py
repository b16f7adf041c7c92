"""Products of 16-bit activations with int8 weights on Hopper: weights become 16 bits in registers.

A tile has 128 outputs for up to 256 rows and all of the inputs, or a part of them where tiles are
too few. A producer warpgroup brings stages of 64 inputs with TMA and runs ahead across tiles; two
consumer warpgroups own 64 outputs each. Weights are the left operand, the one that WGMMA takes out
of registers, so that a value is widened once for all rows of the tile: the sums lie outputs first.
Who calls adds up the parts, scales them, and turns them over, all of it in one pass of XLA's.
"""

# Mosaic GPU's references are dynamic: pyright cannot follow their attributes and operators.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false, reportOperatorIssue=false

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int8

from pallas_kernels.hopper import _mosaic as mosaic
from pallas_kernels.shapes import ceil_div

DEPTH = 64
"""Inputs of a stage: 128 bytes of activations, as WGMMA's widest swizzle has them."""
CONSUMERS = 2
OUTPUTS = 64
"""Of a warpgroup."""
TILE_OUTPUTS = OUTPUTS * CONSUMERS
MOST_ROWS = 256
"""Of a tile: the widest right operand of WGMMA."""
LEFT = 16
"""Rows that leave a tile at once, in float32: tiles have a multiple of them."""
SHARED = 200 * 1024
"""Bytes of shared memory for stages."""
MOST_STAGES = 12
FIXED_STEPS, ROWS_A_STEP = 4, 8
"""What a tile costs besides its steps, in steps: the first stage's way, and one for every 8 rows,
whose sums are written and read again."""
MOST_PARTS = 8


def weight_matmul(
    x: Float[Array, "M C"], weight: Int8[Array, "O C"], scale: Float[Array, "O"], ctas: int
) -> Float[Array, "M O"]:
    """`x @ weight.T` times a scale an output, in the dtype of x; sums are of float32."""
    rows, outputs = x.shape[0], weight.shape[0]
    x = mosaic.pad_rows(x) if rows > 8 else x  # tiled copies take fewer than 8 as well
    across = ceil_div(rows, MOST_ROWS)
    tile_rows = LEFT * ceil_div(ceil_div(rows, across), LEFT)
    tiles = across * ceil_div(outputs, TILE_OUTPUTS)
    parts = parts_of(tiles, weight.shape[1] // DEPTH, tile_rows, ctas)
    sums = _sums(x, weight, tile_rows=tile_rows, across=across, parts=parts, ctas=ctas)
    return (sums[:, :, :rows].sum(0) * scale[:, None]).T.astype(x.dtype)


def parts_of(tiles: int, steps: int, rows: int, ctas: int) -> int:
    """Into how many parts the inputs go, so that all multiprocessors are done soonest."""

    def cost(parts: int) -> int:
        fixed = FIXED_STEPS + rows // ROWS_A_STEP
        return ceil_div(tiles * parts, ctas) * (ceil_div(steps, parts) + fixed)

    return min(range(1, min(MOST_PARTS, steps) + 1), key=cost)


@functools.partial(jax.jit, static_argnames=("tile_rows", "across", "parts", "ctas"))
def _sums(
    x: Float[Array, "M C"],
    weight: Int8[Array, "O C"],
    *,
    tile_rows: int,
    across: int,
    parts: int,
    ctas: int,
) -> Float[Array, "parts O rows"]:
    """Sums over every part of the inputs, for whole tiles of rows; lowered once a program."""

    def weight_matmul_kernel(x, weight, out, **scratch):
        _Product(x, weight, out, scratch, tile_rows, across).run()

    return mosaic.kernel(
        weight_matmul_kernel,
        out_type=jax.ShapeDtypeStruct((parts, weight.shape[0], across * tile_rows), jnp.float32),
        grid=(ctas,),
        num_threads=CONSUMERS + 1,
        scratch_types=_scratch(x.dtype, tile_rows),
        compiler_params=mosaic.compiler_params(),
    )(x, weight)


def _scratch(dtype, rows: int) -> dict[str, Any]:
    stage = DEPTH * (rows * jnp.dtype(dtype).itemsize + TILE_OUTPUTS)
    stages = min(MOST_STAGES, SHARED // stage)
    return dict(
        x_smem=mosaic.tiled_smem((stages, rows, DEPTH), dtype),
        w_smem=mosaic.tiled_smem((stages, TILE_OUTPUTS, DEPTH), jnp.int8),
        out_smem=mosaic.tiled_smem((CONSUMERS, 2, OUTPUTS, LEFT), jnp.float32),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
    )


class _Product:
    """The walk of one CTA over its tiles."""

    def __init__(self, x, weight, out, scratch: dict[str, Any], rows: int, across: int):
        self.x, self.weight, self.out, self.rows, self.across = x, weight, out, rows, across
        for name, ref in scratch.items():
            setattr(self, name, ref)
        self.stages = self.x_smem.shape[0]
        self.steps = weight.shape[1] // DEPTH
        self.each = ceil_div(self.steps, out.shape[0])
        self.columns = pl.cdiv(weight.shape[0], TILE_OUTPUTS)

    def run(self) -> None:
        """Dispatch this warpgroup to its role."""
        mosaic.dispatch(CONSUMERS, self.consume, self.produce)

    def for_tiles(self, body) -> None:
        """Run `body(part, first row, first output, first step, steps, steps before)` for tiles.

        Tiles that read the same weights run side by side.
        """
        cta, ctas, mine = mosaic.share(self.across * self.columns * self.out.shape[0])

        def tile(number, before):
            index = cta + number * ctas
            row, rest = lax.rem(index, self.across), lax.div(index, self.across)
            column, part = lax.rem(rest, self.columns), lax.div(rest, self.columns)
            first = part * self.each
            steps = jnp.minimum(self.each, self.steps - first)
            body(part, row * self.rows, column * TILE_OUTPUTS, first, steps, before)
            return before + steps

        lax.fori_loop(0, mine, tile, jnp.int32(0))

    def produce(self) -> None:
        """Fill the stages."""
        plgpu.set_max_registers(40, action="decrease")

        def tile(part, row, output, first, steps, before):
            del part

            def step(k):
                stage = lax.rem(before + k, self.stages)
                inputs = pl.ds((first + k) * DEPTH, DEPTH)
                plgpu.barrier_wait(self.empty.at[stage])
                full = self.full.at[stage]
                plgpu.copy_gmem_to_smem(
                    self.x.at[pl.ds(row, self.rows), inputs], self.x_smem.at[stage], full
                )
                plgpu.copy_gmem_to_smem(
                    self.weight.at[pl.ds(output, TILE_OUTPUTS), inputs],
                    self.w_smem.at[stage],
                    full,
                )

            pl.loop(0, steps)(step)

        self.for_tiles(tile)

    def consume(self, warpgroup) -> None:
        """Own half of the outputs of every tile."""
        plgpu.set_max_registers(232, action="increase")
        for stage in range(self.stages):
            plgpu.barrier_arrive(self.empty.at[stage])
        own = pl.ds(warpgroup * OUTPUTS, OUTPUTS)

        def tile(part, row, output, first, steps, before):
            del first

            def multiply(sums):
                def step(k, carry):
                    stage = lax.rem(before + k, self.stages)
                    plgpu.barrier_wait(self.full.at[stage])
                    weight = self._widened(self.w_smem.at[stage, own])
                    plgpu.wgmma(sums, weight, mosaic.transposed(self.x_smem.at[stage]))
                    # Not one product later: registers that WGMMA still reads cannot take the next
                    # weights. The other warpgroup multiplies meanwhile.
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(self.empty.at[stage])
                    return carry

                lax.fori_loop(0, steps, step, None)
                return sums[...]

            sums = pl.run_scoped(multiply, plgpu.ACC((OUTPUTS, self.rows), jnp.float32))
            self._leave(sums, part, row, output, warpgroup)

        self.for_tiles(tile)
        plgpu.wait_smem_to_gmem(0)

    def _widened(self, weight) -> Array:
        """Int8 weights of a stage as 16-bit ones, in the layout in which WGMMA takes registers."""
        values = plgpu.load(weight, layout=plgpu.Layout.WGMMA_UPCAST_2X)
        return plgpu.layout_cast(values.astype(self.x.dtype), plgpu.Layout.WGMMA)

    def _leave(self, sums: Float[Array, "64 rows"], part, row, output, warpgroup) -> None:
        """The way of sums to global memory, some rows at a time."""
        outputs = pl.ds(output + warpgroup * OUTPUTS, OUTPUTS)
        for number, left in enumerate(range(0, self.rows, LEFT)):
            out = self.out_smem.at[warpgroup, number % 2]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            out[...] = sums[:, left : left + LEFT]
            plgpu.commit_smem()
            rows = pl.ds(row + left, LEFT)
            plgpu.copy_smem_to_gmem(out, self.out.at[part, outputs, rows])
