"""The XLA implementations against float64 attention: lengths, rows, gaps, NaN, empty lists."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import reference
from pallas_kernels.sparsity import visible_rows
from pallas_kernels.xla import attention as xla

_spec = importlib.util.spec_from_file_location(
    "kernel_cases", pathlib.Path(__file__).with_name("cases.py")
)
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

LAYOUTS = [pk.Geometry.packed(cases.GRIDS), pk.Geometry.aligned(cases.GRIDS)]
NAMES = ["packed", "aligned"]


def window_inputs(geometry, **kwargs):
    """q of one row against a cache of two, longer than the grids; hidden rows hold NaN."""
    keys = geometry.kv_length + 11
    valid = visible_rows(keys, geometry.kv_length, geometry.gaps)
    queries = geometry.height * geometry.width
    return cases.inputs(1, 2, 2, queries, keys, 16, valid=valid, **kwargs), valid


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 21), (121, 130), (144, 265)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_attention(queries, keys, dtype):
    valid = np.arange(keys + 7) < keys
    q, k, v = cases.inputs(1, 2, 2, queries, keys + 7, 32, valid=valid, dtype=dtype, clustered=True)
    out, lse = pk.attention(q, k, v, keys, return_lse=True)
    want, want_lse = cases.truth(q, k, v, valid)
    assert out.dtype == dtype
    assert cases.relative_error(out, want) <= cases.TOLERANCE[jnp.dtype(dtype).name]
    np.testing.assert_allclose(lse, want_lse, atol=1e-5, rtol=1e-5)


def test_attention_in_pieces_equals_attention_at_once(monkeypatch):
    q, k, v = cases.inputs(2, 2, 2, 200, 150, 16)
    whole, whole_lse = xla.attention(q, k, v, 140)
    monkeypatch.setattr(xla, "_MAX_SCORES", 2 * 2 * 140 * 64)
    pieces, pieces_lse = xla.attention(q, k, v, 140)
    np.testing.assert_allclose(pieces, whole, atol=1e-6)
    np.testing.assert_allclose(pieces_lse, whole_lse, atol=1e-6)
    alone, alone_lse = xla.attention(q[1:], k[1:], v[1:], 140)
    np.testing.assert_array_equal(alone[0], pieces[1])
    np.testing.assert_array_equal(alone_lse[0], pieces_lse[1])


@pytest.mark.parametrize("geometry", LAYOUTS, ids=NAMES)
def test_gaps_are_never_read(geometry):
    (q, k, v), valid = window_inputs(geometry)
    want, _ = cases.truth(q, k, v, valid)
    out = pk.attention(q, k, v, geometry.kv_length, gaps=geometry.gaps)
    assert cases.relative_error(out, want) <= cases.FLOAT32_TOLERANCE


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("block_k", [64, 128])
def test_random_block_tables(traced, block_k):
    rng = np.random.default_rng(1)
    queries, keys = 200, 500
    valid = np.arange(keys + 12) < keys
    q, k, v = cases.inputs(1, 2, 3, queries, keys + 12, 16, valid=valid)
    table = rng.random((2, -(-keys // block_k))) < 0.5
    table[1] = False
    blocks = pk.blocks_from_mask(table, keys, block_q=128, block_k=block_k)
    if traced:
        lead = (1, 3)
        blocks = pk.BlockTable(
            jnp.broadcast_to(blocks.indices, (*lead, *blocks.indices.shape)),
            jnp.broadcast_to(blocks.counts, (*lead, *blocks.counts.shape)),
            keys, 128, block_k,
        )  # fmt: skip
    mask = np.repeat(np.repeat(table, 128, 0), block_k, 1)[:queries, : keys + 12]
    mask = np.pad(mask, ((0, 0), (0, keys + 12 - mask.shape[1]))) & valid
    out, lse = jax.jit(lambda q, k, v: pk.block_sparse_attention(q, k, v, blocks, return_lse=True))(
        q, k, v
    )
    want, want_lse = cases.truth(q, k, v, mask)
    assert cases.relative_error(out, want) <= cases.FLOAT32_TOLERANCE
    assert not np.asarray(out)[:, :, 128:].any()
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


@pytest.mark.parametrize("geometry", LAYOUTS, ids=NAMES)
def test_exact_windows_follow_the_token_rule(geometry):
    (q, k, v), valid = window_inputs(geometry, clustered=True)
    out = pk.window_attention(q, k, v, geometry, cases.WINDOWS, cases.SINKS, exact=True)
    mask = np.zeros((q.shape[2], k.shape[2]), bool)
    mask[:, : geometry.kv_length] = pk.token_rule(geometry, cases.WINDOWS, cases.SINKS)
    assert not (mask & ~valid).any()
    want, _ = cases.truth(q, k, v, mask)
    assert cases.relative_error(out, want) <= cases.FLOAT32_TOLERANCE


@pytest.mark.parametrize("geometry", LAYOUTS, ids=NAMES)
def test_boxes_keep_the_bounding_rectangles(geometry):
    """Every patch of 8x16 queries sees, in each grid, the bounding box of its token windows."""
    (q, k, v), _ = window_inputs(geometry)
    rule = np.asarray(pk.token_rule(geometry, cases.WINDOWS, cases.SINKS))
    rule = rule.reshape(geometry.height, geometry.width, -1)
    mask = np.zeros((geometry.height, geometry.width, k.shape[2]), bool)
    for y in range(0, geometry.height, 8):
        for x in range(0, geometry.width, 16):
            patch = np.s_[y : y + 8, x : x + 16]
            union = rule[patch].any((0, 1))
            for grid in geometry.keys:
                seen = union[grid.row : grid.end].reshape(grid.height, grid.pitch)
                ys, xs = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
                if not len(ys):
                    continue
                for row in range(ys[0], ys[-1] + 1):
                    start = grid.row + row * grid.pitch
                    mask[patch][..., start + xs[0] : start + xs[-1] + 1] = True
    out = pk.window_attention(q, k, v, geometry, cases.WINDOWS, cases.SINKS, exact=False)
    want, _ = cases.truth(q, k, v, mask.reshape(q.shape[2], -1))
    assert cases.relative_error(out, want) <= cases.FLOAT32_TOLERANCE


def test_column_sums_add_up_to_the_queries():
    geometry = LAYOUTS[1]
    (q, k, v), valid = window_inputs(geometry)
    _, sums = pk.attention_column_sums(q, k, v, geometry.kv_length, 50, gaps=geometry.gaps)
    assert sums.shape == (1, 2, 5, geometry.kv_length)
    sizes = np.minimum(50, q.shape[2] - 50 * np.arange(5))
    np.testing.assert_allclose(sums.sum(-1)[0, 0], sizes, rtol=1e-5)
    assert not np.asarray(sums)[..., ~valid[: geometry.kv_length]].any()
    _, want = reference.attention_column_sums(q, k, v, geometry.kv_length, 50, gaps=geometry.gaps)
    np.testing.assert_allclose(sums, want, atol=2e-6)


@pytest.mark.parametrize("granularity", [1, 8])
def test_columns(granularity):
    rng = np.random.default_rng(2)
    keys, group, queries = 203, 64, 150
    valid = np.arange(keys + 5) < keys
    q, k, v = cases.inputs(1, 2, 2, queries, keys + 5, 16, valid=valid)
    runs, kept = -(-keys // granularity), 9
    columns = np.stack([rng.permutation(runs)[:kept] for _ in range(6)]).reshape(1, 2, 3, kept)
    counts = np.array([[[9, 4, 0], [1, 9, 7]]])
    mask = np.zeros((1, 2, queries, keys + 5), bool)
    for head in range(2):
        for g in range(3):
            for run in columns[0, head, g, : counts[0, head, g]]:
                rows = slice(run * granularity, (run + 1) * granularity)
                mask[0, head, g * group : (g + 1) * group, rows] = True
    out = pk.column_sparse_attention(
        q, k, v, jnp.asarray(columns, jnp.int32), jnp.asarray(counts), kv_length=keys,
        group=group, granularity=granularity,
    )  # fmt: skip
    want, _ = cases.truth(q, k, v, mask & valid)
    assert cases.relative_error(out, want) <= cases.FLOAT32_TOLERANCE


@pytest.mark.parametrize("granularity", [1, 8])
def test_selection_is_the_set_top_k_finds(granularity):
    rng = np.random.default_rng(3)
    sums = rng.integers(0, 1 << 16, (2, 3, 301)).astype(np.float32)  # sums of 8 stay exact
    sums[0, 0] %= 16
    sums[1, 2] = 0.5
    runs = np.pad(sums, ((0, 0), (0, 0), (0, -301 % granularity)))
    runs = runs.reshape(2, 3, -1, granularity).sum(-1, dtype=np.float32)
    want = np.sort(jax.lax.top_k(jnp.asarray(runs), 20)[1], -1)
    got = pk.select_columns(jnp.asarray(sums)[None], 20, granularity=granularity)
    np.testing.assert_array_equal(got[0], want)


def test_named_implementation_fails_loudly_without_its_device():
    q, k, v = cases.inputs(1, 1, 1, 8, 8, 16)
    if jax.default_backend() == "gpu":
        pytest.skip("there may be a device that serves it")
    assert pk.implementation_used("attention", q, k, v) == "xla"
    with pytest.raises(NotImplementedError, match="Hopper"):
        pk.attention(q, k, v, 8, implementation="hopper")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q, k, v: pk.attention(q, k, v, 9), "kv_length"),
        (lambda q, k, v: pk.attention(q[..., :8], k, v, 8), "head dim"),
        (lambda q, k, v: pk.attention(q, k, v, 8, implementation="fast"), "implementation"),
        (lambda q, k, v: pk.attention(q, k, v, 8, gaps=((4, 12),)), "gap"),
        (lambda q, k, v: pk.block_sparse_attention(q, k, v, pk.dense_blocks(300, 8)), "shape"),
        (lambda q, k, v: pk.select_columns(jnp.ones((1, 1, 1, 8)), 9), "count"),
    ],
)
@pytest.mark.unchecked
def test_errors_say_what_was_expected(call, words):
    q, k, v = cases.inputs(1, 1, 1, 8, 8, 16)
    with pytest.raises(ValueError, match=words):
        call(q, k, v)
