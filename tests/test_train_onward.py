"""Training the demo on: painted and counted things, courses over several calls, whole states."""

import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("optax")

from examples.free_prompts import draw as free_draw
from examples.free_prompts import verdicts
from examples.train_demo import compose, deepen, names, optim, programs, resume, store
from examples.train_demo.captions import (
    LAYERS,
    STYLE_PREFIX,
    STYLE_SUFFIX,
    Picture,
    draw_example,
    empty_recipe,
    stack,
)
from examples.train_demo.course import Budget, Used
from examples.train_demo.forward import teacher_forced
from examples.train_demo.models import SCHEDULE, SIZES, networks
from examples.train_demo.programs import scale_weights
from examples.train_demo.train_transformer import Setting, start_params
from examples.train_demo.variety import PAINTS, Variety, counted, in_colours, paintable, several

FREE = Path(verdicts.__file__).parent


@pytest.mark.parametrize(
    ("name", "plural"),
    [
        ("cat", "cats"),
        ("fire engine", "fire engines"),
        ("bus", "buses"),
        ("lady beetle", "lady beetles"),
        ("strawberry", "strawberries"),
        ("turkey", "turkeys"),
        ("mouse", "mice"),
        ("scissors", None),  # already more than one
        ("bowl with spoon", None),
        ("fish", None),
        ("pool 8 ball", "pool 8 balls"),
    ],
)
def test_plurals_are_those_of_english(name, plural):
    assert several(name) == plural


def test_paint_colours_what_is_coloured_and_leaves_grey():
    red, gray, dark = [0.8, 0.1, 0.1], [0.5, 0.5, 0.5], [0.2, 0.02, 0.02]
    rgb = jnp.asarray([[red, gray, dark]])
    blue = compose.painted(rgb, jnp.asarray([0.1, 0.3, 0.8]))
    assert blue[0, 0, 2] > 2 * blue[0, 0, 0]
    np.testing.assert_allclose(blue[0, 1], gray)
    assert blue[0, 2, 2] > 2 * blue[0, 2, 0]
    assert jnp.max(blue[0, 2]) < jnp.max(blue[0, 0])  # shadows stay shadows
    np.testing.assert_array_equal(compose.painted(rgb, -jnp.ones(3)), rgb)


def test_only_coloured_things_that_do_not_say_their_colour_are_painted():
    sprites = np.zeros((4, 16, 16, 4), np.uint8)
    sprites[..., 3] = 255
    sprites[[0, 1, 3], ..., 0] = 200
    sprites[2] = 128
    named = (
        ("automobile", "transport-ground"),
        ("blue book", "book-paper"),
        ("bell", "household"),
        ("lion", "animal-mammal"),
    )
    pictures = [Picture("noto", str(i), name, (), group) for i, (name, group) in enumerate(named)]
    assert paintable(pictures, sprites).tolist() == [True, False, False, False]


def test_captions_say_the_colours_and_numbers_that_recipes_have():
    rng = np.random.default_rng(0)
    for _ in range(50):
        words, recipe = in_colours(5, Picture("noto", "a", "car"), rng)
        painted = recipe.paint[:, 0] >= 0
        assert painted.sum() == (recipe.sprite == 5).sum() == words.count(" car")
        assert sum(f"{paint} car" in words for paint in PAINTS) == painted.sum()
        words, recipe = counted(7, Picture("noto", "b", "cat"), rng)
        number = int((recipe.sprite == 7).sum())
        assert words.startswith({2: "two cats", 3: "three cats"}[number])
        if "above each other" in words:
            assert recipe.centre[0, 0] < 0.4 < 0.6 < recipe.centre[1, 0]
        assert (recipe.paint == -1).all()


@pytest.mark.parametrize("scenes", [0.0, 1.0])
def test_a_caption_without_a_style_is_of_the_plain_style(scenes):
    pictures = [Picture(style, "a", "cat") for style in STYLE_SUFFIX for _ in range(3)]
    by_style = {s: np.arange(3) + 3 * i for i, s in enumerate(STYLE_SUFFIX)}
    rng, unsaid = np.random.default_rng(3), set()
    for _ in range(300):
        words, recipe = draw_example(pictures, by_style, rng, scenes, "noto")
        style = pictures[recipe.sprite[0]].style
        said = [STYLE_SUFFIX[style].strip(", "), *(p.split(" of ")[0] for p in STYLE_PREFIX[style])]
        if not any(part in words for part in said):
            unsaid.add(style)
    assert unsaid == {"noto"}


def test_a_deepened_transformer_begins_as_its_equal(tmp_path):
    toy = SIZES["toy"]
    more = dataclasses.replace(toy, transformer=dataclasses.replace(toy.transformer, depth=6))
    params = start_params(toy, networks(toy), None)
    params["transformer"] = jax.tree.map(
        lambda leaf: leaf + 0.02 * jax.random.normal(jax.random.key(leaf.size), leaf.shape),
        params["transformer"],
    )
    store.save(tmp_path, "transformer", params)
    text, lengths = jax.random.normal(jax.random.key(1), (2, 5, 128)), jnp.array([5, 3])
    inputs = (jax.random.normal(jax.random.key(2), (2, 2, 2, 16)),)

    def logits(config):
        found = start_params(config, networks(config), tmp_path)["transformer"]
        model = networks(config)["transformer"].assemble(jax.tree.map(jnp.asarray, found))
        drawn = teacher_forced(model, text, lengths, inputs, SCHEDULE)
        return len(model.blocks), np.asarray(drawn, np.float64)

    (few, before), (many, after) = logits(toy), logits(more)
    assert (few, many) == (4, 6)
    # Nothing is added to nothing: other programs, the same numbers but for the order of sums.
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    with pytest.raises(ValueError, match="4 layers can become 4 to 8, not 9"):
        deepen.places(4, 9)


def test_things_go_by_their_other_names_as_often_as_asked():
    pictures = [Picture("noto", "a", "automobile"), Picture("noto", "b", "cat")] * 500
    rng = np.random.default_rng(5)
    said = names.said_otherwise(pictures, 0.25, rng)
    cars = sum(picture.name == "car" for picture in said)
    # Five standard deviations of a draw of 500.
    assert abs(cars - 125) < 5 * (500 * 0.25 * 0.75) ** 0.5
    assert {picture.name for picture in said} == {"automobile", "car", "cat"}
    assert [picture.code_point for picture in said] == [p.code_point for p in pictures]
    assert names.said_otherwise(pictures, 0.0, rng) == pictures


def test_a_name_says_one_thing():
    others = [name for found in names.OTHER_NAMES.values() for name in found]
    assert len(others) == len(set(others))
    assert not set(others) & set(names.OTHER_NAMES)


def test_variety_draws_plain_examples_where_nothing_can_be_varied():
    pictures = [Picture("noto", str(i), "scissors") for i in range(4)]
    drawn = Variety(1.0, np.zeros(4, bool)).draw(
        pictures, {"noto": np.arange(4)}, np.random.default_rng(1), 0.5
    )
    assert "scissors" in drawn[0]


def test_recipes_without_paint_compose_the_drawing_as_it_is():
    sprite = np.zeros((1, 16, 16, 4), np.uint8)
    sprite[..., 0], sprite[..., 3] = 200, 255
    recipe = empty_recipe(np.random.default_rng(0))
    recipe.sprite[0], recipe.size[0] = 0, 1.0
    assert recipe.paint.shape == (LAYERS, 3)
    picture = compose.compose(jnp.asarray(sprite), stack([recipe]))
    # The middle of a picture that is filled: bilinear resizing at scale one changes nothing.
    np.testing.assert_allclose(picture[0, 8, 8], np.array([200, 0, 0]) / 127.5 - 1, atol=1e-5)


def test_the_last_three_of_all_scales_get_their_weight():
    plain, heavy = scale_weights(13), scale_weights(13, 2.0)
    np.testing.assert_allclose(heavy[10:] / heavy[0], 2 * plain[10:] / plain[0], rtol=1e-6)
    np.testing.assert_allclose(heavy[9] / heavy[0], plain[9] / plain[0], rtol=1e-6)
    for scales in (7, 10):
        np.testing.assert_array_equal(scale_weights(scales, 2.0), scale_weights(scales))


def test_a_course_goes_over_calls_and_its_rate_falls_to_nothing():
    began, setting = time.time(), Setting(peak=1.0, constant=0.5, final=0.0, text_until=0.5)
    first = Budget(began + 60, course_steps=100)
    assert first.fraction(began, 25) == 0.25
    second = Budget(began + 60, course_steps=100, used=first.after(3.0, 40))
    assert second.used == Used(3.0, 40)
    assert second.fraction(began, 35) == 0.75
    assert not second.over(began, 59)
    assert second.over(began, 60)
    np.testing.assert_allclose(setting.rates(second.fraction(began, 35), 75), [0.5, 0.0])
    np.testing.assert_allclose(setting.rates(0.25, 75), [1.0, 1.0])
    assert setting.rates(second.fraction(began, 60), 100).tolist() == [0.0, 0.0]
    timed = Budget(began + 60, course_seconds=10.0, used=Used(9.0, 5))
    assert timed.fraction(began, 0) == pytest.approx(0.9, abs=0.05)
    assert Budget(began - 1, course_seconds=10.0).over(began, 0)


def small_state():
    rng = np.random.default_rng(4)
    params = {
        "text": {"blocks": {0: {"kernel": rng.normal(size=(4, 8)).astype(np.float32)}}},
        "transformer": {"blocks": {0: {"kernel": rng.normal(size=(4, 8)).astype(np.float32)}}},
    }
    packing = optim.Packing(params, muon=True, apart=programs.TEXT)
    optimizer = optim.make_optimizer()
    state = optim.start(packing.pack(params), optimizer)
    return params, packing, optimizer, state


def test_a_held_part_does_not_move_and_averages_look_back_so_far():
    _, _, optimizer, state = small_state()
    before, after = state, state
    for _ in range(6):
        grads = {name: jnp.ones_like(value) for name, value in after.params.items()}
        after = optim.apply(
            after, grads, jnp.float32(1e-2), optimizer, apart=("text", jnp.float32(0)), memory=2
        )
    np.testing.assert_array_equal(after.params["adam.4x8.text"], before.params["adam.4x8.text"])
    np.testing.assert_array_equal(after.average["adam.4x8.text"], before.params["adam.4x8.text"])
    moved = np.abs(after.params["muon.4x8"] - before.params["muon.4x8"]).max()
    behind = np.abs(after.params["muon.4x8"] - after.average["muon.4x8"]).max()
    assert 0 < behind < moved / 2


def test_a_training_that_stops_and_goes_on_gives_what_one_without_a_stop_gives(tmp_path):
    params, packing, optimizer, state = small_state()
    update = jax.jit(
        lambda s, g: optim.apply(
            s, g, jnp.float32(1e-2), optimizer, apart=("text", jnp.float32(1e-2)), memory=10
        )
    )
    rng = np.random.default_rng(5)
    grads = [
        jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), state.params)
        for _ in range(4)
    ]
    whole = state
    for grad in grads:
        whole = update(whole, grad)
    like = optim.abstract_state(params, packing, optimizer)
    assert resume.load(tmp_path, like) is None
    for grad in grads[:2]:
        state = update(state, grad)
    resume.save(tmp_path, state, Used(1.5, 2))
    found = resume.load(tmp_path, like)
    assert found is not None
    state, used = found
    assert used == Used(1.5, 2)
    for grad in grads[2:]:
        state = update(state, grad)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    other = {"text": params["text"], "transformer": {"w": np.zeros((3, 3), np.float32)}}
    other_packing = optim.Packing(other, muon=True, apart=programs.TEXT)
    with pytest.raises(ValueError, match="another training"):
        resume.load(tmp_path, optim.abstract_state(other, other_packing, optimizer))


def test_free_prompts_are_of_no_other_list():
    both = [entry["prompt"] for name in verdicts.LISTS for entry in verdicts.prompts_of(name)]
    assert len(set(both)) == len(both) == 128
    lists = json.loads((FREE.parent / "train_demo" / "prompts.json").read_text())
    assert not set(both) & {entry["prompt"] for part in lists.values() for entry in part}


def test_the_page_of_both_looks_is_what_was_seen():
    for which in ("", "again-"):
        looks = {name: verdicts.read(FREE / f"{which}{name}.json") for name in ("before", "after")}
        assert verdicts.page(looks) == (FREE / f"{which}after.md").read_text()


def test_verdicts_are_counted_and_gaps_refused(tmp_path):
    entries = verdicts.prompts_of("prompts")
    about = {"model": "demo", "plan": "dense", "device": "x", "date": "d", "commit": "c"}
    judged = [{**entry, "verdict": "right", "seen": ""} for entry in entries]
    judged[0] |= {"verdict": "wrong", "seen": "a blob"}
    file = tmp_path / "looked.json"
    file.write_text(json.dumps({**about, "verdicts": judged}))
    look = verdicts.read(file)
    assert verdicts.counts(look)["all"] == {"right": 63, "wrong": 1}
    page = verdicts.page({"before": look, "after": look})
    assert "| all | 63 / 0 / 1 | 63 / 0 / 1 |" in page
    assert "| 1 | a cat | wrong: a blob | wrong: a blob |" in page
    judged[5]["verdict"] = ""
    file.write_text(json.dumps({**about, "verdicts": judged}))
    with pytest.raises(ValueError, match=r"\[6\] have none"):
        verdicts.read(file)
    file.write_text(json.dumps({**about, "verdicts": judged[1:]}))
    with pytest.raises(ValueError, match="other prompts"):
        verdicts.read(file)
    file.write_text(json.dumps({**about, "prompts": "again", "verdicts": judged}))
    with pytest.raises(ValueError, match=r"other prompts than those of again\.json"):
        verdicts.read(file)
    file.write_text(json.dumps({**about, "prompts": "../x", "verdicts": judged}))
    with pytest.raises(ValueError, match="must be one of"):
        verdicts.read(file)


def test_sheets_say_the_prompt_below_each_picture():
    pictures = [np.full((64, 64, 3), 255, np.uint8)] * 5
    sheet = free_draw.captioned_sheet(pictures, ["1  a cat"] * 4 + [""])
    pixels = np.asarray(sheet)
    row = 64 + free_draw.LINES * free_draw.LINE + free_draw.MARGIN
    assert pixels.shape == (2 * row, 4 * (64 + free_draw.MARGIN), 3)
    assert (pixels[64:row] < 128).any()
    assert not (pixels[row:] < 128).any()
