"""Calls of the public operations after their arguments were checked: what a backend is given.

Arrays are as the public function of the same name describes them. What a backend's `run` returns is
what that function returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.fused_shapes import Rows, Vector
from pallas_kernels.sparsity import BlockTable, Gaps, Geometry
from pallas_kernels.support import Device


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of an operation, and the device it will run on."""

    op: ClassVar[str]
    device: Device


@dataclass(frozen=True, kw_only=True)
class CacheCall(Call):
    """What all attention on a cache has in common."""

    q: Float[Array, "R2 H T D"]
    k: Float[Array, "R H S D"]
    v: Float[Array, "R H S D"]
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Attention(CacheCall):
    op = "attention"
    kv_length: int
    return_lse: bool = False
    gaps: Gaps = ()
    logit_bound: float | None = None
    hidden_finite: bool = False


@dataclass(frozen=True, kw_only=True)
class BlockSparseAttention(CacheCall):
    op = "block_sparse_attention"
    blocks: BlockTable
    return_lse: bool = False
    logit_bound: float | None = None
    hidden_finite: bool = False


@dataclass(frozen=True, kw_only=True)
class WindowAttention(CacheCall):
    op = "window_attention"
    geometry: Geometry
    windows: tuple[int, ...]
    sinks: int
    exact: bool = False
    logit_bound: float | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionColumnSums(CacheCall):
    """The sums alone, from a log-sum-exp: dense attention is a call of its own. Gives the sums."""

    op = "attention_column_sums"
    lse: Float[Array, "R2 H T"]
    kv_length: int
    group: int
    gaps: Gaps = ()


@dataclass(frozen=True, kw_only=True)
class ColumnSparseAttention(CacheCall):
    op = "column_sparse_attention"
    columns: Int[Array, "R2 H G K"]
    counts: Int[Array, "R2 H G"]
    kv_length: int
    group: int
    granularity: int
    gaps: Gaps = ()
    logit_bound: float | None = None


@dataclass(frozen=True, kw_only=True)
class SelectColumns(Call):
    op = "select_columns"
    sums: Float[Array, "R2 H G S2"]
    count: int
    granularity: int


@dataclass(frozen=True, kw_only=True)
class ResidualNorm(Call):
    """`vectors`: "scale" and "shift", and with a branch perhaps "gain" and "bias"."""

    op = "residual_norm"
    x: Float[Array, "R T C"]
    branch: Float[Array, "R T C"] | None
    vectors: dict[str, Vector]
    one_plus: bool
    dtype: jnp.dtype


@dataclass(frozen=True, kw_only=True)
class RotaryToCache(Call):
    """The joint product and its biases come cut into heads."""

    op = "rotary_to_cache"
    qkv: Float[Array, "R T 3 H D"]
    q_bias: Float[Array, "H D"]
    v_bias: Float[Array, "H D"]
    log_temperature: Float[Array, " H"]
    cos: Float[Array, "T D"] | Float[Array, "R T D"]
    sin: Float[Array, "T D"] | Float[Array, "R T D"]
    k_cache: Float[Array, "Rk H S D"]
    v_cache: Float[Array, "Rk H S D"]
    place: Rows
    max_log_temperature: float


@dataclass(frozen=True, kw_only=True)
class TextMemory(Call):
    """Offsets are made already; a backend may lay all three out as its kernel takes them."""

    op = "text_memory"
    k: Float[Array, "R H M D"]
    v: Float[Array, "R H M D"]
    offsets: Float[Array, "R H M"]


@dataclass(frozen=True, kw_only=True)
class CrossAttention(Call):
    op = "cross_attention"
    q: Float[Array, "R T C"]
    k: Float[Array, "Rk H M D"]
    v: Float[Array, "Rk H M D"]
    offsets: Float[Array, "Rk H M"]
    scale: float


@dataclass(frozen=True, kw_only=True)
class Quantise(Call):
    """With one scale a row."""

    op = "quantise"
    x: Float[Array, "R T C"]
    dtype: jnp.dtype


@dataclass(frozen=True, kw_only=True)
class QuantisedMatmul(Call):
    """Scales are one a row, or one a row and block; an 8-bit result comes with its own."""

    op = "quantised_matmul"
    values: Shaped[Array, "R T C"]
    scale: Float[Array, "blocks R T"]
    weight: Shaped[Array, "O C"]
    weight_scale: Float[Array, " O"]
    bias: Float[Array, " O"] | None
    gelu: bool
    dtype: jnp.dtype


@dataclass(frozen=True, kw_only=True)
class WeightMatmul(Call):
    """Activations in their own dtype, which is that of the result, times 8-bit weights."""

    op = "weight_matmul"
    x: Float[Array, "R T C"]
    weight: Shaped[Array, "O C"]
    weight_scale: Float[Array, " O"]
    bias: Float[Array, " O"] | None
    gelu: bool
    dtype: jnp.dtype


OPS = tuple(
    kind.op
    for kind in (
        Attention,
        BlockSparseAttention,
        WindowAttention,
        AttentionColumnSums,
        ColumnSparseAttention,
        SelectColumns,
        ResidualNorm,
        RotaryToCache,
        TextMemory,
        CrossAttention,
        Quantise,
        QuantisedMatmul,
        WeightMatmul,
    )
)
"""Names of all operations."""
