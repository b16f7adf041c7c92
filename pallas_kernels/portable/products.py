"""Products of 16-bit activations with 8-bit weights, for few rows: bound by the weights they read.

A program has a tile of outputs for a tile of rows, and walks the inputs or a part of them: weights
come as 8-bit values, become 16-bit ones in registers, where every such value is exact, and meet the
activations as those are. Weights are the left operand, the one that tensor cores take out of
registers. Sums are of float32; the scale of an output multiplies its sum once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from pallas_kernels import calls
from pallas_kernels.portable import _triton as tri
from pallas_kernels.portable import tuning
from pallas_kernels.shapes import ceil_div
from pallas_kernels.xla.quantised import finished

_PROGRAMS = 2
"""For every multiprocessor at least; where tiles are fewer, programs share the inputs of one."""
_PARTS = 8


def weight_matmul(call: calls.WeightMatmul) -> Float[Array, "R T O"]:
    """`x @ weight.T`, scaled, with bias and GELU; rows of all batch entries together."""
    batch, tokens, inputs = call.x.shape
    rows, outputs = batch * tokens, call.weight.shape[0]
    tiles = tuning.products(rows, call.device.capability)
    grid = (ceil_div(outputs, tiles.outputs), ceil_div(rows, tiles.rows))
    parts = _parts(grid[0] * grid[1], ceil_div(inputs, tiles.step), call.device.multiprocessors)
    done = parts == 1 and call.bias is None and not call.gelu
    out = tri.call(
        _kernel(rows, outputs, inputs, parts, tiles),
        jax.ShapeDtypeStruct((parts, rows, outputs), call.dtype if done else jnp.float32),
        (*grid, parts), tiles, call.x.reshape(rows, inputs), call.weight, call.weight_scale,
    )  # fmt: skip
    whole = out.sum(0).reshape(batch, tokens, outputs)
    return whole if done else finished(whole, None, call.bias, gelu=call.gelu).astype(call.dtype)


def _parts(programs: int, steps: int, multiprocessors: int) -> int:
    """Into how many parts the inputs go, so that every multiprocessor has something to read."""
    wanted = ceil_div(_PROGRAMS * multiprocessors, programs)
    return max(1, min(wanted, _PARTS, steps // 4))


def _kernel(rows: int, outputs: int, inputs: int, parts: int, tiles: tuning.ProductTiles):
    """Of programs (tile of outputs, tile of rows, part of the inputs)."""
    steps = ceil_div(inputs, tiles.step)
    each = ceil_div(steps, parts)

    def weight_matmul_kernel(x_ref, weight_ref, scale_ref, out_ref):
        output = pl.program_id(0) * tiles.outputs + jnp.arange(tiles.outputs, dtype=jnp.int32)
        row = pl.program_id(1) * tiles.rows + jnp.arange(tiles.rows, dtype=jnp.int32)
        part = pl.program_id(2)
        made, wanted = output < outputs, row < rows

        def tile(ref, at, there, number):
            column = number * tiles.step + jnp.arange(tiles.step, dtype=jnp.int32)
            mask = tri.spread(there, tiles.step)
            if inputs % tiles.step:
                mask &= (column < inputs)[None, :]
            return pltriton.load(ref.at[at[:, None], column[None, :]], mask=mask, other=0.0)

        def add(number, total):
            weight = tile(weight_ref, output, made, number)
            x = tile(x_ref, row, wanted, number)
            return total + tri.product(weight.astype(x.dtype), x, 1)

        total = jnp.zeros((tiles.outputs, tiles.rows), jnp.float32)
        first = part * each
        last = jnp.minimum(first + each, jnp.int32(steps))
        total = lax.fori_loop(first, last, add, total)
        scale = pltriton.load(scale_ref.at[output], mask=made, other=0.0)
        y = (total * scale[:, None]).astype(out_ref.dtype)
        at = out_ref.at[part, row[None, :], output[:, None]]
        pltriton.store(at, y, mask=made[:, None] & wanted[None, :])

    return weight_matmul_kernel
