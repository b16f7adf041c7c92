"""Optimizer of both stages: Muon for matrices, Adam for the rest, and averaged weights.

The learning rate is an argument of the step, because it follows the wall clock: a stage is told
how many minutes it may take, not how many steps. Muon is momentum, orthogonalised by a
Newton-Schulz iteration.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
WEIGHT_DECAY = 0.02


class TrainState(NamedTuple):
    """Float32 parameters, optimizer state, averaged parameters and the number of steps."""

    params: Any
    optimizer: Any
    average: Any
    step: Array


def orthogonalise(matrix: Float[Array, "rows columns"], steps: int = 5) -> Array:
    """The nearest (semi-)orthogonal matrix, approximately, in bfloat16."""
    wide = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if wide else matrix).astype(jnp.bfloat16)
    x = x / (jnp.linalg.norm(x.astype(jnp.float32)) + 1e-7).astype(jnp.bfloat16)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if wide else x).astype(jnp.float32)


def scale_by_muon(momentum: float = 0.95) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised and scaled to the update size that Adam has."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        state = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state, grads)
        nesterov = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state, grads)
        scaled = jax.tree.map(lambda m: 0.2 * max(m.shape) ** 0.5 * orthogonalise(m), nesterov)
        return scaled, state

    return optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), update)


def _kind(path: tuple, leaf: Any) -> str:
    names = [str(getattr(step, "key", step)) for step in path]
    if "blocks" in names and names[-1] == "kernel" and leaf.ndim == 2:
        return "muon"
    return "embedding" if names[-1] == "embed" else "adam"


def make_optimizer(muon: bool = True) -> optax.GradientTransformation:
    """The whole optimizer without the learning rate, which `apply` multiplies in."""
    adam = optax.scale_by_adam(b1=0.9, b2=0.98)
    decay = optax.add_decayed_weights(
        WEIGHT_DECAY, mask=lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p)
    )
    kinds = {
        # Adam wants less than Muon's rate; text embeddings have unit size, so theirs is larger.
        "muon": optax.chain(scale_by_muon() if muon else adam, decay),
        "adam": optax.chain(adam, decay, optax.scale(0.4 if muon else 1.0)),
        "embedding": optax.chain(adam, optax.scale(2.0)),
    }
    labels = lambda params: jax.tree_util.tree_map_with_path(_kind, params)  # noqa: E731
    return optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(kinds, labels))


def start(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0 whose average equals the parameters."""
    copy = jax.tree.map(lambda p: p.copy(), params)
    return TrainState(params, optimizer.init(params), copy, jnp.zeros((), jnp.int32))


def apply(
    state: TrainState, grads: Any, rate: Float[Array, ""], optimizer: optax.GradientTransformation
) -> TrainState:
    """One update; the average's memory grows with training to the last twentieth of it."""
    updates, inner = optimizer.update(grads, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    weight = 1 / (1 + 0.05 * state.step.astype(jnp.float32))
    average = jax.tree.map(lambda a, p: a + weight * (p - a), state.average, params)
    return TrainState(params, inner, average, state.step + 1)


def learning_rate(peak: float, fraction: float, step: int, warmup: int = 100) -> float:
    """Linear warm-up over the first steps, then a cosine to 2 % of the peak over the wall clock."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
    return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * cosine)
