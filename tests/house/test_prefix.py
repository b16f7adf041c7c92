"""A family whose text stands before the grids in the cache: rows, plans, attention, generation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from sparvar_jax.models import sampling
from sparvar_jax.models.infinity import Condition, Infinity, InfinityConfig
from sparvar_jax.models.stream import Stream
from sparvar_jax.plans.attend import Attend
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.plans.rows import Slot
from sparvar_jax.plans.schedule import ASPECT_TABLES, Scale, ScaleSchedule
from sparvar_jax.plans.strategy import Place
from sparvar_jax.policies import adaptive, columns, cs4a, indices, parse_plan
from sparvar_jax.policies.adaptive import MASS, AdaptiveDecision, AdaptiveSparse
from sparvar_jax.policies.columns import Reuse, Selection
from sparvar_jax.policies.cs4a import COLUMNS, DIFFERENCE, Cs4aDecision, Cs4aSparse
from sparvar_jax.policies.csla import Csla
from sparvar_jax.runtime import generate
from tests.house.support import lively
from tests.policies.support import attend, cache, oracle

LITTLE = ScaleSchedule.of(((1, 1), (2, 2), (3, 4)), prefix=5)
GRIDS = ((1, 1), (2, 2), (3, 3), (5, 4), (8, 6), (10, 8), (13, 11))
MIDDLE = ScaleSchedule.of(GRIDS, prefix=13)
LONG = ScaleSchedule.of(ASPECT_TABLES[1.0], prefix=300)
CONFIG = InfinityConfig(2, 64, 2, text_width=128, bits=8, dtype="float32")
# float32 attention with scores of a few units: tens of roundings of 2^-24.
CLOSE = {"atol": 1e-5, "rtol": 0}


def test_rows_of_both_layouts_by_hand():
    packed, aligned = LITTLE.layout("packed"), LITTLE.layout("aligned")
    assert [packed.rows(index) for index in range(4)] == [
        slice(0, 5), slice(5, 6), slice(6, 10), slice(10, 22)
    ]  # fmt: skip
    assert packed.physical(3).tolist() == list(range(22))
    assert [aligned.rows(index) for index in range(4)] == [
        slice(0, 5), slice(8, 16), slice(16, 32), slice(32, 56)
    ]  # fmt: skip
    where = [0, 1, 2, 3, 4, 8, 16, 17, 24, 25, 32, 33, 34, 35, 40, 41, 42, 43, 48, 49, 50, 51]
    assert aligned.physical(3).tolist() == where
    assert aligned.gaps(2) == ((5, 8), (9, 16), (18, 24), (26, 32))
    assert (packed.total, aligned.total) == (128, 128)
    assert packed.spans[0].shape is aligned.spans[0].shape is None
    assert LONG.scales[1] == Scale(1, 1, 1, 300)


@pytest.mark.parametrize(
    "text",
    [
        "dense", "sparvar-paper", "sparvar-fast", "adaptive", "csla(form='boxes', exact=True)",
        "cs4a", "cs4a(mapping='relative')", "cs4a(mapping='scale')",
        "cs4a(mapping='scale', granularity=8)", "skip_last_scales(2) + drop_uncond(3)",
    ],
)  # fmt: skip
def test_every_policy_plans_over_a_prefix(text):
    plan = parse_plan(text, LONG, 4)
    first = plan.describe().splitlines()[1].split()
    assert first[:3] == ["0", "prefix", "both"]
    assert first[-3:] == ["300", "300", "1.000"]
    assert 0 < plan.density() <= 1
    assert plan.steps[-1].scale.end <= 300 + sum(h * w for h, w in ASPECT_TABLES[1.0])


@pytest.mark.parametrize("policy", [adaptive(first_scale=0), cs4a(0)])
def test_nothing_is_decided_at_the_prefix(policy):
    with pytest.raises(ValueError, match=r"scale 0 is a prefix of text.* scales 1\.\.6"):
        policy(dense_plan(MIDDLE, 2))


def test_columns_move_behind_the_text():
    """Three words stay; 4 keys behind them go to 12: by 12 / 4 from the third on."""
    assert indices.scale_map(7, 15, 3).tolist() == [0, 1, 2, 3, 6, 9, 12]


def windows_rule(place: Place, windows, sinks: int) -> np.ndarray:
    """CSLA's token rule, token by token: the prefix is visible whatever its window says."""
    scale, mask = place.scale, np.zeros((place.scale.tokens, place.scale.end), bool)
    for query in range(scale.tokens):
        at = np.float32(divmod(query, scale.width)) / np.float32([scale.height, scale.width])
        for key in place.schedule.scales[: place.index + 1]:
            cy, cx = (round(float(c)) for c in at * np.float32([key.height, key.width]))
            for token in range(key.tokens):
                ky, kx = divmod(token, key.width)
                near = max(abs(ky - cy), abs(kx - cx)) <= windows[key.index] // 2
                mask[query, key.offset + token] = near or key.index < max(sinks, 1)
    return mask


@pytest.mark.parametrize("sinks", [0, 3])
def test_windows_see_the_prefix(sinks):
    windows = (-1, -1, -1, -1, 1, 3, 5, 7)
    mask = windows_rule(Place(MIDDLE, "packed", 7), windows, sinks)
    exact = oracle(*cache(Place(MIDDLE, "packed", 7)), mask)
    for layout in ("packed", "aligned"):
        place = Place(MIDDLE, layout, 7)
        boxes = Csla(windows, sinks, "boxes", exact=True)
        assert boxes.pairs(place) == mask.sum()
        np.testing.assert_allclose(attend(boxes, *cache(place), place, {})[0], exact, **CLOSE)
        assert 0 in boxes.scales(place)
    blocks, place = Csla(windows, sinks, block=64), Place(MIDDLE, "packed", 7)
    kept = np.zeros_like(mask)
    for tile in np.ndindex(*(-(-side // 64) for side in mask.shape)):
        where = tuple(slice(64 * at, 64 * at + 64) for at in tile)
        kept[where] = mask[where].any()
    expected = oracle(*cache(place), kept)
    np.testing.assert_allclose(attend(blocks, *cache(place), place, {})[0], expected, **CLOSE)


@pytest.mark.parametrize(("layout", "sinks"), [("packed", 2), ("aligned", 0)])
def test_chosen_blocks_hold_the_prefix(layout, sinks):
    place, later = Place(MIDDLE, layout, 5), Place(MIDDLE, layout, 7)
    state = attend(AdaptiveDecision(64), *cache(place), place, {})[1]
    strategy = AdaptiveSparse(5, 0.5, 0.6, 0.0, 64, sinks)
    table = jax.jit(lambda mass: strategy.table(mass, later))(state[MASS])
    counts = np.asarray(table.counts)
    mask = np.zeros((1, 2, later.scale.tokens, later.kv_length), bool)
    for row, head, query in np.ndindex(counts.shape):
        for key in np.asarray(table.indices)[row, head, query, : counts[row, head, query]]:
            mask[row, head, query * 128 : query * 128 + 128, key * 64 : key * 64 + 64] = True
    mask = mask[..., later.rows.physical(later.index)]
    assert mask[..., :13].all()
    assert not mask.all()
    out = attend(strategy, *cache(later, seed=2), later, state)[0]
    flat = cache(Place(MIDDLE, "packed", 7), seed=2)
    np.testing.assert_allclose(out, oracle(*flat, mask), **CLOSE)


@pytest.mark.parametrize(
    ("mapping", "granularity", "layout"),
    [
        ("keep", 1, "packed"), ("keep", 8, "packed"), ("keep", 8, "aligned"),
        ("scale", 1, "aligned"), ("scale", 8, "packed"),
        ("relative", 1, "packed"), ("relative", 8, "aligned"),
    ],
)  # fmt: skip
def test_chosen_columns_hold_the_prefix(mapping, granularity, layout):
    selection = Selection(0.2, 24, 8, granularity, ranked=mapping == "relative")
    place, later = Place(MIDDLE, layout, 5), Place(MIDDLE, layout, 7)
    state = attend(Cs4aDecision(selection), *cache(place), place, {})[1]
    flat = cache(Place(MIDDLE, "packed", 5))
    at_decision = jax.jit(lambda chosen: columns.at_decision(chosen, selection, place))
    mask = lists_mask(*at_decision(state[COLUMNS]), selection, place)
    missed = oracle(*flat, np.ones(mask.shape[-2:], bool)) - oracle(*flat, mask)
    np.testing.assert_allclose(state[DIFFERENCE], missed, **CLOSE)
    strategy = Cs4aSparse(Reuse(5, selection, (3, 5), mapping, sinks=0))
    lists, kept = jax.jit(
        lambda state: (
            columns.at_later_scale(state[COLUMNS], strategy.reuse, later),
            strategy.kept(state, later),
        )
    )(state)
    mask = lists_mask(*lists, selection, later)
    assert mask.sum((-1, -2)).mean() == pytest.approx(float(kept))
    assert mask.sum((-1, -2)).max() <= strategy.pairs(later) < later.dense_pairs
    out = attend(strategy, *cache(later, seed=1), later, state)[0]
    expected = oracle(*cache(Place(MIDDLE, "packed", 7), seed=1), mask)
    expected += columns.upsample(state[DIFFERENCE], MIDDLE.sizes[5], MIDDLE.sizes[7])
    np.testing.assert_allclose(out, expected, **CLOSE)


def lists_mask(lists, counts, selection: Selection, place: Place) -> np.ndarray:
    """[R, H, T, tokens] mask of lists of cache rows; they name none twice and all of the text."""
    lists, size = np.asarray(lists), selection.granularity
    counts = np.broadcast_to(np.asarray(counts), lists.shape[:3])
    mask = np.zeros((*lists.shape[:2], place.scale.tokens, place.kv_length), bool)
    for row, head, group in np.ndindex(counts.shape):
        units = lists[row, head, group, : counts[row, head, group]]
        assert len(set(units.tolist())) == len(units)
        rows = (units[:, None] * size + np.arange(size)).reshape(-1)
        rows = rows[rows < place.kv_length]
        queries = slice(group * selection.group, (group + 1) * selection.group)
        mask[row, head, queries, rows] = True
    mask = mask[..., place.rows.physical(place.index)]
    assert mask[..., :13].all()
    return mask


class Prefixed(NamedTuple):
    """An Infinity condition, and the words that stand before the grids."""

    plain: Condition
    words: Float[Array, "R P C"]


class TextFirst(Infinity):
    """Scale 0 is the text, attending to all of itself; its last word draws the 1x1 map."""

    def embed_condition(self, text, lengths, guidance=None):
        plain = super().embed_condition(text, lengths, guidance)
        other = jnp.broadcast_to(self.uncond_text[...][: text.shape[1]], text.shape)
        words = text if guidance is None else jnp.concatenate([text, other])
        return Prefixed(plain, self.text_proj(words))

    def embed_codes(self, codes, condition):
        if codes is None:
            return condition.words
        return super().embed_codes(codes, condition.plain)

    def positions(self, condition, place):
        if place.scale.grid:
            return super().positions(condition.plain, place)
        angles = np.outer(np.arange(place.scale.tokens), 0.5 ** np.arange(self.config.head_dim / 2))
        sin = np.stack([-np.sin(angles), np.sin(angles)], -1).reshape(len(angles), -1)
        return jnp.float32(np.repeat(np.cos(angles), 2, 1)), jnp.float32(sin)

    def block_inputs(self, layer, condition):
        return super().block_inputs(layer, condition.plain)

    def finish(self, x, condition, place, draw):
        x = x if place.scale.grid else x[:, -1:]
        return super().finish(x, condition.plain, place, draw)

    def accumulate(self, drawn, code_sum, scale, following, codebook):
        scale = scale if scale.grid else Scale(0, 1, 1, 0)
        return super().accumulate(drawn, code_sum, scale, following, codebook)


@functools.partial(jax.jit, static_argnames="schedule")
def one_pass(model, condition, codes, schedule) -> Float[Array, "R T logits"]:
    """Raw logits of the last scale: every token at once, a mask in place of a cache."""
    places = [Place(schedule, "packed", index) for index in range(len(schedule))]
    entering = zip((None, *codes), places, strict=True)
    x = jnp.concatenate(
        [model.add_level(model.embed_codes(c, condition), place) for c, place in entering], 1
    )
    tables = [model.positions(condition, place) for place in places]
    positions = tuple(jnp.concatenate(parts) for parts in zip(*tables, strict=True))
    owner = np.repeat(np.arange(len(schedule)), [scale.tokens for scale in schedule.scales])
    seen = owner[:, None] >= owner

    def attention(write):
        empty = jnp.zeros((len(x), CONFIG.heads, x.shape[1], CONFIG.head_dim))
        q, k, v = write(empty, empty, Slot(0, x.shape[1], x.shape[1]))
        scores = jnp.einsum("rhtd,rhsd->rhts", q, k, precision="highest")
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
        return jnp.einsum("rhts,rhsd->rhtd", weights, v, precision="highest")

    for layer, block in enumerate(model.blocks):
        inputs = model.block_inputs(layer, condition)
        x = block(Stream(x), inputs, positions, Attend(attention), CONFIG).settled()
    return model.head_logits(x[:, -schedule.scales[-1].tokens :], condition.plain)


@pytest.fixture(scope="module")
def drawn():
    """(model, condition, schedule, input codes, outputs) of a picture drawn after its text."""
    schedule = ScaleSchedule.of(((1, 1), (2, 2), (4, 6)), prefix=300)
    generator = generate.Generator(lively(TextFirst, CONFIG))
    text = jax.random.normal(jax.random.key(1), (2, 300, 128))
    embed = jax.jit(lambda model, *text: model.embed_condition(*text, "learned"))
    condition = embed(generator.model, text, jnp.array([300, 300]))
    controls = generate.controls(len(schedule), guidance=2.0, temperature=1.0)
    codes, outputs = [], []
    plan, keys = dense_plan(schedule, 2, layout="aligned"), sampling.image_keys(0, 2)
    for state, output in generator.steps(plan, condition, controls, keys, capture=True):
        codes.append(None if state.codes is None else np.asarray(state.codes))
        outputs.append(output)
    return generator.model, condition, schedule, codes[:-1], outputs


def test_a_picture_drawn_after_its_text(drawn):
    """Two blocks of about ten sums of at most 256 products: 20 * sqrt(256) roundings of 2^-24."""
    model, condition, schedule, codes, outputs = drawn
    assert [output.tokens.shape[1] for output in outputs] == [1, 1, 4, 24]
    raw = np.asarray(outputs[-1].captured["raw_logits"])
    again = one_pass(model, condition, codes, schedule)
    assert np.abs(raw).max() > 0.5
    np.testing.assert_allclose(raw, again, atol=20 * 16 * 2**-24 * np.abs(raw).max(), rtol=0)


def test_the_text_matters_to_the_last_scale(drawn):
    """The words reach a picture through the cache alone: others give other logits."""
    model, condition, schedule, codes, _ = drawn
    other = condition._replace(words=condition.words[::-1])
    drawn_from, drawn_without = (one_pass(model, c, codes, schedule) for c in (condition, other))
    assert np.abs(drawn_from - drawn_without).max() > 0.01
