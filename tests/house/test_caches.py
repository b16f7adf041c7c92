"""The caches a user can ask for: the lean one draws the same bits, the one of 8 bits nearly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparvar_jax.models.infinity import Infinity
from sparvar_jax.models.infinity_parts import InfinityConfig
from sparvar_jax.pipelines.memory import cache_bytes
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.plans.caches import CACHES, with_cache
from sparvar_jax.plans.eight_bits import BLOCK, EightBits, dense, quantise
from sparvar_jax.plans.lean import Lean, Run, layout, runs_of
from sparvar_jax.plans.plan import dense_plan, map_attention, with_store
from sparvar_jax.plans.route import Route
from sparvar_jax.plans.rows import row_map
from sparvar_jax.plans.schedule import infinity_schedule
from sparvar_jax.plans.stores import CacheShape
from sparvar_jax.plans.strategy import Dense
from sparvar_jax.policies import drop_uncond, parse_plan, skip_last_scales
from sparvar_jax.policies.registry import PRESETS
from sparvar_jax.policies.scalekv import scalekv
from sparvar_jax.runtime.generate import Generator
from sparvar_jax.runtime.step import step_spec
from sparvar_jax.runtime.steps import Steps
from tests import tiny_hart
from tests.house import support
from tests.house.support import DENSE, SHAPE, draw, held_bytes, same
from tests.house.test_token_rule import strongest

SIZES = ((1, 1), (2, 2), (4, 5), (8, 10))


def named(text):
    """A change of plans by the text of a policy."""
    return lambda plan: parse_plan(text, plan.schedule, plan.depth)


@dataclasses.dataclass(frozen=True)
class SkipsTwo(Dense):
    """Dense attention that leaves out scale 2 at later scales: its rows count as gaps."""

    name = "skips two"

    def scales(self, place):
        return frozenset(range(place.index + 1)) - ({2} if place.index > 2 else set())

    def __call__(self, view, q, place, state):
        if place.index <= 2:
            return super().__call__(view, q, place, state)
        hidden = place.rows.rows(2)
        k, v = (jnp.delete(x, np.r_[hidden], axis=2) for x in view)
        length = place.kv_length - place.rows.spans[2].rows
        rows = dataclasses.replace(place.rows, spans=(dataclasses.replace(
            place.rows.spans[place.index], start=0, rows=length, shape=None, pitch=length),),
            total=length)  # fmt: skip
        return super().__call__(
            type(view)(k, v), q, dataclasses.replace(place, index=0, rows=rows), state
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan,
        skip_last_scales(1),
        drop_uncond(1),
        lambda plan: strongest(plan, layers=(0, 1), first=2),
        lambda plan: map_attention(plan, lambda step, layer: SkipsTwo()),
        named("fastvar(((-1, 0.5),), -2, 0, layers=(0, 2))"),
        named("prune(0.5, layers=(1, 2)) + drop_uncond(0, ((-2, 1), (-1, 1)))"),
        pytest.param(named("share_rows(1)"), marks=pytest.mark.slow),
        pytest.param(named("csla(first_scale=-1)"), marks=pytest.mark.slow),
    ],
    ids=["dense", "skip", "cond", "rule", "hole", "branches", "patches", "share", "windows"],
)
def test_a_lean_cache_draws_the_same_bits(generator, change):
    full = change(DENSE)
    lean = with_cache(full, "lean")
    same(draw(generator, lean), draw(generator, full))
    assert held_bytes(generator.start(lean, support.BATCH)) == cache_bytes(lean, SHAPE)


@dataclasses.dataclass(frozen=True)
class Always:
    """Chooses one plan, whatever it sees."""

    chosen: int

    name = "always"

    def features(self, before, now, schedule, decode):
        return decode(now)

    def choose(self, features):
        return [self.chosen] * len(features)


@pytest.mark.parametrize(
    ("chosen", "cache"),
    [
        (1, "lean"),
        *(pytest.param(n, c, marks=pytest.mark.slow) for n, c in ((0, "lean"), (1, "int8"))),
    ],
)
def test_plans_of_a_route_share_one_cache(generator, chosen, cache):
    """The bolder plan keeps what the careful one reads: one scale more than it reads itself."""
    plans = DENSE, skip_last_scales(1)(DENSE)
    route = dataclasses.replace(DENSE, route=Route(1, Always(chosen), plans))
    both = with_cache(route, cache)
    kept = {(other.store(layer).kept, other.store(layer).last)
            for other in both.route.plans for layer in range(2)}  # fmt: skip
    assert kept == {((0, 1, 2), 3)}
    own = Generator(generator.model, decode=lambda x: x.mean((1, 2)))
    same(draw(own, both), draw(generator, with_cache(plans[chosen], cache)))


@pytest.mark.parametrize(
    ("smooth", "plan"),
    [
        (False, "dense"),
        pytest.param(False, "skip_last_scales(1)", marks=pytest.mark.slow),
        pytest.param(True, "dense", marks=pytest.mark.slow),
    ],
)
def test_a_lean_cache_behind_a_prefix_of_text(smooth, plan):
    """HART: the text is a scale of its own, and what a later scale reads begins with it.

    Mixtures of codes are compared as users compile: left unoptimised, two programs round their
    last sums apart.
    """
    quick = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", quick and not smooth)
    pipe = tiny_hart.tiny_pipe()
    pipe = Pipeline(pipe.model) if smooth else pipe
    request = pipe.request(["a red apple", "the blue owl"], plan=plan, smooth=smooth)
    lean = dataclasses.replace(request, plan=with_cache(request.plan, "lean"))
    assert lean.plan.store(0).kept == tuple(range(len(lean.plan.steps) - 1))
    pictures = []
    for asked in (lean, request):
        *_, last = steps = list(pipe.steps(asked))
        pictures.append((last[0].code_sum, [output for _, output in steps]))
    jax.config.update("jax_disable_most_optimizations", quick)
    same(*pictures)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PRESETS, "router()", "adaptive"])
def test_every_preset_draws_the_same_picture_of_the_demo(name):
    """The demo model in float32, through the pipeline, with its largest schedule."""
    full, lean = (Pipeline.from_checkpoint(dtype="float32", cache=c) for c in ("full", "lean"))
    pictures = [pipe("a red circle", plan=name, seed=3) for pipe in (full, lean)]
    np.testing.assert_array_equal(*pictures)


def test_what_is_kept_of_a_large_picture():
    """1024x1024: 6,425 of 10,521 rows are read later, in multiples of 128: 6,528 and 10,624.

    Forty layers keep these once, and share one scratch of all rows.
    """
    schedule, shape = infinity_schedule(1.0, "1M"), CacheShape(2, 28, 128, jnp.dtype("bfloat16"))
    row = 2 * 2 * 28 * 128 * 2  # keys and values, conditional or not, in 16 bits
    dense = dense_plan(schedule, 40)
    assert cache_bytes(dense, shape) == 40 * 10624 * row
    assert cache_bytes(with_cache(dense, "lean"), shape) == (40 * 6528 + 10624) * row
    blocks = sum(-(-scale.tokens // BLOCK) for scale in schedule.scales[:12])
    eight = 40 * 4 * 28 * 128 * (6528 + 4 * blocks) + 10624 * row
    assert cache_bytes(with_cache(dense, "int8"), shape) == eight
    # Without the last scale 4,121 rows are read later, and 6,425 written.
    short = with_cache(skip_last_scales(1)(dense), "lean")
    assert cache_bytes(short, shape) == (40 * 4224 + 6528) * row


def test_plans_that_read_the_same_scales_share_steps():
    schedule = infinity_schedule(1.0, "1M")
    dense, sparse = (
        with_cache(parse_plan(text, schedule, 4), "lean") for text in ("dense", "sparvar-paper")
    )
    assert {dense.store(layer) for layer in range(4)} == {Lean(tuple(range(12)), 12)}
    assert step_spec(dense, 5) == step_spec(sparse, 5)


def test_rows_that_lie_alike_move_together():
    packed, aligned = row_map(SIZES, "packed"), row_map(SIZES, "aligned")
    assert runs_of(packed, (0, 1, 2)) == (Run(0, 0, 25),)
    assert runs_of(packed, (0, 1, 3)) == (Run(0, 0, 5), Run(5, 25, 80))
    # Aligned scales begin at 0, 8, 24 and 56 and hold 8, 16, 32 and 128 rows.
    assert layout(aligned, (1, 2)).starts == (0, 16)
    assert runs_of(aligned, (0, 1, 3)) == (Run(0, 0, 24), Run(24, 56, 128))


def test_eight_bits_are_off_by_half_a_level_at_most():
    """A level is 1/127 of the largest magnitude among those that share a scale."""
    rows = np.random.default_rng(0).standard_normal((2, 3, BLOCK + 7, 16)).astype(np.float32)
    rows[0, 1] = 0
    peaks = {
        "token": np.abs(rows).max(-1, keepdims=True),
        "channel": np.concatenate([
            np.broadcast_to(np.abs(part).max(2, keepdims=True), part.shape)
            for part in (rows[:, :, :BLOCK], rows[:, :, BLOCK:])
        ], 2),
    }  # fmt: skip
    of = {"token": np.arange(BLOCK + 7), "channel": np.arange(BLOCK + 7) // BLOCK}
    for form, peak in peaks.items():
        held = quantise(jnp.asarray(rows), form)
        assert held.values.dtype == jnp.int8
        error = np.abs(np.asarray(dense(held, of[form])) - rows)
        # Half a level, and the roundings of a quotient and a product of up to 127 levels.
        assert (error <= peak / 127 * (0.5 + 127 * 2**-23)).all()
        assert error.max() > 0.4 * peak.max() / 127


@pytest.mark.parametrize("forms", [("token", "token"), ("channel", "channel")])
def test_a_cache_of_eight_bits_is_near(generator, plain, forms):
    """Keys are unit vectors: a logit of at most 4 moves by at most 4 * sqrt(32) / 254 = 0.09.

    The first scale reads nothing rounded and is the same bit for bit.
    """
    plan = with_store(DENSE, EightBits(keys=forms[0], values=forms[1]))
    forced = tuple(output.tokens for output in plain[1])
    _, outputs = draw(generator, plan, capture=True, forced=forced)
    errors = [
        float(jnp.abs(ours.captured["raw_logits"] - theirs.captured["raw_logits"]).max())
        for ours, theirs in zip(outputs, plain[1], strict=True)
    ]
    assert errors[0] == 0
    assert 0 < max(errors) < 0.09


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match="cache must be lean or int8 or full, got 'int4'"):
        with_cache(DENSE, "int4")


def test_a_store_of_ones_own_stays():
    own = with_store(DENSE, EightBits(), layers=(0, 1))
    both = with_cache(own, "lean")
    assert [type(both.store(layer)) for layer in range(2)] == [EightBits, Lean]
    budget = scalekv(keep=0.5)(DENSE)
    assert with_cache(budget, "lean") == budget
    with pytest.raises(ValueError, match=r"layers 0\.\.2 .* own store \(scalekv\).* not in 8 bits"):
        with_cache(budget, "int8")
    assert set(CACHES) == {"lean", "int8", "full"}


@pytest.mark.gpu
def test_what_a_scale_leaves_is_read_off_before_the_scratch_is_written_over():
    """A copy of the scratch a layer, which XLA makes where anything of it may be read later."""

    def room(depth):
        config = dataclasses.replace(
            InfinityConfig.preset("infinity_2b"),
            depth=depth, chunks=1, width=128, heads=1, text_width=128, text_max_length=8,
            dtype="bfloat16",
        )  # fmt: skip
        model = nnx.eval_shape(lambda: Infinity(config, rngs=nnx.Rngs(0)))
        guidance = (True,) * len(schedule)
        plan = with_cache(parse_plan("sparvar-paper", schedule, depth, guidance=guidance), "int8")
        text = jnp.zeros((1, 8, 128)), jnp.ones((1,), jnp.int32)
        condition = jax.eval_shape(
            lambda model, *text: model.embed_condition(*text, "learned"), model, *text
        )
        programs = Steps((model, None)).compile(plan, condition, 1)
        return np.array([p.memory_analysis().temp_size_in_bytes for p in programs])

    schedule = infinity_schedule(1.0, "1M")
    scratch = 2 * 2 * schedule.tokens * 128 * 2  # keys and values of a guided picture's head
    assert (room(6) - room(2)).max() < scratch
