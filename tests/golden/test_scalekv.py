"""ScaleKV against its authors' choice of rows, and against hidden states on that choice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.plans.plan import dense_plan, with_store
from sparvar_jax.policies.scalekv import ScaleKv
from tests.golden import policy_runs

RUNS = policy_runs.runs("policy_scalekv*")
ROUNDING = 1e-3
"""Scores are sums of 16 x 64 products of queries of order ten with unit keys, off by hidden states
that agree to 1e-4: two scores that are nearer may stand in either order."""


@dataclasses.dataclass(frozen=True)
class Forced(ScaleKv):
    """Keeps the rows that are stored, and lays our scores beside what it keeps."""

    stem: str = ""
    run: str = ""
    layer: int = 0

    def stored(self, scale):
        tensors = policy_runs.load(self.stem)[1]
        return tensors[f"{self.run}.kept_rows.layer_{self.layer:02d}.scale_{scale:02d}"]

    def choose(self, scores, count, place):
        return jnp.asarray(self.stored(place.index))

    def start(self, shape, whole):
        return super().start(shape, whole), ()

    def write(self, kept, shared, write, place):
        return super().write(kept[0], shared, write, place)

    def keep(self, held, q, place):
        kept, shared = super().keep(held, q, place)
        if place.index not in dict(self.left) or place.index + 1 == len(place.schedule):
            return (kept, ()), shared
        return (kept, self.scores(self.view(held, place).k, held[2], place)), shared


@functools.cache
def replayed(stem, run):
    sidecar, _, generator = policy_runs.load(stem)
    about, schedule = sidecar["runs"][run], policy_runs.schedule_of(sidecar["runs"][run])
    depth, side = generator.model.config.depth, round(about["window_queries"] ** 0.5)
    plan = dense_plan(schedule, depth)
    for layer in range(depth):
        left = tuple((int(s), rows[layer]) for s, rows in about["capacity_after_scale"].items())
        store = Forced(left, side, about["pool_kernel"], stem, run, layer)
        plan = with_store(plan, store, (layer, layer + 1))
    scores = {}

    def gather(scale, state):
        for layer, (_, extra) in enumerate(state.cache):
            if not isinstance(extra, tuple):
                scores[layer, scale - 1] = np.asarray(extra)
        return state

    return plan, policy_runs.replay(stem, run, plan, before=gather), scores


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize(("stem", "run"), RUNS)
def test_hidden_states_and_logits_on_the_stored_rows(stem, run, golden_note):
    sidecar, tensors, _ = policy_runs.load(stem)
    _, found, _ = replayed(stem, run)
    error = policy_runs.check_captured(found, tensors, run, sidecar["config"]["depth"])
    golden_note(f"max error {error:.1e}")


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize(("stem", "run"), RUNS)
def test_no_dropped_row_scores_above_a_kept_one(stem, run):
    plan, _, scores = replayed(stem, run)
    assert scores
    for (layer, scale), ours in scores.items():
        kept = np.zeros(ours.shape, bool)
        np.put_along_axis(kept, plan.store(layer).stored(scale), True, axis=-1)
        lowest = np.where(kept, ours, np.inf).min(-1)
        highest = np.where(kept, -np.inf, ours).max(-1)
        assert (lowest >= highest - ROUNDING).all(), (layer, scale)


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize(("stem", "run"), RUNS)
def test_cache_rows(stem, run):
    about, (plan, found, _) = policy_runs.load(stem)[0]["runs"][run], replayed(stem, run)
    for key, rows in about["kv_rows_read_by_each_layer"].items():
        index = int(key.removeprefix("scale_"))
        assert [plan.place(index, n).rows.tokens(index) for n in range(plan.depth)] == rows, key
    most = [
        max(rows[n] for key, rows in list(about["kv_rows_left_by_each_layer"].items())[:-1])
        for n in range(plan.depth)
    ]
    assert [jax.tree.leaves(kept)[2] for kept, _ in found[-1][0].cache] == most
