"""Heads, biases, cosine normalisation and rotary positions on Hopper, written into the cache.

One pass over the output of the query/key/value product: a CTA is one warpgroup that walks cache
rows of one scale. A warp holds whole heads of a token, so norms are sums inside a warp and pairs of
rotary neighbours are inside a thread. Queries leave heads-major; keys and values go to their rows
of the cache in place; rows that only pad a grid row, and those to clear after it, are zeroed.
"""

# Mosaic GPU's references are dynamic: pyright cannot follow their attributes and operators.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false, reportOperatorIssue=false

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector
from jaxtyping import Array, Float

from pallas_kernels.fused_shapes import Rows
from pallas_kernels.hopper import _mosaic as mosaic
from pallas_kernels.shapes import ceil_div

_VECTOR = 4
_SMALLEST_SQUARE = 1e-24


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """ctas: CTAs a multiprocessor is given."""

    ctas: int = 4


def heads_layout(heads: int, head_dim: int) -> Any:
    """Layout of one token's [H, D]: a warp holds whole heads, a thread 4 neighbours of one.

    Head counts that four warps cannot share evenly are held by fewer warps, several times over.
    """
    per_warp = 32 * _VECTOR // head_dim
    warps = next(n for n in (4, 2, 1) if heads % (n * per_warp) == 0)
    warp, lane = -4, (-3,)
    tiles: list[tuple[int, ...]] = [(warps * per_warp, head_dim), (1, _VECTOR)]
    if per_warp > 1:
        tiles.insert(1, (per_warp, head_dim))
        warp, lane = (-6, (-4, -3))
    copies = plgpu.Replicated(4 // warps)
    spread = {4: (warp,), 2: (warp, copies), 1: (copies,)}[warps]
    tiling = plgpu.Tiling(tuple(tiles))
    layout = mgpu.TiledLayout(tiling, spread, lane, -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def rotary_to_cache(
    qkv: Float[Array, "R T 3 H D"],
    q_bias: Float[Array, "H D"],
    v_bias: Float[Array, "H D"],
    log_temperature: Float[Array, " H"],
    cos: Float[Array, "T D"],
    sin: Float[Array, "T D"],
    k_cache: Float[Array, "Rk H S D"],
    v_cache: Float[Array, "Rk H S D"],
    place: Rows,
    max_log_temperature: float,
    config: RotaryConfig,
    multiprocessors: int,
) -> tuple[Float[Array, "R H T D"], Float[Array, "Rk H S D"], Float[Array, "Rk H S D"]]:
    """Queries and the two caches with the scale's rows written."""
    ctas = config.ctas * multiprocessors
    operands = (qkv, q_bias, v_bias, log_temperature, cos, sin, k_cache, v_cache)
    return _call(*operands, place=place, max_log_temperature=max_log_temperature, ctas=ctas)


@functools.partial(jax.jit, static_argnames=("place", "max_log_temperature", "ctas"))
def _call(
    qkv, q_bias, v_bias, log_temperature, cos, sin, k_cache, v_cache, *,
    place: Rows, max_log_temperature: float, ctas: int,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Jitted to be lowered once a program."""
    rows, tokens, _, heads, head_dim = qkv.shape
    walked = place.span + place.clear
    chunk = ceil_div(rows * walked, ctas)
    layout = heads_layout(heads, head_dim)
    names = ("qkv", "q_bias", "v_bias", "log_temperature", "cos", "sin", "k", "v", "q")

    def rotary_to_cache_kernel(*refs):
        gmem = dict(zip(names, refs, strict=True))
        _RotaryToCache(gmem, layout, place, max_log_temperature).run(chunk)

    mesh = plgpu.Mesh(grid=(ceil_div(walked, chunk), rows), grid_names=("chunk", "row"))
    k_ref, v_ref = jax.new_ref(k_cache), jax.new_ref(v_cache)
    q = pl.kernel(
        rotary_to_cache_kernel,
        out_type=jax.ShapeDtypeStruct((rows, heads, tokens, head_dim), k_cache.dtype),
        mesh=mesh,
        compiler_params=mosaic.compiler_params(),
    )(qkv, q_bias, v_bias, log_temperature, cos, sin, k_ref, v_ref)
    return q, jax.freeze(k_ref), jax.freeze(v_ref)


class _RotaryToCache:
    """The walk of one CTA over cache rows."""

    def __init__(self, gmem: dict[str, Any], layout, place: Rows, max_log_temperature: float):
        self.gmem, self.layout, self.place = gmem, layout, place
        self.max_log_temperature = max_log_temperature
        self.row = lax.axis_index("row")

    def run(self, chunk: int) -> None:
        """Walk `chunk` cache rows, or what is left of the scale and of the rows to clear."""
        gmem, place = self.gmem, self.place
        q_bias, v_bias = (mosaic.load(gmem[name], self.layout) for name in ("q_bias", "v_bias"))
        self.biases = q_bias.astype(jnp.float32), v_bias.astype(jnp.float32)
        log_temperature = mosaic.load(gmem["log_temperature"], self.layout.reduce(1))
        log_temperature = log_temperature.astype(jnp.float32)
        self.temperature = jnp.exp(jnp.minimum(log_temperature, self.max_log_temperature))
        first = lax.axis_index("chunk") * chunk
        if chunk == 1:  # No loop: all loads are in flight together.
            self._position(first)
            return
        last = jnp.minimum(first + chunk, place.span + place.clear)

        def step(position, carry):
            self._position(position)
            return carry

        lax.fori_loop(first, last, step, None)

    def _position(self, position) -> None:
        place = self.place
        if place.pitch == place.width and not place.clear:
            self._token(position, position)
            return
        y, x = lax.div(position, place.pitch), lax.rem(position, place.pitch)
        is_token = (x < place.width) & (y < place.height)
        pl.when(is_token)(lambda: self._token(y * place.width + x, position))
        pl.when(~is_token)(lambda: self._pad(position))

    def _token(self, token, position) -> None:
        gmem = self.gmem
        raw = [mosaic.load(gmem["qkv"].at[self.row, token, part], self.layout) for part in range(3)]
        tables = [
            mosaic.load(gmem[name].at[token], self.layout.reduce(0)) for name in ("cos", "sin")
        ]
        q, k, v = (x.astype(jnp.float32) for x in raw)
        q_bias, v_bias = self.biases
        q = self._turn(q + q_bias, self.temperature, tables)
        k = self._turn(k, None, tables)
        gmem["q"][self.row, :, token] = q.astype(gmem["q"].dtype)
        self._store("k", position, k)
        self._store("v", position, v + v_bias)

    def _turn(self, x: Float[Array, "H D"], temperature, tables) -> Float[Array, "H D"]:
        """Unit vectors, scaled, turned by the token's rotary angles."""
        square = jnp.sum(x * x, axis=1)
        factor = lax.rsqrt(jnp.maximum(square, _SMALLEST_SQUARE))
        if temperature is not None:
            factor = factor * temperature
        x = x * lax.broadcast_in_dim(factor, x.shape, [0])
        cos, sin = (lax.broadcast_in_dim(table, x.shape, [1]) for table in tables)
        return x * cos + swap_neighbours(x, self.layout) * sin

    def _store(self, name: str, position, value: Float[Array, "H D"]) -> None:
        ref = self.gmem[name]
        ref[self.row, :, self.place.start + position] = value.astype(ref.dtype)

    def _pad(self, position) -> None:
        heads, _, head_dim = self.gmem["k"].shape[1:]
        zeros = plgpu.layout_cast(jnp.zeros((heads, head_dim), jnp.float32), self.layout)
        for name in ("k", "v"):
            self._store(name, position, zeros)


def swap_neighbours(x: Float[Array, "H D"], layout) -> Float[Array, "H D"]:
    """Elements 2a and 2a + 1 of every head exchanged: both are in one thread's register."""

    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout)
    )
    def emit(_, x):
        order = [index ^ 1 for index in range(_VECTOR)]
        registers = np.empty_like(x.registers)
        for index, register in np.ndenumerate(x.registers):
            registers[index] = vector.shuffle(register, register, ir.DenseI64ArrayAttr.get(order))
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return emit(x)
