"""Attention of many image tokens to a prompt's few tokens on Hopper: one pass over the queries.

A CTA is one warpgroup that holds the keys and values of one head in shared memory and walks tiles
of 64 queries. Queries are read from, and outputs written to, token-major rows `[R, T, H * D]`, so
that neither has to be transposed around the matrix products. The output of a tile leaves through
its query buffer while the next tile is already in flight.
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
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper import _mosaic as mosaic
from pallas_kernels.shapes import ceil_div

TILE = 64
KEY_MULTIPLE = 64
_BUFFERS = 2


@dataclass(frozen=True, kw_only=True)
class CrossConfig:
    """ctas: CTAs a multiprocessor is given."""

    ctas: int = 3


def cross_attention(
    q: Float[Array, "R T C"],
    k: Float[Array, "Rk H M D"],
    v: Float[Array, "Rk H M D"],
    offsets: Float[Array, "Rk H M"],
    scale: float,
    config: CrossConfig,
    multiprocessors: int,
) -> Float[Array, "R T C"]:
    """Softmax over the text of `scale * q k + offsets`, times the values; token-major."""
    text = pad_text(k, v, offsets)
    return _call(q, *text, scale=scale, ctas=config.ctas * multiprocessors)


@functools.partial(jax.jit, static_argnames=("scale", "ctas"))
def _call(q, k, v, offsets, *, scale: float, ctas: int) -> Float[Array, "R T C"]:
    """Jitted to be lowered once a program."""
    rows, tokens, _ = q.shape
    _, heads, keys, head_dim = k.shape
    tiles = ceil_div(tokens, TILE)
    chunk = ceil_div(tiles, ceil_div(ctas, rows * heads))

    def cross_attention_kernel(*refs, **buffers):
        gmem = dict(zip(("q", "k", "v", "offsets", "out"), refs, strict=True))
        _CrossAttention(gmem, buffers, scale).run(chunk)

    padded = mosaic.pad_rows(q)
    shared = dict(
        q_smem=mosaic.tiled_smem((_BUFFERS, TILE, head_dim), q.dtype),
        k_smem=mosaic.tiled_smem((keys, head_dim), q.dtype),
        v_smem=mosaic.tiled_smem((keys, head_dim), q.dtype),
        text_full=plgpu.Barrier(num_arrivals=2),
        q_full=plgpu.Barrier(num_barriers=_BUFFERS),
    )
    out = plgpu.kernel(
        cross_attention_kernel,
        out_type=jax.ShapeDtypeStruct(padded.shape, q.dtype),
        grid=(ceil_div(tiles, chunk), heads, rows),
        grid_names=("chunk", "head", "row"),
        scratch_types=shared,
        compiler_params=mosaic.compiler_params(),
    )(padded, k, v, offsets)
    return out[:, :tokens]


def pad_text(
    k: Float[Array, "R H M D"], v: Float[Array, "R H M D"], offsets: Float[Array, "R H M"]
) -> tuple[Float[Array, "R H M2 D"], Float[Array, "R H M2 D"], Float[Array, "R H M2"]]:
    """A text padded with hidden tokens to the multiple of keys the kernel multiplies."""
    extra = -k.shape[2] % KEY_MULTIPLE
    if not extra:
        return k, v, offsets
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))) for x in (k, v))
    return k, v, jnp.pad(offsets, ((0, 0), (0, 0), (0, extra)), constant_values=mosaic.LOWEST)


class _CrossAttention:
    """The walk of one CTA over query tiles of one head."""

    def __init__(self, gmem: dict[str, Any], buffers: dict[str, Any], scale: float):
        self.gmem, self.factor = gmem, scale * mosaic.LOG2E
        for name, ref in buffers.items():
            setattr(self, name, ref)
        self.row, self.head = lax.axis_index("row"), lax.axis_index("head")
        self.head_dim = gmem["k"].shape[-1]

    def run(self, chunk: int) -> None:
        """Walk `chunk` tiles, or what is left of the row."""
        first = lax.axis_index("chunk") * chunk
        tiles = ceil_div(self.gmem["q"].shape[1], TILE)
        count = jnp.minimum(chunk, tiles - first)
        for name, smem in (("k", self.k_smem), ("v", self.v_smem)):
            plgpu.copy_gmem_to_smem(self.gmem[name].at[self.row, self.head], smem, self.text_full)
        self._load(first, 0)
        offsets = mosaic.load(self.gmem["offsets"].at[self.row, self.head], mosaic.COLUMN)
        offsets = jnp.maximum(offsets * mosaic.LOG2E, mosaic.LOWEST)
        plgpu.barrier_wait(self.text_full)

        def step(number, carry):
            buffer = lax.rem(number, _BUFFERS)
            plgpu.barrier_wait(self.q_full.at[buffer])
            scores = multiply_keys(self.q_smem.at[buffer], self.k_smem)
            # The other buffer's output has left; the barrier also ends all reads of this one.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            more, other = number + 1 < count, lax.rem(number + 1, _BUFFERS)
            pl.when(more)(lambda: self._load(first + number + 1, other))
            self.q_smem[buffer] = self._output(scores, offsets).astype(self.q_smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.q_smem.at[buffer], self._tile("out", first + number))
            return carry

        lax.fori_loop(0, count, step, None)
        plgpu.wait_smem_to_gmem(0)

    def _tile(self, name: str, tile):
        columns = pl.ds(self.head * self.head_dim, self.head_dim)
        return self.gmem[name].at[self.row, pl.ds(tile * TILE, TILE), columns]

    def _load(self, tile, buffer) -> None:
        plgpu.copy_gmem_to_smem(
            self._tile("q", tile), self.q_smem.at[buffer], self.q_full.at[buffer]
        )

    def _output(self, scores: Float[Array, "64 M"], offsets) -> Float[Array, "64 D"]:
        scores = scores * self.factor + lax.broadcast_in_dim(offsets, scores.shape, [1])
        weights = jnp.exp2(scores - mosaic.spread(scores.max(axis=1), scores))
        inverse = 1.0 / weights.sum(axis=1)
        out = multiply_values(weights.astype(self.v_smem.dtype), self.v_smem)
        return out * mosaic.spread(inverse, out)


def multiply_keys(q, k) -> Float[Array, "64 M"]:
    """Scores of a query tile in shared memory."""

    def multiply(scores):
        plgpu.wgmma(scores, q, k.transpose((1, 0)))
        return scores[...]

    return pl.run_scoped(multiply, plgpu.ACC((TILE, k.shape[0]), jnp.float32))


def multiply_values(weights: Float[Array, "64 M"], v) -> Float[Array, "64 D"]:
    """Weights in registers times values in shared memory."""

    def multiply(out):
        plgpu.wgmma(out, weights, v)

    return pl.run_state(multiply)(plgpu.ACC.init(mosaic.zero_output(v.shape[1])))
