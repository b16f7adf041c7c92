"""FastVAR against its authors' selections, restored branches, cache rows and logits."""

import dataclasses
import functools
import importlib
import re

import numpy as np
import pytest

from sparvar_jax.plans.plan import dense_plan, map_segments
from tests.golden import policy_runs
from tests.golden.policy_runs import TOLERANCE

policy = importlib.import_module("sparvar_jax.policies.fastvar")  # the package has its function
RUNS = policy_runs.runs("policy_fastvar*")
GAP = 1e-5
"""Scores are sums of 128 squares of float32: their roundings, about 1e-6, cannot turn a gap ten
times as large. Where the recorded gap is smaller, the sets may differ."""


def observed(rule):
    """A rule that also reports what it chose and what its branches add."""

    @dataclasses.dataclass(frozen=True)
    class Observed(type(rule)):
        def branch(self, name, run, stream, positions, place, state):
            x, out = stream.settled(), super().branch(name, run, stream, positions, place, state)
            after = out.stream
            update = after.update() if after.branch is not None else after.x - x
            report = {f"{name} update": update}
            if isinstance(rule, policy.Liveliest):
                report[f"{name} kept"] = self.choose(name, x, place)
            return out._replace(report=report)

    return Observed(**{f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)})


@functools.cache
def replayed(stem, run):
    sidecar, _, generator = policy_runs.load(stem)
    about, schedule = sidecar["runs"][run], policy_runs.schedule_of(sidecar["runs"][run])
    depth = generator.model.config.depth
    scales = {(scale.height, scale.width): scale.index for scale in schedule.scales}
    widths = {scale.width: scale.index for scale in schedule.scales}
    dropped = tuple(
        (widths[int(width)], share)
        for width, share in about["pruned_widths_and_ratios"].items()
        if int(width) in widths
    )
    layers = about["pruned_layers"]
    cache, span = scales[tuple(about["cache_grid"])], (min(layers), max(layers) + 1)
    plan = policy.fastvar(dropped, cache, skip=0, layers=span)(dense_plan(schedule, depth))
    rules = {}

    def watch(step, layer, old):
        if not isinstance(old.tokens, policy.Remember | policy.Liveliest):
            return old
        rule = rules.setdefault(old.tokens, observed(old.tokens))
        return dataclasses.replace(old, tokens=rule)

    return plan, policy_runs.replay(stem, run, map_segments(plan, watch))


@pytest.mark.parametrize(("stem", "run"), RUNS)
def test_hidden_states_and_logits(stem, run, golden_note):
    sidecar, tensors, _ = policy_runs.load(stem)
    _, found = replayed(stem, run)
    error = policy_runs.check_captured(found, tensors, run, sidecar["config"]["depth"])
    golden_note(f"max error {error:.1e}")


@pytest.mark.parametrize(("stem", "run"), RUNS)
def test_kept_tokens_are_the_same_sets(stem, run):
    sidecar, tensors, _ = policy_runs.load(stem)
    _, found = replayed(stem, run)
    gaps = sidecar["runs"][run]["smallest_relative_score_gap_at_the_cut"]
    compared = 0
    for key, stored in tensors.items():
        match = re.fullmatch(rf"{run}\.kept\.(\w+)\.layer_(\d+)\.scale_(\d+)", key)
        if match:
            branch, layer, scale = match[1], int(match[2]), int(match[3])
            ours = np.asarray(found[scale][2][layer][f"{branch} kept"])
            assert ours.shape == stored.shape
            if gaps[f"layer_{match[2]}.{branch}.scale_{match[3]}"] > GAP:
                np.testing.assert_array_equal(ours, np.sort(stored, axis=-1), err_msg=key)
                compared += 1
    assert compared


@pytest.mark.parametrize(("stem", "run"), RUNS)
def test_branches_as_cached_and_restored(stem, run):
    _, tensors, _ = policy_runs.load(stem)
    plan, found = replayed(stem, run)
    cache = next(
        step.scale.index for step in plan.steps
        if any(isinstance(segment.tokens, policy.Remember) for segment in step.segments)
    )  # fmt: skip
    pattern = rf"{run}\.branch_(cache|restored)\.(\w+)\.layer_(\d+)(?:\.scale_(\d+))?"
    for key, stored in tensors.items():
        if match := re.fullmatch(pattern, key):
            scale = cache if match[1] == "cache" else int(match[4])
            ours = np.asarray(found[scale][2][int(match[3])][f"{match[2]} update"])
            np.testing.assert_allclose(ours, stored, atol=TOLERANCE, rtol=0, err_msg=key)


@pytest.mark.parametrize(("stem", "run"), RUNS)
def test_later_scales_see_the_kept_rows_alone(stem, run):
    sidecar, _, _ = policy_runs.load(stem)
    plan, _ = replayed(stem, run)
    for key, rows in sidecar["runs"][run]["kv_rows_after_each_block"].items():
        index = int(key.removeprefix("scale_"))
        ours = [plan.place(index, layer).rows.tokens(index) for layer in range(plan.depth)]
        assert ours == rows, key
