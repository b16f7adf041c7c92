"""SparVAR's attention flow against a sidecar and its tensors, whatever configuration they hold.

Nothing here is a number of one file: scales, heads, budgets, groups, windows, dropped rows and the
kind of attention come from the sidecar and from the names and shapes of the tensors.

Tolerances: inputs are exact and everything runs in float32. A score is a sum of products; an error
of four units in the last place of the largest score that the inputs can have moves it by
`score_error`. A probability moves by at most that share of itself for every score in it, so a
column sum of order one moves by as much, and an output by twice as much times the largest value.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

import pallas_kernels
from sparvar_jax.plans.schedule import ASPECT_TABLES, ScaleSchedule
from sparvar_jax.plans.strategy import Place
from sparvar_jax.policies import columns
from sparvar_jax.policies.columns import Reuse, Selection
from sparvar_jax.policies.cs4a import COLUMNS, DIFFERENCE, Cs4aDecision, Cs4aSparse
from sparvar_jax.policies.csla import SINKS, WINDOWS, Csla
from tests.policies.support import attend


def schedule_of(sidecar: Mapping[str, Any], tokens: Mapping[int, int] | None = None):
    """The schedule a file names by its sides, or the released one that has these scales.

    tokens: scale -> how many tokens it has.
    """
    if "schedule_side_lengths" in sidecar:
        sides = sidecar["schedule_side_lengths"]
        return ScaleSchedule.of(
            tuple(tuple(side) if isinstance(side, list) else (side, side) for side in sides)
        )
    fits = [
        schedule
        for sizes in ASPECT_TABLES.values()
        if all(
            index < len(sizes) and np.prod(sizes[index]) == count
            for index, count in (tokens or {}).items()
        )
        for schedule in [ScaleSchedule(sizes, sizes[-1])]
    ]
    return fits[0]  # the square one comes first


@dataclasses.dataclass(frozen=True)
class Flow:
    """One stored attention flow."""

    sidecar: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]

    def numbered(self, pattern: str) -> list[int]:
        """The scales that tensors of this name, with one group for the scale, exist for."""
        found = (re.fullmatch(pattern, name) for name in self.tensors)
        return sorted(int(match[1]) for match in found if match)

    @functools.cached_property
    def decision(self) -> int:
        return self.sidecar["decision_scale"]

    @functools.cached_property
    def later(self) -> list[int]:
        """Scales that reuse the decision's columns."""
        return self.numbered(r"scale(\d+)\.output")

    @functools.cached_property
    def schedule(self) -> ScaleSchedule:
        drawn = self.numbered(r"q(\d+)\.int8")
        return schedule_of(
            self.sidecar, {index: self.tensors[f"q{index}.int8"].shape[2] for index in drawn}
        )

    def place(self, index: int) -> Place:
        return Place(self.schedule, "packed", index)

    @functools.cached_property
    def selection(self) -> Selection:
        sidecar = self.sidecar
        return Selection(sidecar["top_keys"], sidecar["query_group"], sidecar["counts_multiple_of"])

    @functools.cached_property
    def reuse(self) -> Reuse:
        (name,) = (name for name in self.sidecar if name.startswith("cs4a_windows"))
        return Reuse(self.decision, self.selection, tuple(self.sidecar[name]))

    @functools.cached_property
    def inputs(self) -> tuple[dict[int, Any], Any, Any]:
        """(q by scale with the softmax scale in it, k, v), as the sidecar says; the cache padded.

        With a multiplier for every head attention is cosine attention, without it is plain.
        """
        step = float(re.search(r"int8 / (\d+)", self.sidecar["inputs"])[1])
        q = {
            index: self.tensors[f"q{index}.int8"].astype(np.float32) / step
            for index in self.numbered(r"q(\d+)\.int8")
        }
        k, v = (self.tensors[f"{name}.int8"].astype(np.float32) / step for name in "kv")
        heads = self.sidecar.get("per_head_multiplier")
        if heads is not None:
            multiplier = np.array(heads, np.float32)[:, None, None]
            q, k = {index: unit(x) * multiplier for index, x in q.items()}, unit(k)
        scale = np.float32(self.sidecar["softmax_scale"])
        pad = ((0, 0), (0, 0), (0, self.schedule.layout().total - k.shape[2]), (0, 0))
        scaled = {index: jnp.asarray(x * scale) for index, x in q.items()}
        return scaled, jnp.asarray(np.pad(k, pad)), jnp.asarray(np.pad(v, pad))

    @functools.cached_property
    def score_error(self) -> float:
        q, k, _ = self.inputs
        longest = max(float(jnp.linalg.norm(x, axis=-1).max()) for x in q.values())
        return 4 * 2.0**-23 * longest * float(jnp.linalg.norm(k, axis=-1).max())

    def close(self, ours: Any, name: str) -> None:
        """Whether outputs are the stored ones, in the rows that are stored."""
        atol = 2 * self.score_error * float(jnp.abs(self.inputs[2]).max())
        rows = np.asarray(ours)[:, :, :: self.sidecar["rows_stored_step"]]
        np.testing.assert_allclose(rows, self.tensors[name], atol=atol, rtol=0)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def check_decision(flow: Flow) -> None:
    """Dense output and column sums; the chosen columns where rounding does not decide."""
    q, k, v = flow.inputs
    place, tensors = flow.place(flow.decision), flow.tensors
    out, sums = pallas_kernels.attention_column_sums(
        q[flow.decision], k, v, place.kv_length, flow.selection.group
    )
    stored_sums = tensors["decision.column_sums"]
    atol = flow.score_error * max(1.0, float(stored_sums.max()))
    np.testing.assert_allclose(sums, stored_sums, atol=atol, rtol=0)
    chosen = np.asarray(columns.select(sums, flow.selection, place))
    stored = tensors["decision.topk_indices_sorted"]
    gaps = tensors["decision.topk_boundary_gap"]
    assert chosen.shape == stored.shape
    for where in np.ndindex(gaps.shape):
        ours, theirs = set(chosen[where].tolist()), set(stored[where].tolist())
        differ = np.asarray(sums)[where][sorted(ours ^ theirs)]
        # Keys may only trade places where their sums agree to within both runs' rounding.
        assert differ.size == 0 or np.ptp(differ) <= gaps[where] + 2 * atol
    flow.close(out, "decision.output_dense")


def check_recorded_indices(flow: Flow) -> None:
    """Sparse attention over the stored lists."""
    q, k, v = flow.inputs
    for scale in flow.later:
        listed = jnp.asarray(flow.tensors[f"scale{scale}.indices"], jnp.int32)
        out = pallas_kernels.column_sparse_attention(
            q[scale][: listed.shape[0]], k, v, listed, listed.shape[-1],
            kv_length=flow.place(scale).kv_length, group=flow.selection.group, granularity=1,
        )  # fmt: skip
        step = flow.sidecar["rows_stored_step"]
        missed = np.zeros_like(out)
        missed[:, :, ::step] = flow.tensors[f"scale{scale}.o_cache_upsampled"]
        flow.close(np.asarray(out) + missed, f"scale{scale}.output")


def check_end_to_end(flow: Flow) -> None:
    """The decision and its reuse at every later scale, through the strategies a plan holds."""
    q, k, v = flow.inputs
    first, counts = flow.place(flow.decision), flow.sidecar["counts"]
    assert flow.selection.units(first) == counts[0]
    out, state = attend(Cs4aDecision(flow.selection), q[flow.decision], k, v, first, {})
    flow.close(out, "decision.output_dense")
    flow.close(state[DIFFERENCE], "decision.o_cache")
    assert flow.later
    for scale, count in zip(flow.later, counts[1:], strict=True):
        stored, place = flow.tensors[f"scale{scale}.indices"], flow.place(scale)
        rows = stored.shape[0]
        lists, _ = columns.at_later_scale(state[COLUMNS][:rows], flow.reuse, place)
        assert lists.shape == stored.shape == (*stored.shape[:-1], count)
        ours, _ = attend(Cs4aSparse(flow.reuse), q[scale][:rows], k, v, place, state)
        sizes = flow.schedule.sizes
        missed = columns.upsample(state[DIFFERENCE][:rows], sizes[flow.decision], sizes[scale])
        flow.close(missed, f"scale{scale}.o_cache_upsampled")
        flow.close(ours, f"scale{scale}.output")


def check_csla(flow: Flow) -> None:
    """Block-sparse attention under the windows, at every scale that is stored."""
    q, k, v = flow.inputs
    sidecar = flow.sidecar
    strategy = Csla(
        tuple(sidecar.get("window_sizes", WINDOWS)),
        sidecar.get("attention_sink_scales", SINKS),
        block=sidecar.get("block_size", 128),
    )
    scales = flow.numbered(r"csla\.scale(\d+)\.output")
    assert scales
    for scale in scales:
        rows = flow.tensors[f"csla.scale{scale}.output"].shape[0]
        out, state = attend(strategy, q[scale][:rows], k, v, flow.place(scale), {})
        assert not state
        flow.close(out, f"csla.scale{scale}.output")
