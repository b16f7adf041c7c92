"""The kernels on a GPU against float64: lengths, tails, NaN, empty lists, repeats."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import shapes, support
from pallas_kernels.hopper import reasons as hopper
from pallas_kernels.portable import reasons as portable
from pallas_kernels.sparsity import visible_rows

pytestmark = pytest.mark.gpu

_spec = importlib.util.spec_from_file_location(
    "kernel_cases", pathlib.Path(__file__).with_name("cases.py")
)
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

BOUNDS = [None, 100.0]


REASONS = {"hopper": hopper.device_reason, "portable": portable.device_reason}


@pytest.fixture(params=REASONS, autouse=True)
def backend(request):
    """Every set of kernels that this device can run; the contract is the same."""
    if reason := REASONS[request.param](support.device_of()):
        pytest.skip(reason)
    return request.param


def check(backend, call, q, k, v, mask, dtype=jnp.bfloat16):
    """Right within twice the plain error, finite, and the same twice."""
    compiled = jax.jit(lambda q, k, v: call(q, k, v, implementation=backend))
    out, again = (np.asarray(compiled(q, k, v)) for _ in range(2))
    want, _ = cases.truth(q, k, v, mask)
    assert out.dtype == dtype
    assert cases.relative_error(out, want) <= cases.TOLERANCE[jnp.dtype(dtype).name]
    np.testing.assert_array_equal(again, out)


def draw(queries, keys, head_dim, dtype=jnp.bfloat16, gaps=(), **kwargs):
    cache_rows = shapes.round_up(keys, 128)
    valid = visible_rows(cache_rows, keys, gaps)
    arrays = cases.inputs(
        1, 2, 2, queries, cache_rows, head_dim, valid=valid, dtype=dtype, **kwargs
    )
    return arrays, valid


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 21), (121, 4121), (1600, 4121)])
def test_dense(backend, queries, keys, head_dim, bound):
    check_dense(backend, queries, keys, head_dim, bound)


@pytest.mark.parametrize(("queries", "keys"), [(2304, 6425), (4096, 10521)])
def test_long_dense(backend, queries, keys):
    """In one configuration only: the float64 truth takes seconds."""
    check_dense(backend, queries, keys, 128, 100.0)


def check_dense(backend, queries, keys, head_dim, bound):
    (q, k, v), valid = draw(queries, keys, head_dim, clustered=True)
    check(backend, lambda *a, **n: pk.attention(*a, keys, logit_bound=bound, **n), q, k, v, valid)


def test_float16_and_lse(backend):
    (q, k, v), valid = draw(300, 1000, 128, jnp.float16)
    check(backend, lambda *a, **n: pk.attention(*a, 1000, **n), q, k, v, valid, jnp.float16)
    _, lse = jax.jit(lambda *a: pk.attention(*a, 1000, implementation=backend, return_lse=True))(
        q, k, v
    )
    np.testing.assert_allclose(lse, cases.truth(q, k, v, valid)[1], atol=2e-3)


def test_gaps(backend):
    gaps = ((121, 128), (300, 520))
    (q, k, v), valid = draw(200, 1000, 128, gaps=gaps)
    check(backend, lambda *a, **n: pk.attention(*a, 1000, gaps=gaps, **n), q, k, v, valid)


def test_finite_hidden_values_are_not_read_as_tokens(backend):
    gaps = ((121, 128), (300, 520))
    (q, k, v), valid = draw(200, 1000, 128, gaps=gaps)
    v = jnp.where(jnp.asarray(valid)[:, None], v, 1e30)
    check(
        backend,
        lambda *a, **n: pk.attention(*a, 1000, gaps=gaps, hidden_finite=True, **n),
        q,
        k,
        v,
        valid,
    )


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("block_k", [64, 128])
def test_random_tables(backend, block_k, traced, bound):
    rng = np.random.default_rng(block_k)
    queries, keys = 700, 2000
    (q, k, v), valid = draw(queries, keys, 128)
    table = rng.random((6, -(-keys // block_k))) < 0.3
    table[2] = False
    blocks = pk.blocks_from_mask(table, keys, block_k=block_k)
    if traced:
        lead = (1, 2)
        blocks = pk.BlockTable(
            jnp.broadcast_to(blocks.indices, (*lead, *blocks.indices.shape)),
            jnp.broadcast_to(blocks.counts, (*lead, *blocks.counts.shape)),
            keys, 128, block_k,
        )  # fmt: skip
    mask = np.repeat(np.repeat(table, 128, 0), block_k, 1)[:queries, : len(valid)]
    mask = np.pad(mask, ((0, 0), (0, len(valid) - mask.shape[1]))) & valid
    check(
        backend,
        lambda *a, **n: pk.block_sparse_attention(*a, blocks, logit_bound=bound, **n),
        q,
        k,
        v,
        mask,
    )


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("layout", ["packed", "aligned"])
def test_windows(backend, layout, bound):
    geometry = getattr(pk.Geometry, layout)(cases.GRIDS)
    (q, k, v), valid = draw(231, geometry.kv_length, 128, gaps=geometry.gaps)
    mask = np.zeros((231, len(valid)), bool)
    mask[:, : geometry.kv_length] = pk.token_rule(geometry, cases.WINDOWS, cases.SINKS)
    where = geometry, cases.WINDOWS, cases.SINKS
    check(
        backend,
        lambda *a, **n: pk.window_attention(*a, *where, exact=True, logit_bound=bound, **n),
        q, k, v, mask,
    )  # fmt: skip
    boxes = [
        jax.jit(
            lambda *a, name=name: pk.window_attention(*a, *where, exact=False, implementation=name)
        )(q, k, v)
        for name in (backend, "xla")
    ]
    assert cases.relative_error(boxes[0], np.asarray(boxes[1], np.float64)) <= 4.6e-3


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [64, 192])
@pytest.mark.parametrize("granularity", [1, 8])
def test_columns(backend, granularity, group, head_dim, bound):
    rng = np.random.default_rng(group)
    queries, keys, gaps = 500, 1001, ((121, 128),)
    (q, k, v), valid = draw(queries, keys, head_dim, gaps=gaps)
    groups, runs, kept = -(-queries // group), -(-keys // granularity), 100
    lead = (1, 2, groups)
    columns = np.argsort(rng.random((*lead, runs)), -1)[..., :kept]
    counts = rng.integers(0, kept + 1, lead)
    mask = np.zeros((1, 2, queries, len(valid)), bool)
    for place in np.ndindex(lead):
        mine = slice(place[2] * group, (place[2] + 1) * group)
        for run in columns[place][: counts[place]]:
            mask[place[0], place[1], mine, run * granularity : (run + 1) * granularity] = True
    lists, number = jnp.asarray(columns, jnp.int32), jnp.asarray(counts, jnp.int32)
    check(
        backend, lambda *a, **n: pk.column_sparse_attention(
            *a, lists, number, kv_length=keys, group=group, granularity=granularity, gaps=gaps,
            logit_bound=bound, **n,
        ),
        q, k, v, mask & valid,
    )  # fmt: skip


def test_short_lists_of_many_items(backend):
    """Every CTA walks many items of one key each, and of no key at all."""
    rows, heads, queries, keys = 40, 30, 100, 255
    valid, dtype = np.arange(256) < keys, jnp.bfloat16
    q, k, v = cases.inputs(rows, rows, heads, queries, 256, 64, valid=valid, dtype=dtype)
    lists = np.random.default_rng(0).integers(0, keys, (rows, heads, 1, 8)).astype(np.int32)
    counts = np.arange(rows * heads, dtype=np.int32).reshape(rows, heads, 1) % 2
    out = jax.jit(
        lambda q, k, v: pk.column_sparse_attention(
            q, k, v, jnp.asarray(lists), jnp.asarray(counts), kv_length=keys,
            group=192, granularity=1, implementation=backend,
        )
    )(q, k, v)  # fmt: skip
    first = np.take_along_axis(np.asarray(v, np.float32), lists[..., 0][..., None], 2)
    want = np.where(counts[..., None] > 0, first, 0.0)
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.broadcast_to(want, out.shape))


@pytest.mark.parametrize("group", [64, 192])
def test_column_sums_and_selection(backend, group):
    (q, k, v), _ = draw(400, 1001, 128, clustered=True)

    @functools.partial(jax.jit, static_argnums=3)
    def column_sums(q, k, v, name):
        return pk.attention_column_sums(q, k, v, 1001, group, implementation=name)[1]

    @functools.partial(jax.jit, static_argnums=1)
    def select(sums, name):
        return pk.select_columns(sums, 100, implementation=name)

    sums, want = (column_sums(q, k, v, name) for name in (backend, "xla"))
    # The log-sum-exp of bfloat16 inputs is float32 in both; exponentials differ by the hardware's.
    np.testing.assert_allclose(sums, want, rtol=2e-3, atol=2e-5)
    np.testing.assert_array_equal(select(sums, backend), select(sums, "xla"))
