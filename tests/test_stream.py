"""A bfloat16 residual stream: it stays one in every family and plan, and nothing else changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.cli import main
from sparvar_jax.models import sampling
from sparvar_jax.models.hart import Hart
from sparvar_jax.models.hart_parts import HartConfig
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.models.layers import Precision
from sparvar_jax.models.var import Var
from sparvar_jax.models.var_parts import VarConfig
from sparvar_jax.models.vqvae import Vqvae, VqvaeConfig
from sparvar_jax.pipelines import loading, memory, sharing
from sparvar_jax.pipelines.parts import abstract_module
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.plans.attend import HeadSplit
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.policies import parse_plan
from sparvar_jax.runtime import controls, state, step
from tests.tiny_model import write_tiny_model

SCHEDULE = ScaleSchedule.of(((1, 1), (2, 2), (4, 4), (8, 8), (8, 12), (12, 16)))
INFINITY = InfinityConfig(3, 64, 2, text_width=128, bits=8, stream="bfloat16")
VAR = VarConfig(2, 128, 2, sides=(1, 2, 3), classes=5, vocab=48, code_width=8, stream="bfloat16")
HART = HartConfig.preset(
    "hart_tiny", depth=2, width=64, heads=2, sides=(1, 2, 3), stream="bfloat16"
)


def hidden_states(model, plan, condition, codebook=None):
    """What every layer leaves at every scale, as shapes; nothing is computed."""
    parameters, treedef = jax.tree.flatten((model, codebook))
    before = jax.eval_shape(lambda: state.empty_state(model, plan, 1))
    found = {}
    for index in range(len(plan.steps)):
        spec = step.step_spec(
            plan, index, logit_bound=model.config.logit_bound, capture=True, how="greedy"
        )
        draw = functools.partial(
            step.draw_scale,
            treedef=treedef,
            spec=spec,
            heads=HeadSplit(),
            guidance=None,
            forced=None,
        )
        tuned = jax.eval_shape(lambda: controls.controls(len(plan.schedule)))
        keys = jax.eval_shape(lambda: sampling.image_keys(0, 1))
        arguments = (parameters, condition, *state.split_state(before), tuned, keys)
        before, output = jax.eval_shape(draw, *arguments)
        found |= {(index, n): x for n, x in output.captured.items() if n.startswith("hidden")}
    return found


def condition_of(model):
    features = jax.ShapeDtypeStruct((1, 5, 128), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(
        lambda m, x, n: m.embed_condition(x, n, "learned"), model, features, lengths
    )


def require_bfloat16(found, plan):
    assert len(found) == len(plan.steps) * plan.depth
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    "text",
    [
        "fastvar(((-2, 0.25), (-1, 0.5)), -3, 0)",
        "prune(0.5, layers=(1, 3))+share_rows(0)",
        "guidance_range(1, 4)",
    ],
)
def test_it_stays_bfloat16_whatever_a_plan_does_with_it(text):
    model, plan = abstract_module(Infinity, INFINITY), parse_plan(text, SCHEDULE, 3)
    require_bfloat16(hidden_states(model, plan, condition_of(model)), plan)


def test_rows_that_are_mixed_or_given_updates_keep_it():
    """Guidance mixed into hidden states after a block; an update that other rows are given too."""
    plan = dense_plan(SCHEDULE, 3)
    (segment,) = plan.steps[0].segments
    first = dataclasses.replace(segment, layers=(0, 1), rows="cond")
    segments = first, dataclasses.replace(segment, layers=(1, 3))
    steps = (dataclasses.replace(one, merge_at=0, segments=segments) for one in plan.steps[-2:])
    plan = dataclasses.replace(plan, steps=(*plan.steps[:-2], *steps))
    model = abstract_module(Infinity, INFINITY)
    require_bfloat16(hidden_states(model, plan, condition_of(model)), plan)


def test_class_conditional_models_have_it_too():
    model, plan = abstract_module(Var, VAR), dense_plan(VAR.schedule, 2)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    condition = jax.eval_shape(lambda m, x: m.embed_condition(x), model, labels)
    codebook = abstract_module(Vqvae, VqvaeConfig(48, 8, 32, (1, 2), 1)).codebook
    require_bfloat16(hidden_states(model, plan, condition, codebook), plan)


def test_hart_has_it_too():
    model, plan = abstract_module(Hart, HART), dense_plan(HART.schedule, 2)
    features = jax.ShapeDtypeStruct((1, HART.text_tokens, HART.text_width), jnp.float32)
    positions = jax.ShapeDtypeStruct((1, HART.text_tokens), jnp.int32)
    condition = jax.eval_shape(
        lambda m, x, p: m.embed_condition(x, p, "learned"), model, features, positions
    )
    tokenizer = VqvaeConfig(HART.vocab, HART.code_width, 32, (1, 2), 1)
    codebook = abstract_module(Vqvae, tokenizer).codebook
    require_bfloat16(hidden_states(model, plan, condition, codebook), plan)


def test_it_is_asked_for_when_loading_and_kept_when_saved(tmp_path, capsys):
    folder = write_tiny_model(tmp_path / "toy")
    plain = Pipeline.from_checkpoint(folder, dtype="float32")
    pipe = Pipeline.from_checkpoint(folder, dtype="float32", stream="bfloat16", weights="int8")
    config = pipe.model.transformer.config
    assert config == dataclasses.replace(plain.model.transformer.config, stream="bfloat16")
    sharing.save(plain.model.with_stream("bfloat16"), tmp_path / "saved")
    again = loading.load_model(tmp_path / "saved", dtype="float32")
    assert again.transformer.config.stream == "bfloat16"
    for one, other in zip(
        *(jax.tree.leaves(m.transformer) for m in (again, plain.model)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert loading.describe_model(folder, stream="float32").transformer.config.stream == "float32"
    sizes = []
    for stream in ("float32", "bfloat16"):
        described = loading.describe_model(folder, "bfloat16", stream=stream)
        sizes.append(memory.estimate(described, dense_plan(SCHEDULE, 2), 1).step)
    tokens, width = 2 * 12 * 16, described.transformer.config.width
    assert sizes[0] - sizes[1] == 2 * tokens * width
    assert main(["info", "--model", str(folder), "--stream", "int8"]) == 2
    assert "--stream" in capsys.readouterr().err


@pytest.mark.unchecked
def test_streams_of_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="stream must be 'bfloat16' or 'float32', got 'int8'"):
        Precision(stream="int8")  # type: ignore[arg-type]
