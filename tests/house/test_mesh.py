"""A 2x2 mesh of host devices: pictures over one axis, attention heads over the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLANS = ["infinity dense", "infinity sparvar-fast + drop_uncond(1)",
         "var dense", "var sparvar-fast + drop_uncond(1)"]  # fmt: skip


@pytest.fixture(scope="module")
def told():
    """What four host devices draw; the number of devices is fixed when jax starts."""
    root = Path(__file__).parents[2]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{root}:{root / 'convert'}"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.house.mesh_pictures"],
        capture_output=True, text=True, cwd=root, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


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


@pytest.mark.parametrize("plan", PLANS)
def test_a_device_draws_its_pictures_as_if_alone(told, plan):
    """The two pictures of a device, drawn on one: no product is longer, none sums otherwise."""
    assert told[plan]["alone"] == 0


def test_scales_drawn_one_by_one_and_with_forced_tokens(told):
    assert told["by hand"] == {"by scale": 0, "forced": 0, "captured": 0}


def test_reports_hold_every_row_and_head(told):
    assert told["reports"] < 1e-5


def test_weights_are_copied_to_the_mesh_where_they_change(told):
    assert told["swapped"]["kept"]
    assert told["swapped"]["copied"] == 1
    assert told["swapped"]["moved"] > 0
    assert told["swapped"]["fresh"] < 1e-5


def test_what_cannot_be_divided_is_refused(told):
    for call in ("start", "run", "compile"):
        assert "3 pictures cannot be divided over 2 devices" in told["refusals"][call]
    heads = told["refusals"]["heads"]
    assert "5 attention heads cannot be divided over 2 devices: give one of 1, 5" in heads
    assert "a mesh of 3x2 needs 6 devices, got 4" in told["refusals"]["mesh"]
    assert "the mesh has the axes ('rows', 'heads'), got 'columns'" in told["refusals"]["axis"]
