"""A tiny model and its condition, for stores, meshes and weights that are tried out."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparvar_jax.models import sampling
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.runtime import generate

SCHEDULE = ScaleSchedule.of(((1, 1), (2, 2), (4, 5), (8, 10)))
CONFIG = InfinityConfig(2, 64, 2, text_width=128, bits=8, dtype="float32")
BATCH = 2


def model(seed=0):
    return Infinity(CONFIG, rngs=nnx.Rngs(seed))


def lively(module, config):
    """A module with random weights of a size at which every part of it shows in its logits."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
    draw = np.random.default_rng(0)

    def weights(leaf):
        spread = leaf.shape[0] ** -0.5 if leaf.ndim > 1 else 0.5
        return jnp.asarray(spread * draw.standard_normal(leaf.shape), leaf.dtype)

    return nnx.merge(graph, jax.tree.map(weights, shapes))


def arguments(transformer, batch=BATCH):
    """Condition, controls and keys of a generation."""
    text = jax.random.normal(jax.random.key(1), (batch, 5, 128))
    lengths = jnp.arange(batch) % 3 + 3
    condition = jax.jit(lambda m: m.embed_condition(text, lengths, "learned"))(transformer)
    controls = generate.controls(len(SCHEDULE), guidance=2.0, temperature=1.0)
    return condition, controls, sampling.image_keys(0, batch)


def draw(generator, plan, batch=BATCH, **options):
    """(code sum, outputs) of a plan."""
    return generator.run(plan, *arguments(generator.model, batch), **options)
