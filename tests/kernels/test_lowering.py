"""Every attention kernel lowers for CUDA without a GPU: shapes, layouts, shared memory, copies."""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels import shapes
from pallas_kernels.hopper import ops, tuning

SQUARE = pk.Geometry.packed(shapes.SQUARE_GRIDS)
WIDE = pk.Geometry.packed(((1, 1), (3, 5), (9, 21)))


def lower(function, *operands):
    """Lower for CUDA; raises what the device would."""
    return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",))


def operands(queries, keys, head_dim=128, dtype=jnp.bfloat16, rows=1, heads=2):
    q = jax.ShapeDtypeStruct((rows, heads, queries, head_dim), dtype)
    k = jax.ShapeDtypeStruct((2, heads, keys, head_dim), dtype)
    return q, k, k


@pytest.mark.parametrize("hidden_finite", [False, True])
@pytest.mark.parametrize("bound", [None, 100.0])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("queries", [1, 5, 121, 1600])
def test_dense(queries, head_dim, bound, hidden_finite):
    config = tuning.block_list_config("dense", head_dim, bound is not None)
    blocks = pk.dense_blocks(queries, 4121, block_q=config.block_q, block_k=config.block_k)
    lower(
        lambda q, k, v: ops.attend_blocks(
            q, k, v, blocks, config, logit_bound=bound, hidden_finite=hidden_finite
        ),
        *operands(queries, 4224, head_dim),
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("block_k", [64, 128])
def test_traced_blocks(block_k, dtype):
    config = tuning.block_list_config("blocks", 128, False, block_k)

    def attend(q, k, v, indices, counts):
        blocks = pk.BlockTable(indices, counts, 6425, 128, block_k, gaps=((121, 128),))
        return ops.attend_blocks(q, k, v, blocks, config)

    tables = jax.ShapeDtypeStruct((1, 2, 18, 9), jnp.int32)
    counts = jax.ShapeDtypeStruct((1, 2, 18), jnp.int32)
    lower(attend, *operands(2304, 6528, dtype=dtype), tables, counts)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("geometry", "windows", "sinks"),
    [(SQUARE, shapes.CSLA_WINDOWS, shapes.CSLA_SINKS), (WIDE, (-1, 3, 5), 1)],
)
def test_windows(geometry, windows, sinks, exact):
    config = tuning.gather_config("windows", 128, False)
    queries = geometry.height * geometry.width
    lower(
        lambda q, k, v: ops.attend_windows(q, k, v, geometry, windows, sinks, config, exact=exact),
        *operands(queries, -(-geometry.kv_length // 128) * 128),
    )


@pytest.mark.parametrize("granularity", [1, 8])
@pytest.mark.parametrize("group", [64, 128, 192])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_columns(group, granularity, head_dim):
    config = tuning.gather_config("columns", head_dim, True, group)
    groups = -(-400 // group)
    columns = jax.ShapeDtypeStruct((1, 2, groups, 30), jnp.int32)
    counts = jax.ShapeDtypeStruct((1, 2, groups), jnp.int32)
    lower(
        lambda q, k, v, c, n: ops.attend_columns(
            q, k, v, c, n, config, kv_length=500, granularity=granularity, logit_bound=100.0
        ),
        *operands(400, 512, head_dim), columns, counts,
    )  # fmt: skip


@pytest.mark.parametrize("group", [64, 128, 192])
def test_column_sums(group):
    q, k, _ = operands(1600, 4224)
    lse = jax.ShapeDtypeStruct((1, 2, 1600), jnp.float32)
    lower(lambda q, k, lse: ops.column_sums(q, k, lse, 4121, group), q, k, lse)


def test_thresholds():
    lower(lambda bits: ops.row_thresholds(bits, 784), jax.ShapeDtypeStruct((9, 4224), "i4"))


def test_a_program_does_not_depend_on_what_was_lowered_before():
    """Else the compile cache of another process, whose threads lower in another order, misses."""

    config = tuning.block_list_config("dense", 128, False)
    blocks = pk.dense_blocks(256, 1000, block_q=config.block_q, block_k=config.block_k)

    def text():
        call = lambda q, k, v: ops.attend_blocks(q, k, v, blocks, config)  # noqa: E731
        return lower(call, *operands(256, 1024)).as_text()

    assert text() == text()
