"""Drawing on and on holds no more than drawing a little: memory, arrays, threads, files."""

import jax.numpy as jnp
import pytest

from benchmarks import soak
from sparvar_jax.pipelines.pipeline import Pipeline
from tests.tiny_model import write_tiny_model
from tests.tiny_var import tiny_model, tiny_pipe

PLANS = ("skip_last_scales(4)", "drop_uncond(1)+skip_last_scales(5)")


def test_growth_is_seen():
    """A pipeline that keeps an array of every call is told."""
    pipe, kept = tiny_pipe(), []

    def leaking(batch):
        kept.append(jnp.zeros(1000) + batch)
        return [1] * batch

    orders = soak.Orders(leaking, [{}], ("skip_last_scales(2)",))
    drawn, held = soak.soak(pipe, orders, 3)
    assert drawn == 3
    assert soak.grown(held)["arrays"] > 0
    _, held = soak.soak(pipe, soak.Orders(lambda batch: [1] * batch, *orders_of(orders)), 4)
    assert soak.grown(held) == {}


def orders_of(orders):
    return orders.shapes, orders.plans


@pytest.mark.slow
@pytest.mark.parametrize("family", ["prompts", "classes"])
def test_an_hour_of_generations(tmp_path, family):
    """As many pictures as a released model draws in an hour: at 2 s each, 1,800."""
    if family == "prompts":
        folder = write_tiny_model(tmp_path / "model")
        shapes = [
            {"aspect_ratio": ratio, "size": "0.06M", "temperature": 0.5 + index / 10}
            for index, ratio in enumerate(("1:1", "16:9", "3:4"))
        ]
        texts = ["a red apple", "two apples left of an owl"]
        orders = soak.Orders(lambda batch: texts[:batch], shapes, PLANS, (1, 2))
    else:
        folder, _ = tiny_model()
        plans = ("dense", "skip_last_scales(1)", "csla(first_scale=-1)")
        shapes = [{}, {"smooth": True}]
        orders = soak.Orders(lambda batch: [1, 3][:batch], shapes, plans, (1, 2))
    pipe = Pipeline.from_checkpoint(folder, dtype="float32")
    drawn, held = soak.soak(pipe, orders, 900)
    assert drawn >= 900
    assert soak.grown(held) == {}, held
