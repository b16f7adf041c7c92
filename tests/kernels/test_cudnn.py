"""Attention through cuDNN against float64: on a GPU, and here with jax's other implementation.

Where there is no cuDNN, `jax.nn.dot_product_attention` computes the same problems itself: lists,
copies, lengths and layouts are then those of a GPU.
"""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import backends, support
from pallas_kernels.cudnn import backend as cudnn
from pallas_kernels.cudnn import problems
from pallas_kernels.sparsity import visible_rows

_spec = importlib.util.spec_from_file_location(
    "kernel_cases", pathlib.Path(__file__).with_name("cases.py")
)
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

AMPERE = support.Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0))
BOTH = [pytest.param(jnp.bfloat16, marks=pytest.mark.gpu, id="cudnn"),
        pytest.param(jnp.float32, id="substitute")]  # fmt: skip


@pytest.fixture
def run(request, on, monkeypatch):
    """Compile and run a call with cuDNN, or with float32 operands and its substitute."""

    def compiled(call, *operands):
        return jax.jit(lambda *a: call(*a, implementation="cudnn"))(*operands)

    if request.node.get_closest_marker("gpu"):
        yield compiled
        return
    on(AMPERE)
    inner = jax.nn.dot_product_attention

    def substitute(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return inner(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", substitute)
    monkeypatch.setattr(cudnn, "HALVES", (jnp.float32,))
    with jax.default_matmul_precision("highest"):
        yield compiled


def draw(dtype, queries, keys, *, gaps=(), head_dim=64):
    cache_rows = -(-keys // 8) * 8
    valid = visible_rows(cache_rows, keys, gaps)
    arrays = cases.inputs(1, 2, 2, queries, cache_rows, head_dim, valid=valid, dtype=dtype)
    return arrays, valid


def close(out, want):
    assert np.isfinite(np.asarray(out, np.float32)).all()
    limit = cases.TOLERANCE[jnp.dtype(out.dtype).name]
    assert cases.relative_error(np.asarray(out, np.float64), want) <= limit


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("gaps", [(), ((5, 8), (33, 70))])
def test_dense(run, dtype, gaps):
    (q, k, v), valid = draw(dtype, 37, 101, gaps=gaps)
    out, lse = run(
        lambda *a, **n: pk.attention(*a, 101, gaps=gaps, scale=0.5, return_lse=True, **n), q, k, v
    )
    want, want_lse = cases.truth(0.5 * np.asarray(q, np.float64), k, v, valid)
    close(out, want)
    np.testing.assert_allclose(lse, want_lse, atol=2e-3 if dtype == jnp.bfloat16 else 1e-4)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("traced", [False, True])
def test_block_tables(run, dtype, traced, monkeypatch):
    """Lists of several lengths, one of none, hidden rows inside, and several calls of cuDNN."""
    monkeypatch.setattr(problems, "_PIECE", 1 << 17)
    queries, keys, gaps = 300, 250, ((60, 70), (129, 131))
    (q, k, v), valid = draw(dtype, queries, keys, gaps=gaps)
    table = np.random.default_rng(1).random((5, 4)) < 0.5
    table[2], table[4] = False, True
    blocks = pk.blocks_from_mask(table, keys, block_q=64, block_k=64, gaps=gaps)
    if traced:
        blocks = pk.BlockTable(
            jnp.broadcast_to(blocks.indices, (1, 2, *blocks.indices.shape)),
            jnp.broadcast_to(blocks.counts, (1, 2, *blocks.counts.shape)),
            keys, 64, 64, gaps,
        )  # fmt: skip
    out = run(lambda *a, **n: pk.block_sparse_attention(*a, blocks, **n), q, k, v)
    mask = np.repeat(np.repeat(table, 64, 0), 64, 1)[:queries]
    mask = np.pad(mask, ((0, 0), (0, max(0, len(valid) - 256))))[:, : len(valid)] & valid
    close(out, cases.truth(q, k, v, mask)[0])


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("layout", ["packed", "aligned"])
def test_rectangles(run, dtype, layout):
    geometry = getattr(pk.Geometry, layout)(cases.GRIDS)
    (q, k, v), _ = draw(dtype, 231, geometry.kv_length, gaps=geometry.gaps)
    where = geometry, cases.WINDOWS, cases.SINKS
    out = run(lambda *a, **n: pk.window_attention(*a, *where, **n), q, k, v)
    exact = tuple(x.astype(jnp.float32) for x in (q, k, v))
    with jax.default_matmul_precision("highest"):
        want = pk.window_attention(*exact, *where, implementation="xla")
    close(out, np.asarray(want, np.float64))


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("granularity", [1, 8])
def test_columns(run, dtype, granularity, monkeypatch):
    """Lists that name hidden rows, that are cut short, and that are empty."""
    monkeypatch.setattr(problems, "_PIECE", 1 << 17)
    rng = np.random.default_rng(granularity)
    queries, keys, group, gaps = 100, 201, 48, ((21, 28),)
    (q, k, v), valid = draw(dtype, queries, keys, gaps=gaps)
    lead, runs = (1, 2, 3), -(-keys // granularity)
    columns = np.argsort(rng.random((*lead, runs)), -1)[..., :20].astype(np.int32)
    counts = rng.integers(1, 21, lead).astype(np.int32)
    counts[0, 1, 1] = 0
    mask = np.zeros((1, 2, queries, len(valid)), bool)
    for place in np.ndindex(lead):
        mine = slice(place[2] * group, (place[2] + 1) * group)
        for entry in columns[place][: counts[place]]:
            mask[(*place[:2], mine, slice(entry * granularity, (entry + 1) * granularity))] = True
    out = run(
        lambda *a, **n: pk.column_sparse_attention(
            *a, jnp.asarray(columns), jnp.asarray(counts), kv_length=keys, group=group,
            granularity=granularity, gaps=gaps, **n,
        ),
        q, k, v,
    )  # fmt: skip
    close(out, cases.truth(q, k, v, mask & valid)[0])


@pytest.mark.parametrize("dtype", BOTH)
def test_column_sums_are_the_gradient_of_the_values(run, dtype):
    queries, keys, gaps = 99, 75, ((5, 8), (33, 40))
    (q, k, v), valid = draw(dtype, queries, keys, gaps=gaps)
    _, sums = run(lambda *a, **n: pk.attention_column_sums(*a, keys, 48, gaps=gaps, **n), q, k, v)
    _, lse = cases.truth(q, k, v, valid)
    scores = np.asarray(q, np.float64) @ np.nan_to_num(np.asarray(k[:1], np.float64)).swapaxes(2, 3)
    weights = np.where(valid, np.exp(scores - lse[..., None]), 0)[..., :keys]
    want = np.stack([weights[:, :, i : i + 48].sum(2) for i in range(0, queries, 48)], 2)
    assert sums.dtype == jnp.float32
    # cuDNN rounds weights and results to bfloat16, 2^-9 each; sums of many average the first out.
    np.testing.assert_allclose(sums, want, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-4, atol=1e-4)
    assert not np.asarray(sums)[..., 33:40].any()


def test_what_is_left_to_others(on):
    on(AMPERE)
    q, k, v = (jax.ShapeDtypeStruct((1, 2, 189, 64), jnp.bfloat16),) * 3
    geometry = pk.Geometry.packed(((9, 21),))

    def windows(q, k, v):
        return pk.window_attention(q, k, v, geometry, (3,), 0, exact=True, implementation="cudnn")

    with pytest.raises(NotImplementedError, match="exact windows"):
        jax.eval_shape(windows, q, k, v)
    with pytest.raises(NotImplementedError, match="95 > 64"):
        pk.implementation_used("attention_column_sums", q, k, v, group=2, implementation="cudnn")
    with pytest.raises(NotImplementedError, match="log-sum-exp"):
        pk.implementation_used(
            "block_sparse_attention", q, k, v, return_lse=True, implementation="cudnn"
        )
    # Other kernels do these better; on its own path cuDNN does them all the same.
    for asked in ({"return_lse": True}, {"gaps": ((1, 2),)}):
        assert pk.implementation_used("attention", q, k, v, **asked) == "portable"
        with backends.use("cudnn"):
            assert pk.implementation_used("attention", q, k, v, **asked) == "cudnn"
