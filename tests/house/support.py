"""A tiny model and its condition, for stores, meshes and weights that are tried out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparvar_jax.models import sampling
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.plans.attend import Attend
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.plans.rows import Slot
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.plans.stores import CacheShape
from sparvar_jax.runtime import generate

SCHEDULE = ScaleSchedule.of(((1, 1), (2, 2), (4, 5), (8, 10)))
CONFIG = InfinityConfig(2, 64, 2, text_width=128, bits=8, dtype="float32")
BATCH = 2
DENSE = dense_plan(SCHEDULE, 2)
SHAPE = CacheShape(2 * BATCH, CONFIG.heads, CONFIG.head_dim, jnp.dtype("float32"))


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


embed = jax.jit(lambda model, *text: model.embed_condition(*text, "learned"))


def arguments(transformer, batch=BATCH):
    """Condition, controls and keys of a generation."""
    text = jax.random.normal(jax.random.key(1), (batch, 5, 128))
    lengths = jnp.arange(batch) % 3 + 3
    condition = embed(transformer, text, lengths)
    controls = generate.controls(len(SCHEDULE), guidance=2.0, temperature=1.0)
    return condition, controls, sampling.image_keys(0, batch)


def draw(generator, plan, batch=BATCH, **options):
    """(code sum, outputs) of a plan."""
    return generator.run(plan, *arguments(generator.model, batch), **options)


@functools.cache
def plain_generator():
    """One generator for all tests of a process that change nothing of its model."""
    return generate.Generator(model())


@functools.cache
def plain_picture():
    """What it draws with a dense plan, inner arrays included."""
    return draw(plain_generator(), DENSE, capture=True)


def same(ours, theirs):
    """Two pictures are equal bit for bit, in every token and in their sums of codes."""
    np.testing.assert_array_equal(ours[0], theirs[0])
    for one, other in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def over_lists(own, x, config):
    """Self-attention that adds its keys and values to a list, and reads all that lie in it."""

    def attention(write):
        empty = jnp.zeros((len(x), config.heads, x.shape[1], config.head_dim))
        q, k, v = write(empty, empty, Slot(0, x.shape[1], x.shape[1]))
        own.append((k, v))
        keys, values = (jnp.concatenate(part, 2) for part in zip(*own, strict=True))
        weights = jax.nn.softmax(jnp.einsum("rhtd,rhsd->rhts", q, keys, precision="highest"))
        return jnp.einsum("rhts,rhsd->rhtd", weights, values, precision="highest")

    return Attend(attention)


def held_bytes(state):
    """Bytes of everything that a state keeps of keys and values."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves((state.cache, state.shared)))
