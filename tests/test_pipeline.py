"""The pipeline on a tiny random model: seeds, batches, streaming, negative prompts, refusals."""

import dataclasses
import itertools

import numpy as np
import pytest

from sparvar_jax.pipelines import loading
from sparvar_jax.pipelines.numbers import parse_ratio
from sparvar_jax.pipelines.pipeline import Pipeline, TextEncoder
from sparvar_jax.pipelines.requests import picture_size, resolve_schedule
from sparvar_jax.policies import parse_plan
from sparvar_jax.weights import checkpoint
from tests.tiny_model import DEFAULTS, TEXT, write_tiny_model
from tests.tiny_var import tiny_pipe

PROMPTS = ["a red apple", "a blue owl wearing a green triangle on the photograph of the circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("pipeline") / "model")


@pytest.fixture(scope="module")
def pipe(folder):
    return Pipeline.from_checkpoint(folder)


@pytest.fixture(scope="module")
def pair(pipe):
    return pipe(PROMPTS, seed=5)


def test_pictures_are_rgb_bytes_of_the_size_the_schedule_says(pipe, pair):
    assert pair.shape == (2, 32, 32, 3)
    assert pair.dtype == np.uint8
    assert picture_size(pipe.model, resolve_schedule(pipe.model)) == (32, 32)
    assert picture_size(pipe.model, resolve_schedule(pipe.model, "2:1", "1M")) == (90, 180)
    assert pair[0].std() > 1


def test_a_picture_depends_on_its_prompt_and_seed_alone(pipe, pair):
    np.testing.assert_array_equal(pipe(["the circle", PROMPTS[1]], seed=5)[1], pair[1])
    np.testing.assert_array_equal(pipe(PROMPTS[1], seed=6)[0], pair[1])
    assert (pipe(PROMPTS[::-1], seed=4)[0] != pair[1]).any()


def test_streamed_pictures_end_in_the_drawn_ones(pipe, pair):
    frames = list(pipe.stream(PROMPTS, seed=5))
    assert len(frames) == 4
    np.testing.assert_array_equal(frames[-1], pair)
    assert all((a != b).any() for a, b in itertools.pairwise(frames))


def test_guidance_negative_prompts_and_temperature_change_the_picture(pipe):
    short = {"plan": "skip_last_scales(4)", "seed": 5}
    base = pipe(PROMPTS[0], **short)
    assert base.shape == (1, 32, 32, 3)
    assert (pipe(PROMPTS[0], guidance=4.0, **short) != base).any()
    assert (pipe(PROMPTS[0], temperature=2.0, **short) != base).any()
    assert (pipe(PROMPTS[0], negative="a green circle", **short) != base).any()
    unguided = pipe(PROMPTS[0], guidance=1.0, **short)
    assert (unguided != base).any()
    # Guidance 1 in every scale but the last, which is not drawn: rows stay, the picture does not.
    partly = pipe(PROMPTS[0], guidance=[1.0] * 6 + [2.0], **short)
    np.testing.assert_array_equal(partly, unguided)


def test_text_features_computed_before_give_the_same_pictures(folder, pair):
    encoder = TextEncoder.from_checkpoint(folder)
    text = encoder(PROMPTS)
    without = Pipeline.from_checkpoint(folder, text_encoder=False)
    np.testing.assert_array_equal(without(text, seed=5), pair)
    for refused in (lambda: without(PROMPTS), lambda: without(text, negative="an owl")):
        with pytest.raises(ValueError, match="no text encoder"):
            refused()
    with pytest.raises(ValueError, match="1 negative prompts for 2 prompts"):
        without(text, negative=encoder(["an owl"]))


def test_warming_up_compiles_all_that_a_call_runs(folder, pipe):
    abstract = Pipeline(loading.describe_model(folder, "float32"))
    for one in (abstract, Pipeline(pipe.model)):
        one.warm_up(["an owl"], plan="skip_last_scales(5)", negative="a circle")
        assert len(one.generator._steps._jobs) == 2
        assert len(one._decode._compiled) == len(one.subject._conditions[False]._compiled) == 1
    one(["a red apple"], plan="skip_last_scales(5)", negative="an owl")
    assert len(one.generator._steps._jobs) == 2
    assert len(one._decode._compiled) == len(one.subject._conditions[False]._compiled) == 1


def test_progress_is_reported_by_stage(folder):
    told = []
    pipe = Pipeline.from_checkpoint(folder, progress=lambda *now: told.append(now))
    assert told == [("load", n, 3) for n in (1, 2, 3)]
    told.clear()
    pipe(PROMPTS[0], plan="skip_last_scales(5)", progress=lambda *now: told.append(now))
    assert told == [("compile", 1, 2), ("compile", 2, 2), ("draw", 1, 2), ("draw", 2, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": "sparvar-slow"}, "sparvar-slow"),
        ({"aspect_ratio": "wide"}, "W:H such as 16:9"),
        ({"aspect_ratio": "4:0"}, "W:H such as 16:9"),
        ({"size": "2M"}, "0.06M, 0.25M, 0.60M, 1M"),
        ({"seed": -1}, "seed must lie in 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"guidance": (2.0, 3.0)}, "one flag for each of 7 scales"),
        ({"guidance": 1.0, "negative": "an owl"}, "guidance, which is off"),
        ({"negative": ["an owl"]}, "1 negative prompts for 2 prompts"),
        ({"negative": ""}, "prompt is empty"),
        ({"guidance_layer": 7}, "merge_at"),
    ],
)
def test_impossible_calls_are_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPTS, **options)


def test_a_plan_of_another_depth_or_beside_a_shape_is_refused(pipe):
    schedule = resolve_schedule(pipe.model)
    with pytest.raises(ValueError, match="3 layers, the model 2"):
        pipe(PROMPTS, plan=parse_plan("dense", schedule, 3))
    with pytest.raises(ValueError, match="a Plan fixes"):
        pipe(PROMPTS, plan=parse_plan("dense", schedule, 2), size="1M")


def test_far_ratios_are_snapped_with_a_warning(pipe):
    with pytest.warns(UserWarning, match="nearest to 10 is 3"):
        assert resolve_schedule(pipe.model, "10:1").final == (9, 27)


@pytest.mark.parametrize(("text", "value"), [("16:9", 16 / 9), ("0.5", 0.5), (2, 2.0)])
def test_ratios_are_width_over_height(text, value):
    assert parse_ratio(text) == value


def test_parts_that_do_not_fit_are_refused(folder, pipe):
    narrow = dataclasses.replace(TEXT, width=64)
    other = loading.abstract_part(
        {"text": {"kind": "t5", **checkpoint.config_to_json(narrow)}}, "text"
    )
    with pytest.raises(ValueError, match=r"features of width 128.* gives 64"):
        dataclasses.replace(pipe.model, text_encoder=other)


def test_defaults_come_from_the_config(pipe):
    assert {k: getattr(pipe.model.defaults, k) for k in DEFAULTS} == DEFAULTS


def test_weights_take_the_dtype_asked_for(folder):
    model = loading.load_model(folder, dtype="bfloat16")
    shapes = checkpoint.abstract_parameters(model.transformer)
    assert shapes["blocks.0.attn.qkv.kernel"].dtype == "bfloat16"
    assert shapes["level_embed"].dtype == "float32"
    with pytest.raises(ValueError, match="dtype must be"):
        loading.load_model(folder, dtype="float8")


def test_missing_models_and_parts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        Pipeline.from_checkpoint(tmp_path / "none")
    with pytest.raises(ValueError, match="not a model directory"):
        Pipeline.from_checkpoint(tmp_path)
    write_tiny_model(tmp_path / "half", ("transformer",))
    with pytest.raises(ValueError, match="has no tokenizer"):
        Pipeline.from_checkpoint(tmp_path / "half")


def test_streams_refuse_before_the_first_picture(pipe):
    with pytest.raises(ValueError, match="empty"):
        pipe.stream("")


def test_numbers_of_other_libraries_draw_the_same(pipe):
    usual = pipe(PROMPTS[:1], seed=5, guidance=2.0)
    same = pipe(PROMPTS[:1], seed=np.int64(5), guidance=np.float32(2))
    np.testing.assert_array_equal(usual, same)


@pytest.mark.unchecked
def test_fractional_seeds_are_refused(pipe):
    with pytest.raises(ValueError, match="whole number"):
        pipe(PROMPTS[:1], seed=0.5)


def test_names_of_other_libraries_are_accepted(pipe):
    short = {"plan": "skip_last_scales(5)"}
    usual = pipe(["an owl", "an owl"], guidance=2.0, negative="a circle", seed=[3, 4], **short)
    theirs = pipe(
        prompt="an owl",
        guidance_scale=np.float32(2),
        negative_prompt="a circle",
        num_images_per_prompt=2,
        seed=3,
        **short,
    )
    np.testing.assert_array_equal(usual, theirs)
    with pytest.warns(UserWarning, match="nearest to 24x44 is 24x42"):
        assert pipe.request(["an owl"], height=24, width=44).plan.schedule.final == (12, 21)
    assert pipe(["an owl"], height=22, width=44, **short).shape[1:3] == (22, 44)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, "has no option steps: use plan, seed"),
        ({"height": 0}, "height and width must be positive"),
        ({"height": 32, "size": "0.06M"}, "not both"),
        ({"num_images_per_prompt": 0}, "at least 1"),
        ({"prompt": "another"}, "give them once, got 2"),
        ({"guidance": "much"}, "guidance must be a number"),
    ],
)
def test_options_that_mean_nothing_are_refused_by_name(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe.request(["an owl"], **options)


def test_guidance_off_is_one_word_in_every_family(pipe):
    off = pipe.request(["an owl"], guidance="off")
    assert {step.rows for step in off.plan.steps} == {"cond"}
    assert off.plan == pipe.request(["an owl"], guidance=1).plan
    classes = tiny_pipe()
    assert classes.request([1], guidance="off").plan == classes.request([1], guidance=0).plan


def test_prompts_that_are_no_text_are_refused(pipe):
    for wrong in (7, [7], [None], []):
        with pytest.raises(ValueError, match=r"prompt"):
            pipe.request(wrong)


def test_one_size_models_say_their_size():
    with pytest.raises(ValueError, match="draws 24x24 alone, got 24x32"):
        tiny_pipe().request([1], height=24, width=32)
    with pytest.raises(ValueError, match="cannot encode"):
        tiny_pipe().encode_text("an owl")
