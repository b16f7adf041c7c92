"""SparseVAR's mechanics through the joints: one choice a scale, restored states, codes left out.

The choice is forced where ties decide it, and checked against scores otherwise. Its matching of
dropped tokens to anchors is not ours; what follows from it is.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.models import quantizer
from sparvar_jax.plans.plan import dense_plan, map_segments
from tests.golden import policy_runs
from tests.golden.policy_runs import TOLERANCE, name

RUNS = policy_runs.runs("policy_sparsevar*")
ROUNDING = 1e-5
"""Scores are means of squares of order one of hidden states that agree to 1e-5 or so."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Runs the tokens that are stored, and restores the others as stored anchors say."""

    stem: str
    run: str

    name = "stored"
    reads = writes = frozenset()

    def of(self, what, place):
        tensors = policy_runs.load(self.stem)[1]
        return jnp.asarray(tensors[name(self.run, what, place.index)], jnp.int32)

    def tokens(self, place):
        return self.of("kept", place).shape[1]

    def select(self, x, codes, place, state):
        return jnp.concatenate([self.of("kept", place)] * 2)

    def restore(self, before, after, kept, place, state):
        rows = jnp.arange(len(before))[:, None]
        full = before.at[rows, kept].set(after)
        dropped, anchors = (
            jnp.concatenate([self.of(what, place)] * 2) for what in ("dropped", "dropped_anchor")
        )
        alike = jnp.concatenate([self.of("dropped_recoverable", place)] * 2)[..., None]
        new = jnp.where(alike == 1, full[rows, anchors], full[rows, dropped])
        return full.at[rows, dropped].set(new), {}

    def drawn(self, kept, place, batch):
        dropped, alike = self.of("dropped", place), self.of("dropped_recoverable", place)
        every = jnp.ones((batch, place.scale.tokens), bool)
        return every.at[jnp.arange(batch)[:, None], dropped].set(alike == 1)


@functools.cache
def replayed(stem, run):
    sidecar, tensors, generator = policy_runs.load(stem)
    schedule = policy_runs.schedule_of(sidecar["runs"][run])
    rule = Stored(stem, run)

    def change(step, layer, old):
        pruned = name(run, "kept", step.scale.index) in tensors
        return dataclasses.replace(old, tokens=rule) if pruned else old

    def by_area(scale, state):
        if scale == 0:
            return state
        codes = quantizer.next_input(state.code_sum, schedule.sizes[scale], mode="area")
        return dataclasses.replace(state, codes=codes.reshape(state.codes.shape))

    plan = map_segments(dense_plan(schedule, generator.model.config.depth), change)
    return plan, policy_runs.replay(stem, run, plan, before=by_area)


def kept_of(tensors, run, scale, tokens):
    """The kept tokens of a scale for both rows; all where nothing is stored."""
    every = np.arange(tokens)[None]
    return np.repeat(tensors.get(name(run, "kept", scale), every), 2, axis=0)


@pytest.mark.parametrize(("stem", "run"), RUNS)
def test_states_logits_and_codes(stem, run, golden_note):
    tensors = policy_runs.load(stem)[1]
    plan, found = replayed(stem, run)
    worst = 0.0
    for scale, (_, captured, _) in enumerate(found):
        kept = kept_of(tensors, run, scale, plan.schedule.scales[scale].tokens)[..., None]
        last = captured[f"hidden.{plan.depth - 1}"]
        early = range(plan.depth - 1)
        ours = {f"hidden_after_block_{n:02d}": captured[f"hidden.{n}"] for n in early}
        ours[f"hidden_after_block_{plan.depth - 1:02d}"] = np.take_along_axis(last, kept, 1)
        ours["hidden_restored_before_head"] = last
        ours |= {what: captured[what] for what in ("raw_logits", "guided_logits")}
        for what, value in ours.items():
            if (key := name(run, what, scale)) in tensors:
                error = np.abs(value.reshape(tensors[key].shape) - tensors[key]).max()
                assert error <= TOLERANCE, f"{key}: {error:.2e}"
                worst = max(worst, error)
    latent = tensors[f"{run}.final_latent"].transpose(0, 2, 3, 1)
    assert np.abs(found[-1][0].code_sum - latent).max() <= TOLERANCE
    golden_note(f"max error {worst:.1e}")


@pytest.mark.parametrize(("stem", "run"), RUNS)
def test_scores_and_the_tokens_they_keep(stem, run):
    sidecar, tensors, generator = policy_runs.load(stem)
    about, (plan, found) = sidecar["runs"][run], replayed(stem, run)
    layer, level = about["scored_layers"][-1], np.asarray(generator.model.level_embed[...])
    assert about["scored_layers"][0] == 0
    pruned = [n for n in range(len(plan.steps)) if name(run, "kept", n) in tensors]
    for scale in pruned:
        old, new = plan.schedule.scales[scale - 1], plan.schedule.scales[scale]
        captured, kept = found[scale - 1][1], kept_of(tensors, run, scale - 1, old.tokens)
        entered = np.take_along_axis(captured["input"] + level[scale - 1], kept[..., None], 1)
        change = np.square(captured[f"hidden.{layer}"] - entered).mean(-1)
        score = np.zeros((len(kept) // 2, old.tokens), np.float32)
        np.put_along_axis(score, kept[: len(score)], change.reshape(2, len(score), -1).mean(0), 1)
        stored = tensors[name(run, "score_before_resize", scale - 1)]
        np.testing.assert_allclose(score, stored, atol=TOLERANCE, rtol=TOLERANCE)
        share = (stored > about["threshold"] * stored.max()).mean()
        mask = np.zeros((len(score), new.tokens), bool)
        np.put_along_axis(mask, tensors[name(run, "kept", scale)], True, 1)
        assert (mask.sum(1) == int(new.tokens * share)).all()
        y = np.arange(new.height) * old.height // new.height
        x = np.arange(new.width) * old.width // new.width
        grid = score.reshape(-1, old.height, old.width)[:, y][:, :, x].reshape(mask.shape)
        lowest, highest = np.where(mask, grid, np.inf).min(1), np.where(mask, -1, grid).max(1)
        assert (lowest >= highest - ROUNDING).all()


@pytest.mark.parametrize(("stem", "run"), RUNS)
def test_cache_rows(stem, run):
    about, (plan, _) = policy_runs.load(stem)[0]["runs"][run], replayed(stem, run)
    for key, rows in about["kv_rows_after_each_block"].items():
        index = int(key.removeprefix("scale_"))
        assert [plan.place(index, n).rows.tokens(index) for n in range(plan.depth)] == rows, key
