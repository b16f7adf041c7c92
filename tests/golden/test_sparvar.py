"""SparVAR's index functions and attention flow against stored arrays of the authors' functions.

Tolerances: inputs are exact and everything runs in float32. A column sum adds at most 192
probabilities of at most one, in practice of order one together: 1e-5 is a few units in the last
place. Outputs average values of order one under scores of up to 18, whose float32 error is about
18 * 2^-23 * a few = 1e-5: 1e-4 bounds outputs.
"""

import functools
import hashlib

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import sparsity
from sparvar_jax.plans.schedule import infinity_schedule
from sparvar_jax.plans.strategy import Place
from sparvar_jax.policies import columns, indices
from sparvar_jax.policies.columns import Reuse, Selection
from sparvar_jax.policies.cs4a import COLUMNS, DIFFERENCE, Cs4aDecision, Cs4aSparse
from sparvar_jax.policies.csla import Csla
from tests.golden.support import golden_stems, load_golden
from tests.policies.support import attend

INDEX = golden_stems("sparvar_index*")
ATTENTION = golden_stems("sparvar_attention*")
SCHEDULE = infinity_schedule()


@pytest.fixture(scope="module")
def golden():
    return functools.lru_cache(load_golden)


def place(index: int) -> Place:
    return Place(SCHEDULE, "packed", index)


@pytest.mark.parametrize("scale", [10, 11, 12])
@pytest.mark.parametrize("stem", INDEX)
def test_token_rule(golden, stem, scale):
    sidecar, tensors = golden(stem)
    windows = tuple(sidecar["window_sizes"])
    strategy = Csla(windows, sidecar["attention_sink_scales"])
    mask = sparsity.token_rule(*strategy.at(place(scale)))
    packed = np.packbits(mask.reshape(-1))
    digest = sidecar["numbers"][f"scale_{scale}.token_mask_sha256_of_row_major_packbits_msb_first"]
    name = f"csla_token_mask_{{}}.scale_{scale}"
    np.testing.assert_array_equal(mask.sum(1), tensors[name.format("row_counts")])
    np.testing.assert_array_equal(mask.sum(0), tensors[name.format("col_counts")])
    rows = tensors[name.format("sample_rows")]
    stored = tensors[name.format("sample_packed")]
    np.testing.assert_array_equal(np.packbits(mask[rows], axis=1), stored)
    assert hashlib.sha256(packed.tobytes()).hexdigest() == digest


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("scale", [10, 11, 12])
@pytest.mark.parametrize("stem", INDEX)
def test_block_tables(golden, stem, scale, block):
    sidecar, tensors = golden(stem)
    strategy = Csla(tuple(sidecar["window_sizes"]), sidecar["attention_sink_scales"], block=block)
    blocks = sparsity.csla_blocks(*strategy.at(place(scale)), block, block)
    table = np.zeros((len(blocks.counts), -(-blocks.kv_length // block)), np.int8)
    for row, listed, count in zip(table, blocks.indices, blocks.counts, strict=True):
        row[listed[:count]] = 1
    np.testing.assert_array_equal(table, tensors[f"csla_block_mask.scale_{scale}.block_{block}"])
    numbers = sidecar["numbers"][f"scale_{scale}.block_{block}"]
    assert int(blocks.counts.sum()) == numbers["kept_blocks"]
    share = strategy.pairs(place(scale)) / place(scale).dense_pairs
    assert share == pytest.approx(numbers["element_density_of_block_mask"], abs=1e-12)


@pytest.mark.parametrize(("scale", "window"), [(11, 7), (12, 9)])
@pytest.mark.parametrize("stem", INDEX)
def test_local_windows(golden, stem, scale, window):
    tensors = golden(stem)[1]
    stored = tensors[f"local_window_rows.scale_{scale}.window_{window}.first_and_last_200"]
    each = indices.local_union(SCHEDULE.scales[scale], window, 1)
    ours = np.stack([np.pad(u, (0, window**2 - len(u)), "edge") for u in each[:200] + each[-200:]])
    np.testing.assert_array_equal(ours, stored)


@pytest.mark.parametrize("stem", INDEX)
def test_local_runs(golden, stem):
    sidecar, tensors = golden(stem)
    prefix = "local_group_indices."
    names = [name for name in sidecar["numbers"] if name.startswith(prefix)]
    assert len(names) == 12
    for name in names:
        parts = name.removeprefix(prefix).replace(".", "_").split("_")
        scale, window, group, multiple = (int(parts[i]) for i in (1, 3, 5, 7))
        starts, length = indices.local_runs(SCHEDULE.scales[scale], window, group, multiple)
        assert length == sidecar["numbers"][name]["count"]
        np.testing.assert_array_equal(starts, tensors[f"{name}.starts"])
        if name in tensors:
            np.testing.assert_array_equal(starts[:, None] + np.arange(length), tensors[name])


@pytest.mark.parametrize("stem", INDEX)
def test_group_maps(golden, stem):
    sidecar, tensors = golden(stem)
    names = [name for name in sidecar["numbers"] if name.startswith("group_map.")]
    assert names
    for name in names:
        stored = tensors[f"{name}.source_group_of_target"]
        ours = indices.group_map(sidecar["numbers"][name]["source_groups"], len(stored))
        np.testing.assert_array_equal(ours, stored)


@pytest.mark.parametrize("stem", INDEX)
def test_mapped_indices(golden, stem):
    """The shipped flow: lists move with their groups and stay what they are."""
    sidecar, tensors = golden(stem)
    name = "group_map.to_scale11"
    source, stored = tensors[f"{name}.inds_in"], tensors[f"{name}.inds_out"]
    count = sidecar["numbers"][name]["count_in"]
    assert count == sidecar["numbers"][name]["count_out"] == Selection().units(place(10))
    lists, counts = columns.at_later_scale(
        jnp.asarray(source[..., :count], jnp.int32), Reuse(10), place(11)
    )
    np.testing.assert_array_equal(np.asarray(lists)[..., :count], stored)
    run = tensors["local_group_indices.scale_11.window_7.group_192.multiple_112"]
    np.testing.assert_array_equal(np.asarray(lists)[0, 0, :, count:], run)
    assert set(np.asarray(counts).ravel()) == {lists.shape[-1]}


@pytest.mark.parametrize("name", ["to_48x48", "48_to_64x64", "40_to_64x64"])
@pytest.mark.parametrize("stem", INDEX)
def test_output_cache_upsampling(golden, stem, name):
    tensors = golden(stem)[1]
    first = "ocache_upsample.to_48x48" if name.startswith("48") else "ocache_upsample.input_40x40"
    source = tensors[first].astype(np.float32)
    stored = tensors[f"ocache_upsample.{name}"]
    sides = [round(x.shape[2] ** 0.5) for x in (source, stored)]
    ours = columns.upsample(jnp.asarray(source), *((side, side) for side in sides))
    # Values of up to 5 in float32, a handful of roundings: 5 * 2^-23 * 4.
    np.testing.assert_allclose(ours, stored, atol=2.5e-6, rtol=0)


def inputs(golden, stem):
    """(q by scale, k, v) in float32, normalised as the sidecar says."""
    sidecar, tensors = golden(stem)
    wide = {
        n: tensors[f"{n}.int8"].astype(np.float32) / 32 for n in ("q10", "q11", "q12", "k", "v")
    }
    unit = {n: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
            for n, x in wide.items() if n != "v"}  # fmt: skip
    temperature = np.array(sidecar["per_head_multiplier"], np.float32)[:, None, None]
    q = {s: jnp.asarray(unit[f"q{s}"] * temperature) for s in (10, 11, 12)}
    pad = ((0, 0), (0, 0), (0, SCHEDULE.layout().total - SCHEDULE.tokens), (0, 0))
    return q, jnp.asarray(np.pad(unit["k"], pad)), jnp.asarray(np.pad(wide["v"], pad))


def close(ours, stored, sidecar):
    step = sidecar["rows_stored_step"]
    np.testing.assert_allclose(np.asarray(ours)[:, :, ::step], stored, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stem", ATTENTION)
def test_decision(golden, stem):
    sidecar, tensors = golden(stem)
    q, k, v = inputs(golden, stem)
    out, sums = pallas_kernels.attention_column_sums(q[10], k, v, 4121, 192)
    np.testing.assert_allclose(sums, tensors["decision.column_sums"], atol=1e-5, rtol=0)
    chosen = np.asarray(columns.select(sums, Selection(), place(10)))
    stored = tensors["decision.topk_indices_sorted"]
    gaps = tensors["decision.topk_boundary_gap"]
    assert chosen.shape == stored.shape
    for where in np.ndindex(gaps.shape):
        ours, theirs = set(chosen[where].tolist()), set(stored[where].tolist())
        values = np.asarray(sums)[where]
        differ = values[sorted(ours ^ theirs)]
        # Keys may only trade places where their sums agree to within both runs' rounding.
        assert differ.size == 0 or np.ptp(differ) <= gaps[where] + 2e-5
    close(out, tensors["decision.output_dense"], sidecar)


@pytest.mark.parametrize("stem", ATTENTION)
def test_sparse_attention_with_recorded_indices(golden, stem):
    sidecar, tensors = golden(stem)
    q, k, v = inputs(golden, stem)
    for scale in (11, 12):
        listed = jnp.asarray(tensors[f"scale{scale}.indices"], jnp.int32)
        rows = listed.shape[0]
        out = pallas_kernels.column_sparse_attention(
            q[scale][:rows], k, v, listed, listed.shape[-1],
            kv_length=SCHEDULE.scales[scale].end, group=192, granularity=1,
        )  # fmt: skip
        step = sidecar["rows_stored_step"]
        total = np.asarray(out)[:, :, ::step] + tensors[f"scale{scale}.o_cache_upsampled"]
        np.testing.assert_allclose(total, tensors[f"scale{scale}.output"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("stem", ATTENTION)
def test_end_to_end(golden, stem):
    """Decision at scale 10 and its reuse at 11 and 12, through the strategies a plan holds."""
    sidecar, tensors = golden(stem)
    q, k, v = inputs(golden, stem)
    selection = Selection(
        sidecar["top_keys"], sidecar["query_group"], sidecar["counts_multiple_of"]
    )
    out, state = attend(Cs4aDecision(selection), q[10], k, v, place(10), {})
    close(out, tensors["decision.output_dense"], sidecar)
    close(state[DIFFERENCE], tensors["decision.o_cache"], sidecar)
    reuse = Reuse(sidecar["decision_scale"], selection, tuple(sidecar["cs4a_windows_scale11_12"]))
    for scale, count in zip((11, 12), sidecar["counts"][1:], strict=True):
        stored = tensors[f"scale{scale}.indices"]
        rows = stored.shape[0]
        lists, _ = columns.at_later_scale(state[COLUMNS][:rows], reuse, place(scale))
        assert lists.shape == stored.shape == (*stored.shape[:-1], count)
        ours, _ = attend(Cs4aSparse(reuse), q[scale][:rows], k, v, place(scale), state)
        missed = columns.upsample(
            state[DIFFERENCE][:rows], SCHEDULE.sizes[10], SCHEDULE.sizes[scale]
        )
        close(missed, tensors[f"scale{scale}.o_cache_upsampled"], sidecar)
        close(ours, tensors[f"scale{scale}.output"], sidecar)


@pytest.mark.parametrize("stem", ATTENTION)
def test_csla_attention(golden, stem):
    sidecar, tensors = golden(stem)
    q, k, v = inputs(golden, stem)
    out, state = attend(Csla(), q[12], k, v, place(12), {})
    assert not state
    close(out, tensors["csla.scale12.output"], sidecar)
