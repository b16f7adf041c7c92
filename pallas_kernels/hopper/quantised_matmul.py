"""Products of 8-bit operands on Hopper: persistent tiles, scales and what follows in the epilogue.

A CTA walks output tiles in a snake, so that neighbours share operands in the L2 cache. A producer
warpgroup brings stages of 128 columns of both operands with TMA and runs ahead across tiles; two
consumer warpgroups own 64 of a tile's rows each. Both operands lie with K innermost, as WGMMA takes
8-bit ones.

With one scale a row (`blocks` 1) the tensor cores sum over all of K: in int32 exactly, in float32
for e4m3 as Hopper sums. With one scale for each 256 columns every two stages are summed from zero
and added, scaled, to a float32 sum. The tile's columns are then taken in two halves, for which the
registers suffice: while one warpgroup adds, the other multiplies.
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
from jaxtyping import Array, Float, Shaped

from pallas_kernels.hopper import _mosaic as mosaic
from pallas_kernels.hopper.product_tiles import HALF, TILE_ROWS, MatmulConfig
from pallas_kernels.xla.quantised import BLOCK, LARGEST

DEPTH = 128
"""Columns of K in a stage."""
CONSUMERS = 2
ROWS = TILE_ROWS // CONSUMERS
"""Rows of a warpgroup."""


@functools.partial(jax.jit, static_argnames=("gelu", "dtype", "config", "ctas"))
def quantised_matmul(
    x: Shaped[Array, "M K"],
    x_scale: Float[Array, "blocks M"],
    weight: Shaped[Array, "N K"],
    weight_scale: Float[Array, "N"],
    bias: Float[Array, "N"] | None,
    *,
    gelu: bool,
    dtype: jnp.dtype,
    config: MatmulConfig,
    ctas: int,
) -> tuple[Array, ...]:
    """(out [M, N] in `dtype`,), and for 8 bits their scales [N / 256, M]; lowered once a program.

    Copies of scales are not cut off at the last row as those of matrices are, so that scales have
    rows to whole tiles.
    """
    rows, width = x.shape[0], weight.shape[0]
    extra = -rows % TILE_ROWS
    if extra:
        x_scale = jnp.pad(x_scale, ((0, 0), (0, extra)))
    x = mosaic.pad_rows(x) if rows > 8 else x  # tiled copies take fewer than 8 as well
    out_type = [jax.ShapeDtypeStruct((x.shape[0], width), dtype)]
    if dtype in LARGEST:
        out_type.append(jax.ShapeDtypeStruct((width // BLOCK, rows + extra), jnp.float32))
    blockwise = x_scale.shape[0] > 1
    given = {"x": x, "x_scale": x_scale, "weight": weight, "weight_scale": weight_scale}
    given |= {} if bias is None else {"bias": bias}

    def quantised_matmul_kernel(*refs, **scratch):
        gmem = dict(zip([*given, "out", "out_scale"], refs, strict=False))
        _Matmul(gmem, scratch, config, gelu, blockwise).run()

    out, *scale = mosaic.kernel(
        quantised_matmul_kernel,
        out_type=out_type,
        grid=(ctas,),
        num_threads=CONSUMERS + 1,
        scratch_types=_scratch(config, x.dtype, dtype, blockwise, [*given.values()][3:]),
        compiler_params=mosaic.compiler_params(),
    )(*given.values())
    return out[:rows], *(values[:, :rows] for values in scale)


def _scratch(
    config: MatmulConfig, dtype, out_dtype, blockwise: bool, vectors: list[Array]
) -> dict[str, Any]:
    """vectors: what has an entry for each column, channel scales and perhaps biases."""
    stages, columns = config.stages, config.columns
    quantise = out_dtype in LARGEST
    width, slots = (128, 1) if quantise else (32, 3)
    buffers = dict(
        x_smem=mosaic.tiled_smem((stages, TILE_ROWS, DEPTH), dtype),
        w_smem=mosaic.tiled_smem((stages, columns, DEPTH), dtype),
        out_smem=mosaic.tiled_smem((CONSUMERS, slots, ROWS, width), out_dtype),
        rows_smem=plgpu.SMEM((stages // 2 if blockwise else 1, TILE_ROWS), jnp.float32),
        vectors_smem=[plgpu.SMEM((columns,), vector.dtype) for vector in vectors],
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        side_full=plgpu.Barrier(num_arrivals=len(vectors) + (not blockwise)),
        side_empty=plgpu.Barrier(num_arrivals=CONSUMERS),
    )
    if blockwise:
        buffers["scales_full"] = plgpu.Barrier(num_barriers=stages // 2)
    if quantise:
        buffers["scale_smem"] = plgpu.SMEM((TILE_ROWS,), jnp.float32)
    return buffers


class _Matmul:
    """The walk of one CTA over its tiles."""

    def __init__(self, gmem: dict[str, Any], scratch: dict[str, Any], config, gelu, blockwise):
        self.gmem, self.config, self.gelu, self.blockwise = gmem, config, gelu, blockwise
        for name, ref in scratch.items():
            setattr(self, name, ref)
        rows, depth = gmem["x"].shape
        self.steps = depth // DEPTH
        self.width = config.columns
        self.across = pl.cdiv(rows, TILE_ROWS), pl.cdiv(gmem["weight"].shape[0], self.width)
        self.vectors = [name for name in ("weight_scale", "bias") if name in gmem]
        self.dtype = gmem["x"].dtype
        self.sums = jnp.int32 if self.dtype == jnp.int8 else jnp.float32

    def run(self) -> None:
        """Dispatch this warpgroup to its role."""
        mosaic.dispatch(CONSUMERS, self.consume, self.produce)

    def for_tiles(self, body) -> None:
        """Run `body(row tile, column tile, stages before)` for this CTA's tiles."""
        cta, ctas, mine = mosaic.share(self.across[0] * self.across[1])

        def tile(number, carry):
            index = cta + number * ctas
            row, column = plgpu.planar_snake(
                index, self.across, self.config.along, self.config.snake
            )
            body(row, column, number * self.steps)
            return carry

        lax.fori_loop(0, mine, tile, None)

    def produce(self) -> None:
        """Fill the stages, and what the epilogue needs."""
        plgpu.set_max_registers(40, action="decrease")

        def tile(row, column, first):
            rows = pl.ds(row * TILE_ROWS, TILE_ROWS)
            columns = pl.ds(column * self.width, self.width)

            def step(k):
                stage = lax.rem(first + k, self.config.stages)
                depth = pl.ds(k * DEPTH, DEPTH)
                plgpu.barrier_wait(self.empty.at[stage])
                full = self.full.at[stage]
                plgpu.copy_gmem_to_smem(self.gmem["x"].at[rows, depth], self.x_smem.at[stage], full)
                plgpu.copy_gmem_to_smem(
                    self.gmem["weight"].at[columns, depth], self.w_smem.at[stage], full
                )

            def block(k):
                pair = lax.rem(lax.div(first, 2) + k, self.config.stages // 2)
                step(2 * k)
                plgpu.copy_gmem_to_smem(
                    self.gmem["x_scale"].at[k, rows],
                    self.rows_smem.at[pair],
                    self.scales_full.at[pair],
                )
                step(2 * k + 1)

            if self.blockwise:
                pl.loop(0, self.steps // 2)(block)
            else:
                pl.loop(0, self.steps)(step)
            # Last, since it waits for the epilogue of the tile before.
            plgpu.barrier_wait(self.side_empty)
            for name, target in zip(self.vectors, self.vectors_smem, strict=True):
                plgpu.copy_gmem_to_smem(self.gmem[name].at[columns], target, self.side_full)
            if not self.blockwise:
                scales = self.gmem["x_scale"].at[0, rows]
                plgpu.copy_gmem_to_smem(scales, self.rows_smem.at[0], self.side_full)

        self.for_tiles(tile)

    def consume(self, warpgroup) -> None:
        """Own half of the rows of every tile."""
        plgpu.set_max_registers(232, action="increase")
        for stage in range(self.config.stages):
            plgpu.barrier_arrive(self.empty.at[stage])
        plgpu.barrier_arrive(self.side_empty)
        self.own = pl.ds(warpgroup * ROWS, ROWS)

        def tile(row, column, first):
            halves = self._blockwise_sums(first) if self.blockwise else self._sums(first)
            plgpu.barrier_wait(self.side_full)
            self._leave(halves, row, column, warpgroup)
            plgpu.barrier_arrive(self.side_empty)

        self.for_tiles(tile)
        plgpu.wait_smem_to_gmem(0)

    def _sums(self, first) -> list[Float[Array, "64 128"]]:
        """The tile's sums over K, not scaled, in halves of the columns."""

        def multiply(sums):
            def step(k, carry):
                stage = lax.rem(first + k, self.config.stages)
                plgpu.barrier_wait(self.full.at[stage])
                rows = self.x_smem.at[stage, self.own]
                plgpu.wgmma(sums, rows, mosaic.transposed(self.w_smem.at[stage]))
                # The product before this one is done, and with it its stage.
                plgpu.wgmma_wait(1)
                before = lax.rem(first + k + self.config.stages - 1, self.config.stages)
                pl.when(k > 0)(lambda: plgpu.barrier_arrive(self.empty.at[before]))
                return carry

            lax.fori_loop(0, self.steps, step, None)
            return sums[...]

        sums = pl.run_scoped(multiply, plgpu.ACC((ROWS, self.width), self.sums))
        last = lax.rem(first + self.steps - 1, self.config.stages)
        plgpu.barrier_arrive(self.empty.at[last])
        starts = range(0, self.width, HALF)
        return [sums[:, start : start + HALF].astype(jnp.float32) for start in starts]

    def _blockwise_sums(self, first) -> list[Float[Array, "64 128"]]:
        """The tile's sums over K with the row scales of every block, in halves of the columns."""

        def block(k, totals):
            pair = lax.rem(lax.div(first, 2) + k, self.config.stages // 2)
            stages = 2 * pair, 2 * pair + 1
            plgpu.barrier_wait(self.scales_full.at[pair])
            scale = mosaic.load(self.rows_smem.at[pair, self.own], mosaic.ROW)
            added = []
            for half, total in enumerate(totals):
                columns = pl.ds(half * HALF, HALF)

                def multiply(sums, columns=columns, half=half):
                    for stage in stages:
                        if half == 0:
                            plgpu.barrier_wait(self.full.at[stage])
                        x, weight = self.x_smem.at[stage, self.own], self.w_smem.at[stage, columns]
                        plgpu.wgmma(sums, x, mosaic.transposed(weight))
                    return sums[...]

                accumulator = plgpu.ACC((ROWS, HALF), self.sums)
                sums = pl.run_scoped(multiply, accumulator).astype(jnp.float32)
                if half == len(totals) - 1:
                    for stage in stages:
                        plgpu.barrier_arrive(self.empty.at[stage])
                added.append(total + sums * mosaic.spread(scale, total))
            return tuple(added)

        zero = mosaic.zero_output(HALF)
        zeros = (zero,) * (self.width // HALF)
        return list(lax.fori_loop(0, self.steps // 2, block, zeros))

    def _leave(self, halves: list[Float[Array, "64 128"]], row, column, warpgroup) -> None:
        """Scale, bias, GELU, and the way to global memory."""
        place = pl.ds(row * TILE_ROWS + warpgroup * ROWS, ROWS)
        halves = [self._finished(y, half * HALF) for half, y in enumerate(halves)]
        if "out_scale" in self.gmem:
            halves = self._quantised(*halves)
        slots, width = self.out_smem.shape[1], self.out_smem.shape[-1]
        for number, left in enumerate(range(0, self.width, width)):
            out, within = self.out_smem.at[warpgroup, number % slots], left % HALF
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            out[...] = halves[left // HALF][:, within : within + width].astype(out.dtype)
            plgpu.commit_smem()
            columns = pl.ds(column * self.width + left, width)
            plgpu.copy_smem_to_gmem(out, self.gmem["out"].at[place, columns])
        if "out_scale" in self.gmem:
            plgpu.copy_smem_to_gmem(
                self.scale_smem.at[self.own], self.gmem["out_scale"].at[column, place]
            )

    def _finished(self, y: Float[Array, "64 128"], left: int) -> Float[Array, "64 128"]:
        """Sums from column `left` of the tile on, with scales, biases and GELU."""
        columns = pl.ds(left, HALF)
        if not self.blockwise:
            rows = mosaic.load(self.rows_smem.at[0, self.own], mosaic.ROW)
            y = y * mosaic.spread(rows, y)
        scale, *bias = (
            lax.broadcast_in_dim(
                mosaic.load(ref.at[columns], mosaic.COLUMN).astype(jnp.float32), y.shape, [1]
            )
            for ref in self.vectors_smem
        )
        y = y * scale + bias[0] if bias else y * scale
        return mosaic.gelu(y) if self.gelu else y

    def _quantised(self, left: Array, right: Array) -> list[Array]:
        """The rows as multiples of their scales, which are left in shared memory."""
        dtype = jnp.dtype(self.gmem["out"].dtype)
        largest = LARGEST[dtype]
        top = jnp.maximum(jnp.abs(left).max(axis=1), jnp.abs(right).max(axis=1))
        top = jnp.maximum(top, 1e-30)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.scale_smem[self.own] = top * (1.0 / largest)
        halves = [y * mosaic.spread(largest / top, y) for y in (left, right)]
        if dtype == jnp.int8:
            halves = [mosaic.round_to_whole(y) for y in halves]
        return halves
