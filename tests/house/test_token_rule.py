"""A token rule that runs the strongest tokens alone, chosen on the device, in some layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.models import sampling
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.models.stream import Stream
from sparvar_jax.plans.plan import dense_plan, map_segments
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.plans.strategy import Place
from sparvar_jax.policies import csla
from sparvar_jax.runtime import generate
from tests.house.support import lively, over_lists

SCHEDULE = ScaleSchedule.of(((1, 1), (6, 8), (10, 12)))
CONFIG = InfinityConfig(3, 64, 2, text_width=128, bits=8, dtype="float32")


@dataclasses.dataclass(frozen=True)
class Strongest:
    """The share of tokens of largest norm runs, in the order of places; others keep their input."""

    share: float = 0.5

    name = "strongest"
    reads = frozenset[str]()
    writes = frozenset[str]()

    def tokens(self, place):
        return round(self.share * place.scale.tokens)

    def select(self, x, codes, place, state):
        return jnp.sort(jax.lax.top_k(jnp.linalg.norm(x, axis=-1), self.tokens(place))[1], axis=-1)

    def restore(self, before, after, kept, place, state):
        return before.at[jnp.arange(len(before))[:, None], kept].set(after), {}


def strongest(plan, rule=Strongest(), layers=(1, 3), first=1):
    """The plan with the rule in some layers of the late scales."""

    def change(step, layer, old):
        late = step.scale.index >= first and layers[0] <= layer < layers[1]
        return dataclasses.replace(old, tokens=rule) if late else old

    return map_segments(plan, change)


@pytest.fixture(scope="module")
def generator():
    return generate.Generator(lively(Infinity, CONFIG))


@pytest.fixture(scope="module")
def condition(generator):
    embed = jax.jit(lambda model, *text: model.embed_condition(*text, "learned"))
    return embed(
        generator.model, jax.random.normal(jax.random.key(1), (2, 5, 128)), jnp.array([3, 5])
    )


CONTROLS = generate.controls(len(SCHEDULE), guidance=2.0, temperature=1.0)


def test_keeping_everything_changes_nothing(generator, condition):
    plain, keys = dense_plan(SCHEDULE, 3), sampling.image_keys(0, 2)
    code_sum, outputs = generator.run(plain, condition, CONTROLS, keys)
    ours, ruled = generator.run(strongest(plain, Strongest(1.0)), condition, CONTROLS, keys)
    for one, other in zip(outputs, ruled, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(code_sum, ours)


def test_half_of_the_tokens_against_lists_of_keys(generator, condition):
    """Three blocks of about ten sums of at most 256 products: 30 * sqrt(256) roundings of 2^-24.

    The norms of a hundred tokens lie much further apart, so both ways choose the same ones.
    """
    plan, keys = strongest(dense_plan(SCHEDULE, 3)), sampling.image_keys(0, 2)
    codes, past = None, ((),) * 3
    steps = generator.steps(plan, condition, CONTROLS, keys, capture=True)
    for index, (state, output) in enumerate(steps):
        raw = np.asarray(output.captured["raw_logits"])
        place = Place(SCHEDULE, "packed", index)
        again, past = plain_scale(generator.model, condition, codes, past, place=place)
        assert np.abs(raw).max() > 0.5
        tolerance = 30 * 16 * 2**-24 * np.abs(raw).max()
        np.testing.assert_allclose(raw, again, atol=tolerance, rtol=0)
        codes = state.codes
    assert [sum(k.shape[2] for k, _ in layer) for layer in past] == [169, 85, 85]


@functools.partial(jax.jit, static_argnames="place")
def plain_scale(model, condition, codes, past, *, place):
    """Raw logits of a scale with growing lists of keys; the rule once for layers 1 and 2."""
    full = x = model.add_level(model.embed_codes(codes, condition), place)
    positions, kept = model.positions(condition, place), None
    lists = [list(layer) for layer in past]
    for layer, block in enumerate(model.blocks):
        if layer == 1 and place.index >= 1:
            order = jnp.argsort(-jnp.linalg.norm(x, axis=-1), axis=-1)
            kept, full = jnp.sort(order[:, : place.scale.tokens // 2], axis=-1), x
            x = jnp.stack([x[row, kept[row]] for row in range(len(x))])
            positions = tuple(jnp.stack([t[places] for places in kept]) for t in positions)
        inputs, attend = model.block_inputs(layer, condition), over_lists(lists[layer], x, CONFIG)
        x = block(Stream(x), inputs, positions, attend, CONFIG).settled()
    if kept is not None:
        for row in range(len(x)):
            full = full.at[row, kept[row]].set(x[row])
        x = full
    return model.head_logits(x, condition), tuple(tuple(layer) for layer in lists)


def test_the_cache_holds_the_kept_rows_alone(generator):
    """Scales of 1, 48 and 120 tokens: 169 in all, and 1 + 24 + 60 = 85 where halved."""
    plan = strongest(dense_plan(SCHEDULE, 3))
    state = generator.start(plan, 2)
    assert [view.k.shape for view in state.cache] == [
        (4, 2, 256, 32), (4, 2, 128, 32), (4, 2, 128, 32)
    ]  # fmt: skip
    assert [(rows.name, rows.filled(2)) for rows in map(plan.whole_rows, range(3))] == [
        ("packed", 169), ("traced", 85), ("traced", 85)
    ]  # fmt: skip
    rows = plan.place(2, layer=1).rows
    assert [(span.start, span.rows, span.shape) for span in rows.spans] == [
        (0, 1, (1, 1)), (1, 24, None), (25, 60, None)
    ]  # fmt: skip
    assert [span.visible for span in rows.spans] == ["all", "traced", "traced"]


def test_tables_and_density_tell_it():
    """Pairs of the last two scales: 48 * 49 + 120 * 169, and 24 * 25 + 60 * 85 where halved."""
    plan = strongest(dense_plan(SCHEDULE, 3))
    lines = plan.describe().splitlines()
    assert [line.split()[3] for line in lines[1:-1]] == ["0-2", "0-0", "1-2", "0-0", "1-2"]
    assert "dense, strongest" in lines[-2]
    assert lines[-2].split()[-3:] == ["60", "85", f"{85 / 169:.3f}"]
    whole, half = 48 * 49 + 120 * 169, 24 * 25 + 60 * 85
    assert plan.density(2) == pytest.approx((whole + 2 * half) / (3 * whole))


@pytest.mark.parametrize(
    ("share", "message"), [(0.0, "strongest runs 0 of 48"), (1.5, "strongest runs 72 of 48")]
)
def test_impossible_numbers_of_tokens_are_refused(share, message):
    with pytest.raises(ValueError, match=rf"scale 1, layers 1\.\.3: the token rule {message}"):
        strongest(dense_plan(SCHEDULE, 3), Strongest(share))


@pytest.mark.parametrize("form", ["blocks", "boxes"])
def test_windows_cannot_see_chosen_tokens(form):
    plan = csla(form=form, first_scale=1, layers=(0, 2))(dense_plan(SCHEDULE, 3))
    with pytest.raises(ValueError, match=r"scale 1, layers 1\.\.2: csla .* the traced cache"):
        strongest(plan)
