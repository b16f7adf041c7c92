"""The Triton kernels in Pallas's interpreter against float64: tails, gaps, poison, empty lists."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import calls, reference, selection, shapes, support
from pallas_kernels.portable import ops
from pallas_kernels.portable.tuning import TileConfig
from pallas_kernels.sparsity import visible_rows

_spec = importlib.util.spec_from_file_location(
    "kernel_cases", pathlib.Path(__file__).with_name("cases.py")
)
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

SMALL = TileConfig(block_q=16, block_k=32)
DEVICE = support.Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0))
# float32 accumulates a few hundred products of unit size: 1e-5 is a hundred times their rounding.
EXACT = 1e-5


def draw(queries, keys, *, gaps=(), heads=2, head_dim=64, dtype=jnp.float32, rows=1):
    cache_rows = shapes.round_up(keys, 8)
    valid = visible_rows(cache_rows, keys, gaps)
    arrays = cases.inputs(
        rows, rows + 1, heads, queries, cache_rows, head_dim, valid=valid, dtype=dtype
    )
    return arrays, valid


def close(out, want, tolerance=EXACT):
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert cases.relative_error(np.asarray(out), want) <= tolerance


@pytest.mark.parametrize("gaps", [(), ((5, 8), (33, 70))])
@pytest.mark.parametrize("queries", [1, 37])
def test_dense(queries, gaps):
    (q, k, v), valid = draw(queries, 101, gaps=gaps)
    call = calls.Attention(
        device=DEVICE, q=q, k=k, v=v, kv_length=101, gaps=gaps, return_lse=True, scale=0.5
    )
    out, lse = ops.attend(call, SMALL, interpret=True)
    want, want_lse = cases.truth(0.5 * q, k, v, valid)
    close(out, want)
    np.testing.assert_allclose(lse, want_lse, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_and_a_fixed_reference(dtype):
    """float16 cannot hold weights of 2^100 and so keeps its running maximum."""
    (q, k, v), valid = draw(20, 72, dtype=dtype, head_dim=128)
    call = calls.Attention(device=DEVICE, q=q, k=k, v=v, kv_length=72, logit_bound=100.0)
    out = ops.attend(call, SMALL, interpret=True)
    assert out.dtype == dtype
    close(out, cases.truth(q, k, v, valid)[0], cases.TOLERANCE[jnp.dtype(dtype).name])


@pytest.mark.parametrize("traced", [False, True])
def test_block_tables(traced):
    """Blocks of 64x64 walked in tiles of 16x32, one list without blocks, hidden rows inside."""
    queries, keys, gaps = 200, 250, ((60, 70), (129, 131))
    (q, k, v), valid = draw(queries, keys, gaps=gaps)
    table = np.random.default_rng(1).random((4, 4)) < 0.5
    table[2] = False
    blocks = pk.blocks_from_mask(table, keys, block_q=64, block_k=64, gaps=gaps)
    if traced:
        lead = (1, 2)
        blocks = pk.BlockTable(
            jnp.broadcast_to(blocks.indices, (*lead, *blocks.indices.shape)),
            jnp.broadcast_to(blocks.counts, (*lead, *blocks.counts.shape)),
            keys, 64, 64, gaps,
        )  # fmt: skip
    call = calls.BlockSparseAttention(device=DEVICE, q=q, k=k, v=v, blocks=blocks, return_lse=True)
    out, lse = ops.attend_blocks(call, blocks, SMALL, interpret=True)
    mask = np.repeat(np.repeat(table, 64, 0), 64, 1)[:queries, : len(valid)] & valid
    want, want_lse = cases.truth(q, k, v, mask)
    close(out, want)
    np.testing.assert_allclose(lse, want_lse, atol=1e-4)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("layout", ["packed", "aligned"])
def test_windows(layout, exact):
    geometry = getattr(pk.Geometry, layout)(cases.GRIDS)
    (q, k, v), _ = draw(231, geometry.kv_length, gaps=geometry.gaps, heads=1)
    call = calls.WindowAttention(
        device=DEVICE, q=q, k=k, v=v, geometry=geometry, windows=cases.WINDOWS, sinks=cases.SINKS,
        exact=exact,
    )  # fmt: skip
    out = ops.attend_windows(call, TileConfig(block_q=64, block_k=64), interpret=True)
    where = geometry, cases.WINDOWS, cases.SINKS
    if exact:
        want = reference.window_attention(q, k, v, *where)
    else:
        want = pk.window_attention(q, k, v, *where, exact=False, implementation="xla")
    close(out, np.asarray(want, np.float64))


@pytest.mark.parametrize("block_q", [16, 64])
@pytest.mark.parametrize("granularity", [1, 8])
def test_columns(granularity, block_q):
    """Groups of 48 queries in tiles that divide them, and in one tile that is larger."""
    rng = np.random.default_rng(granularity)
    queries, keys, group, gaps = 100, 201, 48, ((21, 28),)
    (q, k, v), _ = draw(queries, keys, gaps=gaps)
    lead, runs = (1, 2, 3), -(-keys // granularity)
    columns = np.argsort(rng.random((*lead, runs)), -1)[..., :20].astype(np.int32)
    counts = rng.integers(1, 21, lead).astype(np.int32)
    counts[0, 1, 1] = 0
    call = calls.ColumnSparseAttention(
        device=DEVICE, q=q, k=k, v=v, columns=jnp.asarray(columns), counts=jnp.asarray(counts),
        kv_length=keys, group=group, granularity=granularity, gaps=gaps,
    )  # fmt: skip
    config = TileConfig(block_q=block_q, block_k=32)
    out = ops.attend_columns(call, config, interpret=True)
    want = reference.column_sparse_attention(
        q, k, v, call.columns, call.counts, kv_length=keys, group=group, granularity=granularity,
        gaps=gaps,
    )  # fmt: skip
    close(out, np.asarray(want, np.float64))


def test_column_sums():
    queries, keys, gaps = 100, 75, ((5, 8), (33, 40))
    (q, k, v), _ = draw(queries, keys, gaps=gaps)
    _, lse = reference.attention(q, k, v, keys, gaps=gaps, return_lse=True)
    call = calls.AttentionColumnSums(
        device=DEVICE, q=q, k=k, v=v, lse=lse, kv_length=keys, group=48, gaps=gaps
    )
    sums = ops.column_sums(call, TileConfig(block_q=16, block_k=32), interpret=True)
    _, want = reference.attention_column_sums(q, k, v, keys, 48, gaps=gaps)
    np.testing.assert_allclose(sums, want, rtol=1e-4, atol=1e-6)
    assert not np.asarray(sums[..., 33:40]).any()


@pytest.mark.parametrize("granularity", [1, 8])
def test_selection(granularity):
    rng = np.random.default_rng(0)
    values = np.repeat(rng.random((1, 2, 3, 100), np.float32).round(1), 3, -1)
    call = calls.SelectColumns(
        device=DEVICE, sums=jnp.asarray(values), count=20, granularity=granularity
    )
    chosen = ops.select_columns(call, interpret=True)
    np.testing.assert_array_equal(chosen, selection.select_top(call.sums, 20, granularity))
    assert jax.device_get(chosen).dtype == np.int32
