"""Other ways to draw less: what keeps everything changes nothing, the rest does what it says."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.models import quantizer, sampling
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.pipelines.memory import cache_bytes
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.plans.route import Route
from sparvar_jax.plans.schedule import ScaleSchedule, infinity_schedule
from sparvar_jax.plans.stores import CacheShape
from sparvar_jax.policies import head_orders, parse_plan
from sparvar_jax.policies.per_head import with_orders
from sparvar_jax.policies.router import SkipVar, high_frequencies, outlines
from sparvar_jax.runtime import generate
from sparvar_jax.study.head_order import mass, orders_from
from tests.house.support import lively

SCHEDULE = ScaleSchedule.of(((1, 1), (2, 2), (4, 4), (8, 8), (8, 12), (12, 16)))
CONFIG = InfinityConfig(3, 64, 2, text_width=128, bits=8, dtype="float32")
DENSE = dense_plan(SCHEDULE, 3)
ORDERS = head_orders.HeadOrders(
    3, 2, 2, tuple(tuple(np.random.default_rng(n).permutation(6).tolist()) for n in range(3))
)
pytestmark = pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")


def plan_of(text):
    return parse_plan(text, SCHEDULE, 3)


@functools.cache
def generator():
    return generate.Generator(lively(Infinity, CONFIG))


@functools.cache
def arguments(batch=2):
    model = generator().model
    text = jax.random.normal(jax.random.key(1), (batch, 5, 128))
    lengths = jnp.arange(batch) % 3 + 3
    condition = jax.jit(lambda m: m.embed_condition(text, lengths, "learned"))(model)
    controls = generate.controls(len(SCHEDULE), guidance=2.0, temperature=1.0)
    return condition, controls, sampling.image_keys(0, batch)


def draw(plan, **options):
    return generator().run(plan, *arguments(), **options)


@functools.cache
def dense():
    return draw(DENSE)


def same(ours, theirs, scales=None):
    for one, other in list(zip(ours[1], theirs[1], strict=False))[:scales]:
        np.testing.assert_array_equal(one.tokens, other.tokens)
    if scales is None:
        np.testing.assert_array_equal(ours[0], theirs[0])


SLOW = pytest.mark.slow
EVERYTHING = (
    pytest.param("fastvar(((-2, 0.0), (-1, 0.0)), -3, 0)", marks=SLOW),
    "prune(1.0, layers=(1, 3))",
    pytest.param("prune(1.0, (8, 16), scales=(-2, -1), layers=(1, 3))", marks=SLOW),
    "share_rows(0)",
    "drop_uncond(0, ((-1, 1.0),))",
    "guidance_range(0, 6)",
    pytest.param("scalekv(keep=1.0)", marks=SLOW),
)


@pytest.mark.parametrize("text", EVERYTHING)
def test_keeping_everything_draws_the_same_bits(text):
    same(draw(plan_of(text)), dense())


@pytest.mark.slow
@pytest.mark.parametrize("free", [True, False])
def test_heads_that_see_everything_draw_the_same_bits(free):
    same(draw(with_orders(DENSE, ORDERS, 1.0, free=free)), dense())


@functools.cache
def alike():
    """Arguments whose unconditional rows have the prompt of the conditional ones."""
    model, (_, controls, keys) = generator().model, arguments()
    text, lengths = jax.random.normal(jax.random.key(1), (2, 5, 128)), jnp.array([3, 4])
    embed = jax.jit(lambda m: m.embed_condition(text, lengths, (text, lengths)))
    return embed(model), controls, keys


def test_shared_rows_change_nothing_where_rows_are_alike():
    plain = generator().run(DENSE, *alike())
    same(generator().run(plan_of("share_rows(2, (0, 2))"), *alike()), plain)
    with pytest.raises(AssertionError):
        same(draw(plan_of("share_rows(2, (0, 2))")), dense())


def test_a_ramp_keeps_the_difference_of_rows():
    """The unconditional rows of the last scale gain in layers 1 and 2 what the others gain.

    Both sides add and subtract the same float32 values of order one, in another order.
    """
    plan = plan_of("drop_uncond(0, ((-1, 1),))")
    outputs = draw(plan, capture=True, forced=tuple(o.tokens for o in dense()[1]))[1]
    seen = {n: np.asarray(outputs[-1].captured[f"hidden.{n}"]) for n in range(3)}
    gained = seen[2][:2] - seen[0][:2]
    np.testing.assert_allclose(seen[2][2:], seen[0][2:] + gained, atol=1e-5, rtol=1e-5)
    assert "cond rows" in plan.describe()
    # 1 + 4 + 16 + 64 + 96 tokens run 6 rows x layers, the last 192 run 2 and 2 layers of one.
    assert plan.work() == pytest.approx((181 * 6 + 192 * (2 + 2)) / (373 * 6))


@pytest.mark.parametrize("more", ["", pytest.param(" + drop_uncond(1)", marks=SLOW)])
def test_pruned_tokens_add_no_codes_and_fill_whole_patches(more):
    """The last grid is the final one: what it adds is a code of length one, or nothing."""
    plan = plan_of("prune(0.3, layers=(1, 3))" + more)
    sums = [
        np.array(state.code_sum) for state, _ in generator().steps(plan, *arguments())
    ]  # fmt: skip
    added = np.linalg.norm(sums[-1] - sums[-2], axis=-1)
    ran = added > 0.5
    np.testing.assert_allclose(added, ran, atol=1e-5)
    tiles = ran.reshape(2, 3, 4, 4, 4).swapaxes(2, 3).reshape(2, 12, 16)
    assert (tiles.all(-1) == tiles.any(-1)).all()
    assert (tiles.all(-1).sum(-1) == 4).all()  # 0.3 of 12 patches, rounded up
    change = np.square(np.asarray(latent_step(sums))).sum(-1)
    by_tile = change.reshape(2, 3, 4, 4, 4).swapaxes(2, 3).reshape(2, 12, 16).mean(-1)
    for kept, score in zip(tiles.all(-1), by_tile, strict=True):
        assert score[kept].min() > score[~kept].max()
    place = plan.place(5, 1)
    assert (place.queries, place.rows.spans[5].visible) == (64, "traced")


def latent_step(sums):
    """Change of the code sum over the scale before the last, by the grids that models see."""
    coarse = quantizer.resize(jnp.asarray(sums[-3]), SCHEDULE.sizes[-2])
    return sums[-2] - quantizer.resize(coarse, SCHEDULE.sizes[-1])


@pytest.mark.slow
def test_windows_go_on_under_a_pruned_scale():
    windows = "csla((-1, -1, -1, -1, 5, 7), 3, 'boxes', first_scale=-2, layers=(1, 3))"
    plan = plan_of(f"{windows} + prune(0.5, layers=(1, 3))")
    assert "csla boxes on grid, prune 0.5 by 4x4" in plan.describe()
    whole = plan_of(f"{windows} + prune(1.0, layers=(1, 3))")
    same(draw(whole), draw(plan_of(windows)))
    sums = [np.array(s.code_sum) for s, _ in generator().steps(plan, *arguments())]
    assert ((sums[-1] != sums[-2]).any(-1).sum((1, 2)) == 96).all()


@pytest.mark.slow
def test_fastvar_draws_any_grid_and_every_picture_of_a_batch_as_alone():
    plan = plan_of("fastvar(((-2, 0.4), (-1, 0.5)), -3, 0, layers=(1, 3))")
    both, (condition, controls, keys) = draw(plan), arguments()
    one = jax.tree.map(lambda x: x[jnp.array([1, 3])], condition)
    alone = generator().run(plan, one, controls, keys[1:])
    for ours, theirs in zip(both[1], alone[1], strict=True):
        np.testing.assert_array_equal(ours.tokens[1:], theirs.tokens)


@dataclasses.dataclass(frozen=True)
class Always:
    """Chooses one plan for the first picture and another for the rest, and counts its looks."""

    first: int
    rest: int

    name = "always"

    def features(self, before, now, schedule, decode):
        return decode(now - before)

    def choose(self, features):
        LOOKS.append(features.shape)
        return [self.first, *[self.rest] * (len(features) - 1)]


LOOKS = []


@pytest.mark.parametrize(
    ("first", "rest", "taken"),
    [(1, 2, 1), pytest.param(0, 2, 0, marks=SLOW), pytest.param(2, 2, 2, marks=SLOW)],
)
def test_a_route_goes_on_as_the_most_careful_choice_says(first, rest, taken):
    plans = tuple(plan_of(t) for t in ("dense", "drop_uncond(1)", "skip_last_scales(2)"))
    route = Route(3, Always(first, rest), plans)
    with_route = dataclasses.replace(plans[0], route=route)
    own = generate.Generator(generator().model, decode=lambda x: x.mean((1, 2)))
    LOOKS.clear()
    told = []
    code_sum = None
    for state, _ in own.steps(with_route, *arguments(), chosen=told.append):
        code_sum = state.code_sum
    np.testing.assert_array_equal(code_sum, draw(plans[taken])[0])
    assert told == [plans[taken]]
    assert LOOKS == [(2, 8)]


def test_policies_after_a_route_apply_to_all_of_its_plans():
    scales = ScaleSchedule.of(tuple((n, n) for n in range(1, 11)))
    plan = parse_plan("router() + csla(first_scale=-2)", scales, 2)
    texts = [f"drop_uncond({n})" for n in (1, 2, 3)] + [f"skip_last_scales({n})" for n in (1, 2, 3)]
    alone = [parse_plan(f"{text} + csla(first_scale=-2)", scales, 2) for text in texts]
    assert list(plan.route.plans) == alone


def test_skipvar_looks_at_outlines_and_frequencies():
    """A step of height two has gradient 8 beside it, and at the border, beyond which is zero."""
    step = np.zeros((1, 6, 6), np.float32)
    step[:, :, 3:] = 2
    found = np.asarray(outlines(jnp.asarray(step)))
    np.testing.assert_allclose(found[0, 2], [0, 0, 8, 8, 0, 8], atol=1e-6)
    wave = np.cos(2 * np.pi * np.arange(16) * 7 / 16)[None, :, None] * np.ones((1, 16, 16))
    shares = [float(high_frequencies(jnp.asarray(x))[0]) for x in (wave, wave + 3, 0 * wave + 1)]
    np.testing.assert_allclose(shares, [1, 1 / 4, 0], atol=1e-5)


def test_skipvar_chooses_by_the_published_numbers():
    """By hand: (.3, .6) standardises to (3.203, 1.465), where skipping nothing scores 7.80."""
    features = np.array([[0.3, 0.6], [0.01, 0.3], [0.115, 0.489]])
    assert SkipVar().choose(features) == [1, 5, 4]
    assert SkipVar(careful=9).choose(features[2:]) == [2]


@pytest.mark.slow
def test_windows_and_patches_compose_for_real_depths():
    for text in ("sparvar-fast + prune(0.4, (8, 16))", "sparvar-paper + prune(0.4)"):
        plan = parse_plan(f"{text} + drop_uncond(1)", infinity_schedule(), 40)
        last = [(s.layers, s.attention.name, s.tokens.name) for s in plan.steps[-1].segments]
        assert [layers for layers, _, _ in last] == [(0, 11), (11, 40)]
        assert "on grid" in last[1][1]
        assert plan.place(12, 39).queries in (1664, 1648)


def test_a_ramp_before_dropped_rows():
    plan = plan_of("drop_uncond(1, ((-3, 0.67), (-2, 1)))")
    rows = [[(s.layers, s.rows) for s in step.segments] for step in plan.steps[-3:]]
    assert rows == [
        [((0, 2), "all"), ((2, 3), "cond")], [((0, 1), "all"), ((1, 3), "cond")], [((0, 3), "all")]
    ]  # fmt: skip


REFUSED = {
    "fastvar(((2, 0.5),), 3, 0)": "what fills in comes from scale 3",
    "fastvar(((-1, 1.0),), -2, 0)": "share of the tokens in",
    "prune(0.5, layers=(1, 3)) + fastvar(((-1, 0.5),), -2, 0, layers=(1, 3))": "token rule watch",
    "prune(0.5, scales=(1,))": "scales from 2 on",
    "prune(0.5, (2, 2))": "tiles of 4x4 or 8x16",
    "prune(0.5, layers=(1, 3)) + csla(first_scale=-2)": "cannot read the traced cache layout",
    "scalekv(keep=0.1) + csla(first_scale=-1)": "cannot read the traced cache layout",
    "fastvar(((-1, 0.5),), -2, 0) + share_rows(1)": "rows choose their tokens apart",
    "scalekv('3b')": "presets 2b and 8b",
    "per_head('infinity_2b')": "order is of 32 layers",
    "per_head('nowhere.json')": "no head order",
    "drop_uncond(0, ((-2, 1), (-1, 2)))": "share or drop rows from one scale to the end",
    "share_rows(1) + drop_uncond(0, ((-1, 1),))": "would replace shared rows",
    "guidance_range(4, 2)": "0 <= on <= off",
    "router()": "at least 9 scales",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_does_not_compose_is_refused_with_its_reason(text):
    scales = ScaleSchedule.of((*((n, n) for n in range(1, 7)), (30, 30), (31, 31)))
    with pytest.raises(ValueError, match=re.escape(REFUSED[text])):
        parse_plan(text, scales, 3)


def test_guidance_by_scale_as_switti_names_it():
    plan = plan_of("guidance_range(turn_on_cfg_start_si=2, turn_off_cfg_start_si=5)")
    assert [(s.rows, s.merge_at) for s in plan.steps] == [
        ("both", None), ("both", None), *[("both", 3)] * 3, ("cond", None)
    ]  # fmt: skip


def test_heads_give_their_rows_up(tmp_path):
    """Most bytes after any scale, against counting what heads of later scales still see."""
    plan, shape = with_orders(DENSE, ORDERS, 0.4), CacheShape(1, 2, 32, jnp.dtype("float32"))
    tokens = [scale.tokens for scale in SCHEDULE.scales]
    most = max(
        sum(
            tokens[source]
            for layer in range(3)
            for own in plan.steps[scale + 1].segment(layer).attention.sight
            for source in own[:-1]
        )
        for scale in range(5)
    )
    assert cache_bytes(plan, shape) == most * 2 * 32 * 4
    assert cache_bytes(plan, shape) < 0.6 * cache_bytes(DENSE, shape)
    file = tmp_path / "order.json"
    head_orders.write_orders(file, ORDERS, "by chance")
    assert head_orders.read_orders(str(file)) == ORDERS
    file.write_text(file.read_text().replace('"heads": 2', '"heads": 3'))
    with pytest.raises(ValueError, match="an order must list 9 pairs"):
        head_orders.read_orders(str(file))


def test_mass_on_scales_against_plain_softmax():
    q, k = (jax.random.normal(jax.random.key(n), (1, 2, 373, 32)) for n in range(2))
    place = DENSE.place(5)
    ours = mass(q[:, :, :192], k, place)
    weights = jax.nn.softmax(jnp.einsum("htd,hsd->hts", q[0, :, :192], k[0]), -1).mean(1)
    bounds = np.cumsum([0, *(scale.tokens for scale in SCHEDULE.scales)])
    plain = [weights[:, a:b].sum(-1) for a, b in itertools.pairwise(bounds)]
    np.testing.assert_allclose(ours, np.stack(plain, -1), atol=1e-5)


def test_orders_put_the_least_attending_first():
    """Two scales after source 1; pair 1 attends least on average, then 2, then 0."""
    masses = [np.ones((1, 3, n)) for n in (1, 2)]
    masses += [np.full((1, 3, 3), 0.5), np.full((1, 3, 4), 0.5)]
    masses[3][0, :, 3] = 9
    found = orders_from([*masses, np.concatenate([masses[3], masses[3][..., :1]], -1)])
    assert found.sinks == 3
    assert found.orders == ((0, 1, 2),)
    late = np.concatenate([masses[3], masses[3][..., :1]], -1)
    late[0, :, 3] = (0.9, 0.1, 0.5)
    assert orders_from([*masses, late]).orders == ((1, 2, 0),)
