"""Products of few 16-bit activations with 8-bit weights on Hopper, widened in registers.

A tile has 128 or 256 outputs for up to 320 rows and all of the inputs, or a part of them where
tiles are too few. A producer warpgroup brings stages of inputs with TMA and runs ahead across
tiles; consumer warpgroups own 64 outputs each. Weights are the left operand, the one that WGMMA
takes out of registers, so that a value is widened once for all rows of the tile. The sums lie
outputs first and are turned over on their way out.

A warpgroup widens weights or multiplies, never both: operands in registers that change while a
WGMMA is under way make the assembler wait after each of them. While one widens, others multiply;
where their sums leave registers for it there are four in place of two.

int8 becomes bfloat16, in which it is exact. e4m3 becomes float16, for which Hopper has a
conversion; activations follow it, and keep all their bits between 2^-14 and 2^16.
"""

# Mosaic GPU's references are dynamic: pyright cannot follow their attributes and operators.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false, reportOperatorIssue=false

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Shaped

from pallas_kernels.hopper import _mosaic as mosaic
from pallas_kernels.hopper.product_tiles import LEFT, OUTPUTS, Tile, parts_of
from pallas_kernels.shapes import ceil_div
from pallas_kernels.xla.quantised import finished

REGISTERS = {2: (40, 232), 4: (32, 112)}
"""Of a thread that brings and of one that multiplies, by how many warpgroups multiply."""
SHARED = 216 * 1024
"""Bytes of shared memory for stages and for what leaves."""
MOST_STAGES = 12


def weight_matmul(
    x: Float[Array, "M C"],
    weight: Shaped[Array, "O C"],
    scale: Float[Array, "O"],
    bias: Float[Array, "O"] | None,
    *,
    gelu: bool,
    ctas: int,
) -> Float[Array, "M O"]:
    """`x @ weight.T` times a scale an output, plus a bias, perhaps through the GELU, like x."""
    rows, dtype = x.shape[0], x.dtype
    x = x if weight.dtype == jnp.int8 else in_float16(x)
    x = mosaic.pad_rows(x) if rows > 8 else x  # tiled copies take fewer than 8 as well
    tile = Tile.of(rows, weight.shape[0])
    tiles = tile.across * ceil_div(weight.shape[0], tile.outputs)
    parts = parts_of(tiles, weight.shape[1], tile, ctas)
    given = {"x": x, "weight": weight}
    if parts == 1:
        given |= {"scale": scale} if bias is None else {"scale": scale, "bias": bias}
        return _call(given, tile=tile, parts=1, gelu=gelu, dtype=dtype, ctas=ctas)[0, :rows]
    sums = _call(given, tile=tile, parts=parts, gelu=False, dtype=jnp.dtype("float32"), ctas=ctas)
    return finished(sums[:, :rows].sum(0)[None], scale, bias, gelu=gelu)[0].astype(dtype)


def in_float16(x: Float[Array, "M C"]) -> Float[Array, "M C"]:
    """Activations in float16, those beyond it as its largest. bfloat16 has no such bound: the value
    nearest to 65504 is 65536, which would become infinite."""
    largest = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(x.astype(jnp.float32), -largest, largest).astype(jnp.float16)


@functools.partial(jax.jit, static_argnames=("tile", "parts", "gelu", "dtype", "ctas"))
def _call(
    given: dict[str, Array], *, tile: Tile, parts: int, gelu: bool, dtype: jnp.dtype, ctas: int
) -> Float[Array, "parts M O"]:
    """Sums over each part of the inputs, finished where scales are given; lowered once."""
    x, weight = given["x"], given["weight"]

    def weight_matmul_kernel(*refs, **scratch):
        gmem = dict(zip([*given, "out"], refs, strict=True))
        _Product(gmem, scratch, tile, gelu).run()

    return mosaic.kernel(
        weight_matmul_kernel,
        out_type=jax.ShapeDtypeStruct((parts, x.shape[0], weight.shape[0]), dtype),
        grid=(ctas,),
        num_threads=tile.consumers + 1,
        scratch_types=_scratch(x.dtype, weight.dtype, dtype, tile),
        compiler_params=mosaic.compiler_params(),
    )(*given.values())


def _scratch(dtype, weights, out_dtype, tile: Tile) -> dict[str, Any]:
    rows, depth = tile.height, tile.depth
    stage = depth * (rows * jnp.dtype(dtype).itemsize + tile.outputs)
    leaving = tile.consumers, 2, min(LEFT, rows), OUTPUTS
    stages = min(MOST_STAGES, (SHARED - math.prod(leaving) * out_dtype.itemsize) // stage)
    return dict(
        x_smem=mosaic.tiled_smem((stages, rows, depth), dtype),
        w_smem=mosaic.tiled_smem((stages, tile.outputs, depth), weights),
        out_smem=mosaic.tiled_smem(leaving, out_dtype),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=tile.consumers, num_barriers=stages),
    )


class _Product:
    """The walk of one CTA over its tiles."""

    def __init__(self, gmem: dict[str, Any], scratch: dict[str, Any], tile: Tile, gelu: bool):
        self.gmem, self.shape, self.gelu = gmem, tile, gelu
        for name, ref in scratch.items():
            setattr(self, name, ref)
        self.dtype = gmem["x"].dtype
        self.stages = self.x_smem.shape[0]
        self.depth = tile.depth
        self.steps = gmem["weight"].shape[1] // self.depth
        self.parts = gmem["out"].shape[0]
        self.each = ceil_div(self.steps, self.parts)
        self.columns = pl.cdiv(gmem["weight"].shape[0], tile.outputs)

    def run(self) -> None:
        """Dispatch this warpgroup to its role."""
        mosaic.dispatch(self.shape.consumers, self.consume, self.produce)

    def for_tiles(self, body) -> None:
        """Run `body(part, first row, first output, first step, steps, steps before)` for tiles.

        Tiles that read the same weights run side by side.
        """
        across = self.shape.across
        cta, ctas, mine = mosaic.share(across * self.columns * self.parts)

        def tile(number, before):
            index = cta + number * ctas
            row, rest = lax.rem(index, across), lax.div(index, across)
            column, part = lax.rem(rest, self.columns), lax.div(rest, self.columns)
            first = part * self.each
            steps = jnp.minimum(self.each, self.steps - first)
            row, output = row * self.shape.height, column * self.shape.outputs
            body(part, row, output, first, steps, before)
            return before + steps

        lax.fori_loop(0, mine, tile, jnp.int32(0))

    def produce(self) -> None:
        """Fill the stages."""
        plgpu.set_max_registers(REGISTERS[self.shape.consumers][0], action="decrease")

        def tile(part, row, output, first, steps, before):
            del part
            wanted = (
                ("x", pl.ds(row, self.shape.height), self.x_smem),
                ("weight", pl.ds(output, self.shape.outputs), self.w_smem),
            )

            def step(k):
                stage = lax.rem(before + k, self.stages)
                inputs = pl.ds((first + k) * self.depth, self.depth)
                plgpu.barrier_wait(self.empty.at[stage])
                full = self.full.at[stage]
                for name, where, into in wanted:
                    source = self.gmem[name].at[where, inputs]
                    plgpu.copy_gmem_to_smem(source, into.at[stage], full)

            pl.loop(0, steps)(step)

        self.for_tiles(tile)

    def consume(self, warpgroup) -> None:
        """Own a part of the outputs of every tile."""
        plgpu.set_max_registers(REGISTERS[self.shape.consumers][1], action="increase")
        for stage in range(self.stages):
            plgpu.barrier_arrive(self.empty.at[stage])
        self.own = pl.ds(warpgroup * OUTPUTS, OUTPUTS)

        def tile(part, row, output, first, steps, before):
            del first
            self._leave(self._sums(steps, before), part, row, output, warpgroup)

        self.for_tiles(tile)
        plgpu.wait_smem_to_gmem(0)

    def _sums(self, steps, before) -> list[Float[Array, "64 rows"]]:
        """Of all groups of rows, over the steps of a tile."""

        def multiply(*sums):
            def step(k):
                stage = lax.rem(before + k, self.stages)
                plgpu.barrier_wait(self.full.at[stage])
                weight = self._widened(stage)
                for group, into in enumerate(sums):
                    rows = pl.ds(group * self.shape.rows, self.shape.rows)
                    plgpu.wgmma(into, weight, mosaic.transposed(self.x_smem.at[stage, rows]))
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(self.empty.at[stage])

            pl.loop(0, steps)(step)
            return [part[...] for part in sums]

        accumulator = plgpu.ACC((OUTPUTS, self.shape.rows), jnp.float32)
        return pl.run_scoped(multiply, *[accumulator] * self.shape.groups)

    def _widened(self, stage) -> Array:
        """Weights of a stage as 16-bit ones, in the layout in which WGMMA takes registers."""
        weight = self.w_smem.at[stage, self.own]
        values = plgpu.load(weight, layout=plgpu.Layout.WGMMA_UPCAST_2X)
        # Lanes exchange what is narrow still.
        return plgpu.layout_cast(values, plgpu.Layout.WGMMA).astype(self.dtype)

    def _leave(self, sums: list[Float[Array, "64 rows"]], part, row, output, warpgroup) -> None:
        """The way of sums to global memory, some rows at a time."""
        outputs = pl.ds(output + warpgroup * OUTPUTS, OUTPUTS)
        vectors = {
            name: mosaic.load(self.gmem[name].at[outputs], mosaic.ROW).astype(jnp.float32)
            for name in ("scale", "bias")
            if name in self.gmem
        }
        left = min(LEFT, self.shape.rows)
        for number, start in enumerate(range(0, self.shape.height, left)):
            out = self.out_smem.at[warpgroup, number % 2]
            group, within = divmod(start, self.shape.rows)
            y = self._finished(sums[group][:, within : within + left], vectors).astype(out.dtype)
            # The tile before may have left by either buffer.
            plgpu.wait_smem_to_gmem(min(number, 1), wait_read_only=True)
            mosaic.transposed(out)[...] = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                out, self.gmem["out"].at[part, pl.ds(row + start, left), outputs]
            )

    def _finished(self, y: Float[Array, "64 rows"], vectors: dict[str, Array]) -> Array:
        """Sums with the scales and biases of their outputs, and the GELU."""
        if "scale" in vectors:
            y = y * mosaic.spread(vectors["scale"], y)
        if "bias" in vectors:
            y = y + mosaic.spread(vectors["bias"], y)
        return mosaic.gelu(y) if self.gelu else y
