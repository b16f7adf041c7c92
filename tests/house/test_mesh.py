"""A 2x2 mesh of host devices: pictures over one axis, attention heads over the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import json
import jax, numpy as np
from sparvar_jax.policies import parse_plan
from sparvar_jax.runtime.generate import Generator
from sparvar_jax.runtime.placement import Placement, mesh_of
from sparvar_jax.plans.schedule import ScaleSchedule
from tests.house import support
from tests.house.support import draw, model

jax.config.update("jax_disable_most_optimizations", True)
support.SCHEDULE = SCHEDULE = ScaleSchedule.of(support.SCHEDULE.sizes[:3])
told = {"devices": len(jax.devices())}
one, four = Generator(model()), Generator(model(), placement=Placement(mesh_of(2, 2)))
for name in ("dense", "sparvar-fast+drop_uncond(1)"):
    plan = parse_plan(name, SCHEDULE, 2)
    ours, outputs = draw(four, plan, capture=True)
    theirs, others = draw(one, plan, capture=True)
    logits = [
        float(np.abs(np.asarray(a.captured["guided_logits"]) - b.captured["guided_logits"]).max())
        for a, b in zip(outputs, others, strict=True)
    ]
    tokens = [bool((np.asarray(a.tokens) == b.tokens).all()) for a, b in zip(outputs, others)]
    told[name] = {
        "logits": max(logits),
        "tokens": all(tokens),
        "sums": float(np.abs(np.asarray(ours) - theirs).max()),
        "spread": len(ours.sharding.device_set),
    }
    ahead, _ = draw(four, plan)
    told[name]["compiled ahead"] = bool((np.asarray(ahead) == np.asarray(ours)).all())
for batch, heads in ((3, 2), (2, 5)):
    try:
        Placement(mesh_of(2, 2)).check(batch, heads)
    except ValueError as error:
        told[f"{batch} {heads}"] = str(error)
try:
    mesh_of(3, 2)
except ValueError as error:
    told["mesh"] = str(error)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told():
    """What four host devices draw; the number of devices is fixed when jax starts."""
    root = Path(__file__).parents[2]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{root}:{root / 'convert'}"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, cwd=root, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("plan", ["dense", "sparvar-fast+drop_uncond(1)"])
def test_four_devices_draw_what_one_draws(told, plan):
    """A device draws one picture where one device draws two: products sum in another order.

    Logits are of order one in float32, and two layers deep: 1e-5 is some hundred roundings.
    """
    assert told["devices"] == 4
    assert told[plan]["spread"] == 4
    assert told[plan]["logits"] < 1e-5
    assert told[plan]["tokens"]
    assert told[plan]["sums"] < 1e-5
    assert told[plan]["compiled ahead"]


def test_what_cannot_be_divided_is_refused(told):
    assert "3 pictures cannot be divided over 2 devices" in told["3 2"]
    assert "5 attention heads cannot be divided over 2 devices: give one of 1, 5" in told["2 5"]
    assert "a mesh of 3x2 needs 6 devices, got 4" in told["mesh"]
