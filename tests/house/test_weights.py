"""Weights that are swapped in a loaded pipeline show in the next picture, and compile nothing."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.policies import skip_last_scales
from sparvar_jax.runtime.generate import Generator
from tests.house.support import SCHEDULE, draw, model
from tests.tiny_model import write_tiny_model

WHOLE = dense_plan(SCHEDULE, 2)
PLAN = skip_last_scales(2)(WHOLE)
"""Enough scales to see other weights; fewer layers show in the bits of later ones."""


def count(generator):
    return len(generator._steps._jobs)


def test_weights_changed_in_place_are_drawn_with_and_nothing_is_compiled():
    generator = Generator(model(0))
    first = draw(generator, PLAN)[0]
    before = jax.tree.map(lambda x: x, nnx.state(generator.model))
    nnx.update(generator.model, nnx.state(model(1)))
    second = draw(generator, PLAN)[0]
    np.testing.assert_array_equal(second, draw(Generator(model(1)), PLAN)[0])
    assert np.abs(second - first).max() > 0
    nnx.update(generator.model, before)
    np.testing.assert_array_equal(draw(generator, PLAN)[0], first)
    assert count(generator) == len(PLAN.steps)


def test_a_layer_put_in_the_place_of_another_is_drawn_with():
    """An ablation: both layers the same, by module and by variable."""
    generator, expected = Generator(model(0)), model(0)
    first = draw(generator, WHOLE)[0]
    nnx.update(expected.blocks[1], nnx.state(expected.blocks[0]))
    wanted = draw(Generator(expected), WHOLE)[0]
    own = generator.model.blocks[1]
    generator.model.blocks[1] = generator.model.blocks[0]
    np.testing.assert_array_equal(draw(generator, WHOLE)[0], wanted)
    generator.model.blocks[1] = own
    np.testing.assert_array_equal(draw(generator, WHOLE)[0], first)
    kernel = generator.model.blocks[0].ffn.fc1.kernel
    own.ffn.fc1.kernel, kept = kernel, own.ffn.fc1.kernel
    assert np.abs(draw(generator, WHOLE)[0] - first).max() > 0
    own.ffn.fc1.kernel = kept
    np.testing.assert_array_equal(draw(generator, WHOLE)[0], first)
    assert count(generator) == len(WHOLE.steps)


def test_another_configuration_is_compiled_anew():
    generator = Generator(model(0))
    first = draw(generator, PLAN)[0]
    config = generator.model.config
    generator.model.config = dataclasses.replace(config, fused="xla")
    np.testing.assert_array_equal(draw(generator, PLAN)[0], first)


def test_every_part_of_a_loaded_pipeline_can_be_swapped(tmp_path):
    pipe = Pipeline.from_checkpoint(write_tiny_model(tmp_path / "one"), dtype="float32")
    call = {"prompts": ["an owl"], "seed": 3, "plan": "skip_last_scales(5)"}
    first, loaded = pipe(**call), pipe.model
    average = jax.tree.map(lambda x: 0.9 * x, loaded.transformer)
    pipe.model = loaded.with_parts({"transformer": average})
    other = pipe(**call)
    assert np.abs(other.astype(int) - first).max() > 0
    np.testing.assert_array_equal(other, Pipeline(pipe.model)(**call))
    pipe.model = loaded
    np.testing.assert_array_equal(pipe(**call), first)
    for module in (loaded.tokenizer, loaded.text_encoder):
        before = jax.tree.map(lambda x: x, nnx.state(module))
        nnx.update(module, jax.tree.map(lambda x: 1.5 * x, before))
        assert (pipe(**call) != first).any()
        nnx.update(module, before)
        np.testing.assert_array_equal(pipe(**call), first)


def test_a_model_of_another_family_needs_a_pipeline_of_its_own(tmp_path):
    pipe = Pipeline.from_checkpoint(write_tiny_model(tmp_path / "one"), dtype="float32")
    stranger = dataclasses.replace(pipe.model.family, kind="other", agree=lambda model: None)
    with pytest.raises(ValueError, match="got the kind other: make a pipeline of its own"):
        pipe.model = dataclasses.replace(pipe.model, family=stranger)
