"""SparVAR's index functions and attention flow against stored arrays of the authors' functions.

Which scales, windows, groups and budgets there are is read from the sidecars and from the names of
the tensors. Tolerances of the attention flow: `sparvar_flow.py`.
"""

import functools
import hashlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import sparsity
from sparvar_jax.plans.strategy import Place
from sparvar_jax.policies import columns, indices
from sparvar_jax.policies.columns import Reuse, Selection
from sparvar_jax.policies.csla import Csla
from tests.golden import sparvar_flow
from tests.golden.sparvar_flow import Flow, schedule_of
from tests.golden.support import golden_stems, load_golden, load_sidecar

INDEX = golden_stems("sparvar_index*")
ATTENTION = golden_stems("sparvar_attention*")
RUN = r"local_group_indices\.scale_(\d+)\.window_(\d+)\.group_(\d+)\.multiple_(\d+)"


def cases(pattern: str) -> list[tuple]:
    """(stem, the numbers in it) for every number or tensor of an index file named like this."""
    found = []
    for stem in INDEX:
        sidecar = load_sidecar(stem)
        names = [*sidecar["numbers"], *sidecar["tensor_index"]]
        matches = (re.fullmatch(pattern, name) for name in names)
        found += [(stem, *map(int, match.groups())) for match in matches if match]
    return sorted(set(found))


@pytest.fixture(scope="module")
def golden():
    return functools.lru_cache(load_golden)


@pytest.fixture(scope="module")
def flow():
    return functools.lru_cache(lambda stem: Flow(*load_golden(stem)))


def place(sidecar, index: int) -> Place:
    return Place(schedule_of(sidecar), "packed", index)


@pytest.mark.parametrize(("stem", "scale"), cases(r"csla_token_mask_row_counts\.scale_(\d+)"))
def test_token_rule(golden, stem, scale):
    sidecar, tensors = golden(stem)
    windows = tuple(sidecar["window_sizes"])
    strategy = Csla(windows, sidecar["attention_sink_scales"])
    mask = sparsity.token_rule(*strategy.at(place(sidecar, scale)))
    packed = np.packbits(mask.reshape(-1))
    digest = sidecar["numbers"][f"scale_{scale}.token_mask_sha256_of_row_major_packbits_msb_first"]
    name = f"csla_token_mask_{{}}.scale_{scale}"
    np.testing.assert_array_equal(mask.sum(1), tensors[name.format("row_counts")])
    np.testing.assert_array_equal(mask.sum(0), tensors[name.format("col_counts")])
    rows = tensors[name.format("sample_rows")]
    stored = tensors[name.format("sample_packed")]
    np.testing.assert_array_equal(np.packbits(mask[rows], axis=1), stored)
    assert hashlib.sha256(packed.tobytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("stem", "scale", "block"), cases(r"csla_block_mask\.scale_(\d+)\.block_(\d+)")
)
def test_block_tables(golden, stem, scale, block):
    sidecar, tensors = golden(stem)
    where = place(sidecar, scale)
    strategy = Csla(tuple(sidecar["window_sizes"]), sidecar["attention_sink_scales"], block=block)
    blocks = sparsity.csla_blocks(*strategy.at(where), block, block)
    table = np.zeros((len(blocks.counts), -(-blocks.kv_length // block)), np.int8)
    for row, listed, count in zip(table, blocks.indices, blocks.counts, strict=True):
        row[listed[:count]] = 1
    np.testing.assert_array_equal(table, tensors[f"csla_block_mask.scale_{scale}.block_{block}"])
    numbers = sidecar["numbers"][f"scale_{scale}.block_{block}"]
    assert int(blocks.counts.sum()) == numbers["kept_blocks"]
    share = strategy.pairs(where) / where.dense_pairs
    assert share == pytest.approx(numbers["element_density_of_block_mask"], abs=1e-12)


@pytest.mark.parametrize(
    ("stem", "scale", "window", "ends"),
    cases(r"local_window_rows\.scale_(\d+)\.window_(\d+)\.first_and_last_(\d+)"),
)
def test_local_windows(golden, stem, scale, window, ends):
    sidecar, tensors = golden(stem)
    stored = tensors[f"local_window_rows.scale_{scale}.window_{window}.first_and_last_{ends}"]
    each = indices.local_union(schedule_of(sidecar).scales[scale], window, 1)
    each = each[:ends] + each[-ends:]
    ours = np.stack([np.pad(union, (0, window**2 - len(union)), "edge") for union in each])
    np.testing.assert_array_equal(ours, stored)


@pytest.mark.parametrize(("stem", "scale", "window", "group", "multiple"), cases(RUN))
def test_local_runs(golden, stem, scale, window, group, multiple):
    sidecar, tensors = golden(stem)
    name = f"local_group_indices.scale_{scale}.window_{window}.group_{group}.multiple_{multiple}"
    starts, length = indices.local_runs(schedule_of(sidecar).scales[scale], window, group, multiple)
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
    schedule, runs = schedule_of(sidecar), cases(RUN)
    checked = 0
    for name, numbers in sidecar["numbers"].items():
        target = re.fullmatch(r"group_map\.to_scale(\d+)", name)
        if not target or f"{name}.inds_in" not in tensors or numbers["add_sink"]:
            continue
        scale, group, count = int(target[1]), numbers["bm"], numbers["count_in"]
        assert count == numbers["count_out"]
        groups = [indices.ceil_div(one.tokens, group) for one in schedule.scales[:scale]]
        decision = max(i for i, each in enumerate(groups) if each == numbers["source_groups"])
        source = jnp.asarray(tensors[f"{name}.inds_in"][..., :count], jnp.int32)
        for _, at, window, size, multiple in runs:
            if (at, size) != (scale, group):
                continue
            reuse = Reuse(decision, Selection(group=group, multiple=multiple), (window,))
            lists, counts = columns.at_later_scale(source, reuse, place(sidecar, scale))
            np.testing.assert_array_equal(
                np.asarray(lists)[..., :count], tensors[f"{name}.inds_out"]
            )
            assert set(np.asarray(counts).ravel()) == {lists.shape[-1]}
            run = f"local_group_indices.scale_{at}.window_{window}.group_{size}.multiple_{multiple}"
            if scale == decision + 1:
                starts, length = tensors[f"{run}.starts"], sidecar["numbers"][run]["count"]
                own = starts[:, None] + np.arange(length)
                np.testing.assert_array_equal(np.asarray(lists)[0, 0, :, count:], own)
                checked += 1
    assert checked


@pytest.mark.parametrize("stem", INDEX)
def test_output_cache_upsampling(golden, stem):
    """From the stored input, or from a stored grid of the side that a name begins with."""
    tensors = golden(stem)[1]
    grids = {
        int(match[2]): (match[0], (int(match[2]), int(match[3])))
        for name in sorted(tensors)
        if (match := re.fullmatch(r"ocache_upsample\.(input|to)_(\d+)x(\d+)", name))
    }
    first = next(grid for grid in grids.values() if ".input_" in grid[0])
    names = [name for name in tensors if re.fullmatch(r"ocache_upsample\.(\d+_)?to_.*", name)]
    assert names
    for name in names:
        side, height, width = re.fullmatch(r".*\.(\d+_)?to_(\d+)x(\d+)", name).groups()
        source, size = grids[int(side[:-1])] if side else first
        ours = columns.upsample(
            jnp.asarray(tensors[source].astype(np.float32)), size, (int(height), int(width))
        )
        # Values of up to 5 in float32, a handful of roundings: 5 * 2^-23 * 4.
        np.testing.assert_allclose(ours, tensors[name], atol=2.5e-6, rtol=0)


@pytest.mark.parametrize("stem", ATTENTION)
def test_decision(flow, stem):
    sparvar_flow.check_decision(flow(stem))


@pytest.mark.parametrize("stem", ATTENTION)
def test_sparse_attention_with_recorded_indices(flow, stem):
    sparvar_flow.check_recorded_indices(flow(stem))


@pytest.mark.parametrize("stem", ATTENTION)
def test_end_to_end(flow, stem):
    sparvar_flow.check_end_to_end(flow(stem))


@pytest.mark.parametrize("stem", ATTENTION)
def test_csla_attention(flow, stem):
    sparvar_flow.check_csla(flow(stem))
