"""Numbers of calls, plan texts and command lines: a number is one, or one line says why not."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.cli import main
from sparvar_jax.pipelines import edit, loading
from sparvar_jax.pipelines.numbers import image_keys, parse_ratio
from sparvar_jax.pipelines.requests import Options, shape_of
from sparvar_jax.pipelines.sampling_jobs import SampleJob
from sparvar_jax.plans.schedule import infinity_schedule
from sparvar_jax.policies import drop_uncond, parse_plan, skip_last_scales
from sparvar_jax.policies.registry import POLICIES, PRESETS, register_policy
from sparvar_jax.runtime.controls import controls
from tests.tiny_model import write_tiny_model
from tests.tiny_var import tiny_model, tiny_pipe

pytestmark = pytest.mark.unchecked
HUGE = 10**400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("calls") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return loading.describe_model(folder)


def refused(message, call):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert len(str(error.value)) < 500
    assert str(error.value).isprintable()


OPTIONS = {
    "seed": [2.0, "1", True, None, HUGE, -1, float("nan"), 2**32, [1, 2], [], b"1", 1j],
    "guidance": ["much", True, HUGE, float("nan"), float("inf"), 1e7, [1.0] * 3, [], 1j, None],
    "temperature": [0, -1, 1e-30, HUGE, float("nan"), "hot", [1.0], [None] * 13, True, {}],
    "top_p": [0, -1, 1.1, "much", float("nan"), HUGE, [0.5], True],
    "top_k": [-1, 2.7, 2.0, "3", HUGE, True, [3]],
    "smooth": ["yes", 1, 2.0],
    "plan": [5, ["dense"], b"dense", 1.0, "", "dense+", "no"],
}
CONTROLS = ("guidance", "temperature", "top_p", "top_k")


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_classes(name):
    for value in OPTIONS[name]:
        if value is None and name != "seed":
            continue  # the model's default
        refused(r"\w", lambda value=value: tiny_pipe().request([1], **{name: value}))


@pytest.mark.parametrize("name", ["guidance", "temperature", "top_p", "plan"])
def test_options_of_prompts(model, name):
    for value in OPTIONS[name]:
        if value is not None:
            refused(r"\w", lambda value=value: Options(**{name: value}).resolve(model))


@pytest.mark.parametrize("name", CONTROLS)
def test_controls(name):
    for value in OPTIONS[name]:
        refused(name, lambda value=value: controls(4, **{name: value}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": ["1M"]}, "size must be one of"),
        ({"size": 1}, "size must be one of"),
        ({"aspect_ratio": HUGE}, "aspect ratio"),
        ({"aspect_ratio": True}, "aspect ratio"),
        ({"aspect_ratio": 1e-300}, "aspect ratio"),
        ({"aspect_ratio": "1:" + "9" * 400}, "aspect ratio"),
        ({"guidance_layer": 1.0}, "guidance_layer must be a whole number"),
        ({"guidance_layer": "1"}, "guidance_layer must be a whole number"),
        ({"guidance_layer": HUGE}, "merge_at must lie in"),
        ({"guidance_layer": -1}, "merge_at must lie in"),
    ],
)
def test_shapes_and_layers_of_prompts(model, options, message):
    refused(message, lambda: Options(**options).resolve(model))


@pytest.mark.parametrize(
    "sides", [(0, 64), (64, -1), (HUGE, 64), (64.0, 64), ("64", 64), (64, 1e9)]
)
def test_pixels(model, sides):
    refused("height|width", lambda: shape_of(model, *sides))


@pytest.mark.parametrize("label", [2.7, 2.0, "2", True, HUGE, -1, [[1]], [1.0], {}, b"1", object()])
def test_labels(label):
    refused("class", lambda: tiny_pipe().request(label))


@pytest.mark.parametrize("count", [0, -1, 1.5, HUGE, "2", True, None, 10**6])
def test_numbers_of_pictures(count):
    refused("num_images_per_prompt", lambda: tiny_pipe().request([1], num_images_per_prompt=count))


NUMBERS = [np.int64(3), np.uint8(3), np.array(3), jnp.int32(3), jnp.asarray(3, jnp.uint8)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda value: type(value).__name__)
def test_whole_numbers_of_other_libraries(number, model):
    assert (image_keys(number, 2) == image_keys(3, 2)).all()
    plan, made = Options(guidance=number, temperature=number, plan="dense").resolve(model)
    expected, others = Options(guidance=3, temperature=3.0, plan="dense").resolve(model)
    assert plan == expected
    assert np.array_equal(made.guidance, others.guidance)
    assert np.array_equal(made.temperature, others.temperature)
    assert controls(2, top_k=number).top_k == 3
    assert parse_ratio(number) == 3
    dense = parse_plan("dense", infinity_schedule(), 2)
    assert skip_last_scales(number)(dense) == skip_last_scales(3)(dense)
    assert hash(drop_uncond(number)(dense)) == hash(drop_uncond(3)(dense))
    assert np.array_equal(tiny_pipe().subject.listed([number]), [3])


PLANS = {
    "skip_last_scales(1.0)": "skip_last_scales: count must be a whole number .*got 1.0",
    "skip_last_scales(True)": "skip_last_scales: count must be a whole number .*got True",
    "skip_last_scales()": "skip_last_scales: missing a required argument: 'count'",
    "skip_last_scales(1, 2)": "skip_last_scales: too many positional arguments",
    "drop_uncond('3')": "drop_uncond: count must be a whole number .*got '3'",
    f"drop_uncond({10**30})": "count must be a whole number up to .*more than 19 digits",
    "drop_uncond(-1)": r"drop_uncond takes a number of scales in 0\.\.13, got -1",
    "adaptive(None)": "adaptive: coverage must be a finite number, got None",
    "adaptive(1e999)": "adaptive: coverage must be a finite number, got inf",
    "adaptive(-1e999)": "adaptive: coverage must be a finite number",
    "adaptive(sinks=-1)": "sinks must be at least 0, got -1",
    "adaptive(block=128.0)": "adaptive: block must be a whole number",
    "sparvar('x')": "sparvar: boundary must be a whole number .*got 'x'",
    "sparvar(foo=3)": "sparvar has no argument 'foo': it takes windows, sinks",
    "sparvar(sinks=1.5)": "sparvar: sinks must be a whole number",
    "sparvar(columns_options={'foo': 1})": "cs4a: .*'foo'",
    "sparvar(columns_options={'keep': 'a'})": "cs4a: keep must be a finite number, got 'a'",
    "sparvar(columns_options=3)": "sparvar: columns_options must be",
    "csla(windows=(1, 2.5))": "csla: windows must be a list .*with a whole number",
    f"csla(windows={(1,) * 300})": "csla: windows must be a list .at most 256",
    "csla(layers=(0,))": "csla: layers must be",
    "csla(layers=(0, 1, 2))": "csla: layers must be",
    "csla(form='\\d')": "csla: form must be 'blocks' or 'boxes'",
    "csla(exact=1)": "csla: exact must be True or False, got 1",
    "csla(sinks=1, sinks=2)": "needs literal arguments",
    "csla(**{'sinks': 1})": "csla: got an unexpected keyword argument",
    "csla(*(1,))": "needs literal arguments",
    "csla(sinks=10**9)": "needs literal arguments",
    "csla(" + "-" * 3000 + "1)": "needs literal arguments",
    "csla" + "(" * 1500 + ")" * 1500: "needs literal arguments",
    f"csla(sinks={'9' * 4050})": "csla: sinks must be|needs literal arguments",
    "cs4a(mapping='else')": "cs4a: mapping must be keep, scale or relative",
    "cs4a(granularity=8.0)": "cs4a: granularity must be 1 or 8, got 8.0",
    "dense(1)": "dense: too many positional arguments; it takes no arguments",
    "dense+" * 900: "a plan's text has 4096 letters at most, got 5400",
    "\x1b[31mred" + "x" * 4000: "unknown policy",
    "dense\x00": "unknown policy",
    "dense(\x00)": "needs literal arguments",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", PLANS, ids=range(len(PLANS)))
def test_plan_texts(text):
    refused(PLANS[text], lambda: parse_plan(text, infinity_schedule(), 4))


def test_policies_of_users_are_held_to_their_annotations():
    def mine(count: int, share: float = 0.5, *more: bool, odd: object = None):
        return lambda plan: seen.append((count, share, more, odd)) or plan

    seen = []
    register_policy("mine", mine)
    try:
        schedule = infinity_schedule()
        parse_plan("mine(2, 1, True, odd='x')", schedule, 2)
        assert seen == [(2, 1.0, (True,), "x")]
        refused("mine: count must be a whole", lambda: parse_plan("mine(2.0)", schedule, 2))
        refused("mine: more must be True", lambda: parse_plan("mine(2, 1, 0)", schedule, 2))
        refused("mine: .*'no'", lambda: parse_plan("mine(2, no=1)", schedule, 2))
    finally:
        del POLICIES["mine"]
    ours = {"almost-lossless", "balanced", "fastest", "dense", "sparvar-paper", "sparvar-fast"}
    assert set(PRESETS) == ours


@pytest.mark.parametrize("option", [{"threshold": "x"}, {"threshold": 1}, {"keep_scales": 1.0},
                                    {"keep_scales": HUGE}, {"paste": "no"}])  # fmt: skip
def test_options_of_edits(option):
    (name,) = option
    region = edit.box(24, 24, 0, 0, 9, 9)
    pictures = np.zeros((1, 24, 24, 3), np.uint8)
    refused(name, lambda: edit.edit(tiny_pipe(), pictures, region, [1], **option))


@pytest.mark.parametrize("value", [1.0, "1", True, None])
def test_numbers_of_jobs_and_boxes(value):
    for name in ("per_class", "batch", "seed"):
        options = {"per_class": 1, name: value}
        refused(name, lambda options=options: SampleJob((0, 1), **options))
    refused("left must be a whole number", lambda: edit.box(9, 9, 0, value, 9, 9))
    assert SampleJob((0,), np.int64(2), np.uint8(3)).describe() == SampleJob((0,), 2, 3).describe()


BIG = "9" * 400
LINES = [
    ["plans", "--depth", "1000000"],
    ["plans", "--depth", "0"],
    ["plans", "dense", "--depth", BIG],
    ["plans", "dense", "--depth", "9" * 5000],
    ["plans", "--aspect", "1:" + BIG],
    ["plans", "--size", "9" * 5000],
    ["plans", "skip_last_scales(1.0)"],
    ["generate", "x", "--num", BIG],
    ["generate", "x", "--num", "100000000"],
    ["generate", "x", "--seed", BIG],
    ["generate", "x", "--seed", "4294967295", "--num", "2"],
    ["generate", "x", "--guidance", "nan"],
    ["generate", "x", "--guidance", BIG],
    ["generate", "x", "--temperature", "1e-300"],
    ["generate", "x", "--temperature", "nan"],
    ["generate", "x", "--plan", "adaptive(None)"],
    ["generate", "\ud800"],
    ["warmup", "--num", "100000000"],
    ["info", "--num", BIG],
    ["info", "--plan", "sparvar('x')"],
    ["inspect", "x", "--seed", BIG],
    ["compare", "/nowhere", "--tolerance", "nan"],
    ["compare", "/nowhere", "--tolerance", "-1"],
    ["compare", "/nowhere", "--guidance", "inf"],
    ["compare", "/nowhere", "--seed", BIG],
    ["compare", "/nowhere", "--seed", "-1"],
    ["convert", "/nowhere", "--into", "x", "--kind", "\x1b[31m" + BIG],
]
SAMPLES = [
    ["--batch", "1000000000"],
    ["--batch", BIG],
    ["--per-class", BIG],
    ["--per-class", "9999999"],
    ["--classes", "0-99999999999"],
    ["--classes", "0-" + BIG],
    ["--seed", BIG],
    ["--seed", "-1"],
    ["--top-k", BIG],
    ["--top-p", "nan"],
]


@pytest.mark.parametrize(
    "line", LINES, ids=lambda line: " ".join(line)[:40].encode("ascii", "replace").decode()
)
def test_numbers_of_command_lines(folder, tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    takes_model = line[0] in ("generate", "warmup", "info", "inspect")
    told = one_line(capsys, [*line, *(["--model", str(folder)] if takes_model else [])])
    assert "/nowhere does not exist" not in told or line[0] == "convert"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", SAMPLES, ids=lambda line: " ".join(line)[:40])
def test_numbers_of_sampling_jobs(tmp_path, capsys, line):
    model, _ = tiny_model()
    out = ["--model", str(model), "--out", str(tmp_path / "a.npz"), "--dtype", "float32"]
    one_line(capsys, ["sample", *out, *line])
    assert list(tmp_path.iterdir()) == []


def one_line(capsys, line):
    assert main(line) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]{5,490}\n", told), told
    assert told[:-1].isprintable()
    return told
