"""Residual update, layer norm and modulation on Hopper in one pass over the residual stream.

One warpgroup owns a token at a time and keeps its whole width in registers, so that mean and
variance are computed in two passes without reading memory twice. A CTA is one warpgroup that walks
consecutive tokens of one row; several of them share a multiprocessor and hide each other's latency.
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
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.fused_shapes import EPSILON, Vector
from pallas_kernels.hopper import _mosaic as mosaic
from pallas_kernels.shapes import ceil_div
from pallas_kernels.xla.quantised import LARGEST


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """ctas: CTAs a multiprocessor is given; resident: whether gains, scales and shifts stay in
    registers from token to token (else they are read again, from the first-level cache)."""

    ctas: int = 4
    resident: bool = True


def norm_config(width: int) -> NormConfig:
    """Wide rows fill the register file, so their vectors are read again for every token."""
    return NormConfig(resident=width <= 2048)


def residual_norm(
    x: Float[Array, "R T C"],
    branch: Float[Array, "R T C"] | None,
    vectors: dict[str, Vector],
    *,
    one_plus: bool,
    dtype: DTypeLike,
    config: NormConfig,
    multiprocessors: int,
) -> tuple[Float[Array, "R T C"], Array | tuple[Array, Array]]:
    """(x + gain * (branch + bias), its modulated norm); `vectors` may lack "gain" and "bias".

    In 8 bits the norm is its values and one scale a row [1, R, T].
    """
    operands = {"x": x} if branch is None else {"x": x, "branch": branch}
    operands |= {name: table for name, (table, _) in vectors.items()}
    out = _call(
        operands,
        indices=tuple((name, index) for name, (_, index) in vectors.items()),
        one_plus=one_plus,
        dtype=jnp.dtype(dtype),
        resident=config.resident,
        ctas=config.ctas * multiprocessors,
    )
    y = (out["y"], out["y_scale"][None]) if "y_scale" in out else out["y"]
    return out.get("x_new", x), y


@functools.partial(jax.jit, static_argnames=("indices", "one_plus", "dtype", "resident", "ctas"))
def _call(
    operands: dict[str, Array], *, indices, one_plus, dtype, resident, ctas
) -> dict[str, Array]:
    """The normed stream and, with a branch, the new one; jitted to be lowered once a program."""
    x = operands["x"]
    rows, tokens, _ = x.shape
    chunk = ceil_div(rows * tokens, ctas)
    outputs = {"y": jax.ShapeDtypeStruct(x.shape, dtype)}
    if dtype in LARGEST:
        outputs["y_scale"] = jax.ShapeDtypeStruct(x.shape[:2], jnp.float32)
    if "branch" in operands:
        outputs["x_new"] = jax.ShapeDtypeStruct(x.shape, x.dtype)

    def residual_norm_kernel(*refs):
        gmem = dict(zip([*operands, *outputs], refs, strict=True))
        _ResidualNorm(gmem, dict(indices), one_plus, resident).run(chunk)

    results = plgpu.kernel(
        residual_norm_kernel,
        out_type=list(outputs.values()),
        grid=(ceil_div(tokens, chunk), rows),
        grid_names=("chunk", "row"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*operands.values())
    return dict(zip(outputs, results, strict=True))


def width_layout(width: int) -> Any:
    """Layout of one token's [C] over a warpgroup: 16 bytes of float32 a thread where that fits.

    A thread never holds less than two elements: jax 0.12 refuses transfers of 2 bytes. Odd
    multiples of 128 therefore fill two warps, and the other two hold the same values.
    """
    if width % 256:
        tiling = plgpu.Tiling(((128,), (64,), (2,)))
        return plgpu.Layout.TILED(tiling, (-3, plgpu.Replicated(2)), (-2,), -1)
    size = 4 if width % 512 == 0 else 2
    tiling = plgpu.Tiling(((128 * size,), (32 * size,), (size,)))
    return plgpu.Layout.TILED(tiling, (-3,), (-2,), -1)


class _ResidualNorm:
    """The walk of one CTA over its tokens."""

    def __init__(self, gmem: dict[str, Any], indices: dict[str, int], one_plus, resident: bool):
        self.gmem, self.indices = gmem, indices
        self.one_plus, self.resident = one_plus, resident
        self.row = lax.axis_index("row")
        self.layout = width_layout(gmem["x"].shape[-1])

    def run(self, chunk: int) -> None:
        """Walk `chunk` tokens, or what is left of the row."""
        first = lax.axis_index("chunk") * chunk
        if chunk == 1:  # No loop: all loads are in flight together.
            self._token(first, self._vectors())
            return
        last = jnp.minimum(first + chunk, self.gmem["x"].shape[1])
        kept = self._vectors() if self.resident else {}

        def step(token, carry):
            self._token(token, kept or self._vectors())
            return carry

        lax.fori_loop(first, last, step, None)

    def _vectors(self) -> dict[str, Float[Array, " C"]]:
        values = {}
        for name, index in self.indices.items():
            table = self.gmem[name]
            row = self.row if table.shape[0] > 1 else 0
            value = mosaic.load(table.at[row, index], self.layout).astype(jnp.float32)
            values[name] = 1.0 + value if name == "scale" and self.one_plus else value
        return values

    def _token(self, token, vectors: dict[str, Float[Array, " C"]]) -> None:
        x = mosaic.load(self.gmem["x"].at[self.row, token], self.layout).astype(jnp.float32)
        if "branch" in self.gmem:
            branch = mosaic.load(self.gmem["branch"].at[self.row, token], self.layout)
            branch = branch.astype(jnp.float32)
            if "bias" in vectors:
                branch = branch + vectors["bias"]
            x = x + (branch * vectors["gain"] if "gain" in vectors else branch)
            kept = x.astype(self.gmem["x_new"].dtype)
            self.gmem["x_new"][self.row, token] = kept
            x = kept.astype(jnp.float32)  # the norm of what the next block reads
        share = 1.0 / x.shape[0]
        centred = x - jnp.sum(x) * share
        inverse = lax.rsqrt(jnp.sum(centred * centred) * share + EPSILON)
        y = centred * inverse * vectors["scale"] + vectors["shift"]
        dtype = self.gmem["y"].dtype
        if "y_scale" in self.gmem:
            y, self.gmem["y_scale"][self.row, token] = mosaic.eight_bits(y, dtype)
        self.gmem["y"][self.row, token] = y.astype(dtype)
