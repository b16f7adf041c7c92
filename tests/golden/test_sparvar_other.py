"""The checks of stored attention flows read everything from their file: other files pass them too.

The file is written here in the format of the golden ones, by formulas in float64: plain attention
with a softmax scale, rows that are dropped on the way, other budgets, groups, windows, schedule.
"""

import numpy as np
import pytest
import torch

from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.policies import indices
from tests.golden import sparvar_flow
from tests.golden.sparvar_flow import Flow

PLAIN = {
    "schedule_side_lengths": [1, 2, 3, 5, 8, 10, 12],
    "softmax_scale": 0.125,
    "B": 2, "H": 2, "D": 64,
    "query_group": 24, "counts_multiple_of": 16, "top_keys": 0.3,
    "cs4a_windows_scale5_6": [3, 5],
    "decision_scale": 4, "rows": {5: 2, 6: 1},
    "window_sizes": [-1, -1, 1, 3, 3, 5, 5], "attention_sink_scales": 2, "block_size": 64,
    "rows_stored_step": 3,
}  # fmt: skip


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def grouped(q, k, v, lists, group):
    """Attention of each group of queries to the keys of its own list."""
    out = np.zeros_like(q)
    for row, head, index in np.ndindex(lists.shape[:3]):
        part, keys = slice(index * group, (index + 1) * group), lists[row, head, index]
        scores = q[row, head, part] @ k[row, head, keys].T
        out[row, head, part] = softmax(scores) @ v[row, head, keys]
    return out


def upsampled(x, source, target):
    rows, heads, _, depth = x.shape
    grid = torch.from_numpy(x).reshape(rows * heads, source, source, depth).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (target, target), mode="bilinear")
    return grid.permute(0, 2, 3, 1).reshape(rows, heads, target * target, depth).numpy()


def window_mask(schedule, index, windows, sinks, block):
    """Blocks that the token rule touches, as a mask of tokens."""
    scale = schedule.scales[index]
    seen = np.zeros((scale.tokens, scale.end), bool)
    for number, other in enumerate(schedule.scales[: index + 1]):
        for y, x in np.ndindex(scale.height, scale.width):
            reach = windows[number] // 2
            where = np.zeros((other.height, other.width), bool)
            centre_y, centre_x = (
                int((2 * place + 1) * keys // (2 * side))
                for place, keys, side in (
                    (y, other.height, scale.height),
                    (x, other.width, scale.width),
                )
            )
            if number < sinks:
                where[:] = True
            elif reach >= 0:
                rows = slice(max(centre_y - reach, 0), centre_y + reach + 1)
                where[rows, max(centre_x - reach, 0) : centre_x + reach + 1] = True
            seen[y * scale.width + x, other.offset : other.end] |= where.reshape(-1)
    kept = np.zeros_like(seen)
    for first, key in np.ndindex(-(-seen.shape[0] // block), -(-seen.shape[1] // block)):
        part = slice(first * block, (first + 1) * block), slice(key * block, (key + 1) * block)
        kept[part] = seen[part].any()
    return kept


def written(sidecar, seed=0):
    """(sidecar, tensors) of a flow, as the golden files store it."""
    draw, d = np.random.default_rng(seed), sidecar["decision_scale"]
    sides = sidecar["schedule_side_lengths"]
    schedule = ScaleSchedule.of(tuple((side, side) for side in sides))
    scales, rows, later = schedule.scales, sidecar["B"], sorted(sidecar["rows"])
    heads, depth = sidecar["H"], sidecar["D"]

    def bytes_of(tokens):
        values = draw.normal(0, 32, (rows, heads, tokens, depth)).round()
        return values.clip(-127, 127).astype(np.int8)

    tensors = {f"q{index}.int8": bytes_of(scales[index].tokens) for index in (d, *later)}
    tensors |= {f"{name}.int8": bytes_of(schedule.tokens) for name in "kv"}
    real = {name: value.astype(np.float64) / 32 for name, value in tensors.items()}
    k, v = real["k.int8"], real["v.int8"]
    q = {index: real[f"q{index}.int8"] for index in (d, *later)}
    q = {index: x * sidecar["softmax_scale"] for index, x in q.items()}

    group, multiple, step = (
        sidecar[name] for name in ("query_group", "counts_multiple_of", "rows_stored_step")
    )
    seen = scales[d].end
    weights = softmax(q[d] @ k[:, :, :seen].swapaxes(-1, -2))
    starts = range(0, scales[d].tokens, group)
    sums = np.stack([weights[:, :, at : at + group].sum(2) for at in starts], 2)
    count = multiple * round(sidecar["top_keys"] * seen / multiple)
    order = np.argsort(-sums, -1, kind="stable")
    ranked = np.take_along_axis(sums, order, -1)
    kept = np.sort(order[..., :count], -1)
    dense = weights @ v[:, :, :seen]
    missed = dense - grouped(q[d], k, v, kept, group)
    tensors |= {
        "decision.column_sums": sums.astype(np.float32),
        "decision.topk_indices_sorted": kept.astype(np.int16),
        "decision.topk_boundary_gap": (ranked[..., count - 1] - ranked[..., count]).astype("f4"),
        "decision.output_dense": dense[:, :, ::step].astype(np.float32),
        "decision.o_cache": missed[:, :, ::step].astype(np.float32),
    }
    windows = next(value for name, value in sidecar.items() if name.startswith("cs4a_windows"))
    counts, lists = [count], kept
    for before, index in zip((d, *later), later, strict=False):
        batch = sidecar["rows"][index]
        window = windows[max(index - len(sides) + len(windows), 0)]
        runs, length = indices.local_runs(scales[index], window, group, multiple)
        sizes = [-(-scales[each].tokens // group) for each in (before, index)]
        centres = (np.arange(sizes[1]) + 0.5) / sizes[1] * sizes[0] - 0.5
        lists = lists[:batch, :, np.clip(np.round(centres), 0, sizes[0] - 1).astype(int)]
        own = np.broadcast_to(runs[:, None] + np.arange(length), (*lists.shape[:3], length))
        lists = np.concatenate([lists, own], -1)
        carried = upsampled(missed[:batch], sides[d], sides[index])
        out = carried + grouped(q[index][:batch], k, v, lists, group)
        counts.append(lists.shape[-1])
        tensors |= {
            f"scale{index}.indices": lists.astype(np.int16),
            f"scale{index}.o_cache_upsampled": carried[:, :, ::step].astype(np.float32),
            f"scale{index}.output": out[:, :, ::step].astype(np.float32),
        }
    last = later[-1]
    mask = window_mask(
        schedule,
        last,
        sidecar["window_sizes"],
        sidecar["attention_sink_scales"],
        sidecar["block_size"],
    )
    scores = q[last] @ k[:, :, : scales[last].end].swapaxes(-1, -2)
    out = softmax(np.where(mask, scores, -np.inf)) @ v[:, :, : scales[last].end]
    tensors[f"csla.scale{last}.output"] = out[:, :, ::step].astype(np.float32)
    return {**sidecar, "counts": counts, "inputs": "stored as int8; value = int8 / 32"}, tensors


@pytest.fixture(scope="module")
def stored():
    return written(PLAIN)


@pytest.fixture(scope="module")
def flow(stored):
    return Flow(*stored)


def test_decision(flow):
    sparvar_flow.check_decision(flow)


def test_sparse_attention_with_recorded_indices(flow):
    sparvar_flow.check_recorded_indices(flow)


def test_end_to_end(flow):
    sparvar_flow.check_end_to_end(flow)


def test_csla_attention(flow):
    sparvar_flow.check_csla(flow)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"softmax_scale": 0.12}, sparvar_flow.check_decision),
        ({"per_head_multiplier": [5.0, 5.0]}, sparvar_flow.check_decision),
        ({"top_keys": 0.5}, sparvar_flow.check_end_to_end),
        ({"window_sizes": [-1] * 7}, sparvar_flow.check_csla),
        ({"rows_stored_step": 2}, sparvar_flow.check_csla),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_sidecar_is_another_flow(stored, change, check):
    """What is read from the sidecar counts."""
    sidecar, tensors = stored
    with pytest.raises((AssertionError, TypeError, ValueError)):
        check(Flow(sidecar | change, tensors))
