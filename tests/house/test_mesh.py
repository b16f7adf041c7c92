"""Meshes of host devices: pictures over one axis, attention heads and tokens over the other."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLANS = ["infinity dense", "infinity sparvar-fast + drop_uncond(1)",
         "var dense", "var sparvar-fast + drop_uncond(1)"]  # fmt: skip


APART = 7 + 4 + 4 + 1
"""Plans of all families whose conditional and unconditional rows meet in the head alone."""
DIVIDED = ["infinity dense", "infinity sparvar-fast + drop_uncond(1)", "var sparvar-paper",
           "infinity lean branches", "hart lean dense"]  # fmt: skip


def run(*arguments):
    """What eight host devices draw; the number of devices is fixed when jax starts."""
    root = Path(__file__).parents[2]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{root}:{root / 'convert'}"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.house.mesh_pictures", *arguments],
        capture_output=True, text=True, cwd=root, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def told():
    return run()


@pytest.mark.parametrize("plan", PLANS)
def test_four_devices_draw_what_one_draws(told, plan):
    """A device draws two pictures where one draws four: products sum in another order.

    Inner arrays are of order one in float32, and two layers deep: 1e-5 is some hundred roundings.
    Those of all rows are in the order of one device.
    """
    assert told[plan]["devices"] == 4
    assert told[plan]["tokens"] == 0
    assert told[plan]["captured"] < 1e-5
    assert told[plan]["sums"] < 1e-5


def test_four_devices_draw_what_one_draws_of_all_pictures_at_once(told):
    assert told["whole"]["devices"] == 4
    assert told["whole"]["tokens"] == 0
    assert max(told["whole"][part] for part in ("captured", "sums", "reports")) < 1e-5


@pytest.mark.parametrize("plan", DIVIDED)
def test_divided_tokens_draw_what_one_device_draws(told, plan):
    """Every scale is divided: one token, or 15 of them, leave a device with padding.

    Branches: half of the tokens of the last scale run, of which rows choose their own, the
    unconditional ones through one layer of two.
    """
    check(told[f"divided {plan}"], 2 if "fast" in plan or "lean" in plan else 4)


@pytest.mark.parametrize(("plan", "devices"), [("infinity dense", 8), ("var sparvar-paper", 2)])
def test_rows_of_guidance_on_devices_of_their_own_draw_what_one_device_draws(told, plan, devices):
    check(told[f"parted {plan}"], devices)


@pytest.mark.slow
def test_every_plan_on_every_mesh():
    every = run("every")
    assert len(every) == (13 + 7 + 7 + 1) * 4 + APART * 2 + 1
    for name, found in every.items():
        shape = name[name.rindex("(") + 1 : -1].split(", ")
        check(found, math.prod(map(int, shape)))


def check(found, devices):
    """The same bits, and logits and hidden states of every scale within rounding, see above."""
    assert found["devices"] == devices
    assert found["tokens"] == 0
    assert max(found["captured"], found["sums"]) < 1e-5


@pytest.mark.parametrize("plan", PLANS)
def test_a_device_draws_its_pictures_as_if_alone(told, plan):
    """The two pictures of a device, drawn on one: no product is longer, none sums otherwise."""
    assert told[plan]["alone"] == 0


def test_scales_drawn_one_by_one_and_with_forced_tokens(told):
    assert told["by hand"] == {"by scale": 0, "forced": 0, "captured": 0}


def test_reports_hold_every_row_and_head(told):
    assert told["infinity dense"]["reports"] < 1e-5


def test_weights_are_copied_to_the_mesh_where_they_change(told):
    assert told["swapped"]["kept"]
    assert told["swapped"]["copied"] == 1
    assert told["swapped"]["moved"] > 0
    assert told["swapped"]["fresh"] < 1e-5


def test_controls_that_change_show_on_a_mesh(told):
    assert told["swapped"]["turned"] > 0.1
    assert told["swapped"]["steered"] < 1e-5


def test_rows_get_to_the_devices_that_draw_them_past_the_host(told):
    """A text's keys and values are a gigabyte: half a second by way of the host."""
    assert told["relaid"] == {"own": [[0, 0, 4, 4], [0, 0, 12, 12]], "equal": True}


def test_bands_of_a_decoder_make_the_picture_of_one_device(told):
    """Images in [-1, 1], some ten float32 convolutions and norms deep: as the inner arrays above.

    Norms add their statistics band by band, which is another order of up to some hundred sums.
    """
    assert told["bands"]["spread"] > 0.1
    for count in (2, 3):
        distance, rows = told["bands"][str(count)]
        assert distance < 2e-5
        assert rows == 12 // count


def test_a_pipeline_on_two_devices_draws_the_pictures_of_one(told):
    """Rounding may cross a border between two of 256 steps; weights are restored in place."""
    pipeline = told["pipeline"]
    assert set(pipeline["devices"]) == {2}
    assert pipeline["copied"] == 0
    assert pipeline["spread"] > 1
    assert pipeline["steps"] <= 1
    assert pipeline["narrow"] == [2, True]


def test_what_cannot_be_divided_is_refused(told):
    for call in ("start", "run", "compile"):
        assert "3 pictures cannot be divided over 2 devices" in told["refusals"][call]
    heads = told["refusals"]["heads"]
    assert "5 attention heads cannot be divided over 2 devices: give one of 1, 5" in heads
    assert "4 attention heads cannot be divided over 3 devices" in told["refusals"]["any"]
    assert "a mesh of 3x3 needs 9 devices, got 8" in told["refusals"]["mesh"]
    assert "per_head was made for 2 heads a layer, this device holds 1" in told["refusals"]["sight"]
    assert "captured on one device, or on a mesh" in told["refusals"]["capture"]
    assert "the mesh has the axes ('rows', 'heads'), got 'columns'" in told["refusals"]["axis"]
    assert "'drop_uncond(1)' meet before the head, or some run alone" in told["refusals"]["meet"]
