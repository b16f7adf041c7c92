"""Optimizer of both stages: Muon for matrices, Adam for the rest, and averaged weights.

Parameters of one kind and shape are packed into one array: the optimizer's program is then small
enough to compile in seconds, and Muon (momentum, orthogonalised by a Newton-Schulz iteration) works
on all equal matrices at once. The learning rate is an argument of the step, because it follows the
wall clock: a stage is told how many seconds it may take, not how many steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
WEIGHT_DECAY = 0.02

Packed = dict[str, Array]
"""`<kind>.<shape>` -> all parameters of that kind and shape, [count, *shape]."""


class TrainState(NamedTuple):
    """Packed float32 parameters, optimizer state, averaged parameters and the number of steps."""

    params: Packed
    optimizer: Any
    average: Packed
    step: Array


class Packing:
    """Which parameters of a tree lie together.

    apart: a top-level part of the tree that lies with nothing else, so that it can learn at a rate
    of its own; the names of its groups end in it.
    """

    def __init__(self, like: Any, muon: bool, apart: str | None = None):
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(like)
        self._groups: dict[str, list[int]] = {}
        for index, (path, leaf) in enumerate(leaves):
            name = f"{_kind(path, leaf, muon)}.{'x'.join(map(str, leaf.shape))}"
            name += f".{apart}" if apart is not None and _names(path)[0] == apart else ""
            self._groups.setdefault(name, []).append(index)
        self._count = len(leaves)

    def pack(self, tree: Any) -> Packed:
        """Stack the parameters of every group."""
        leaves = jax.tree.leaves(tree)
        return {
            name: jnp.stack([leaves[index] for index in indices])
            for name, indices in self._groups.items()
        }

    def unpack(self, packed: Packed | dict[str, np.ndarray]) -> Any:
        """The tree again; of host arrays where these are packed."""
        leaves: list[Any] = [None] * self._count
        for name, indices in self._groups.items():
            for place, index in enumerate(indices):
                leaves[index] = packed[name][place]
        return jax.tree.unflatten(self._structure, leaves)

    def averaged(self, state: TrainState) -> Any:
        """The averaged parameters as host arrays."""
        return self.unpack(jax.device_get(state.average))


def _names(path: tuple) -> list[str]:
    return [str(getattr(step, "key", step)) for step in path]


def _kind(path: tuple, leaf: Any, muon: bool) -> str:
    names = _names(path)
    # Not the text encoder: T5 does not scale its scores, and under Muon's updates they grew to a
    # spread of 40 to 120. Every word then looked at one other, whatever the order of words.
    in_transformer = "blocks" in names and names[0] != "text"
    if muon and in_transformer and names[-1] == "kernel" and len(leaf.shape) == 2:
        return "muon"
    return "embedding" if names[-1] == "embed" else "adam"


def orthogonalise(matrices: Float[Array, "n rows columns"], steps: int = 5) -> Array:
    """The nearest (semi-)orthogonal matrices, approximately, in bfloat16."""
    wide = matrices.shape[1] > matrices.shape[2]
    x = jnp.swapaxes(matrices, 1, 2) if wide else matrices
    norm = jnp.linalg.norm(x.astype(jnp.float32), axis=(1, 2), keepdims=True)
    x = (x / (norm + 1e-7)).astype(jnp.bfloat16)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ jnp.swapaxes(x, 1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (jnp.swapaxes(x, 1, 2) if wide else x).astype(jnp.float32)


def scale_by_muon(momentum: float = 0.95) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised and scaled to the update size that Adam has."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        state = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state, grads)
        nesterov = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state, grads)
        scaled = jax.tree.map(lambda m: 0.2 * max(m.shape[1:]) ** 0.5 * orthogonalise(m), nesterov)
        return scaled, state

    return optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), update)


def make_optimizer(muon: bool = True) -> optax.GradientTransformation:
    """The optimizer of packed parameters without the learning rate, which `apply` multiplies in."""
    adam = optax.scale_by_adam(b1=0.9, b2=0.98)
    decay = optax.add_decayed_weights(
        WEIGHT_DECAY, mask=lambda p: jax.tree.map(lambda leaf: leaf.ndim > 2, p)
    )
    kinds = {
        # Adam wants less than Muon's rate; text embeddings have unit size, so theirs is larger.
        "muon": optax.chain(scale_by_muon(), decay),
        "adam": optax.chain(adam, decay, optax.scale(0.4 if muon else 1.0)),
        "embedding": optax.chain(adam, optax.scale(2.0)),
    }
    labels = lambda params: {name: name.split(".")[0] for name in params}  # noqa: E731
    return optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(kinds, labels))


def start(params: Packed, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0 whose average equals the parameters."""
    copy = jax.tree.map(lambda p: p.copy(), params)
    return TrainState(params, optimizer.init(params), copy, jnp.zeros((), jnp.int32))


def abstract_state(
    like: Any, packing: Packing, optimizer: optax.GradientTransformation
) -> TrainState:
    """The shapes of a state whose parameters are shaped as `like`."""
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)  # noqa: E731
    return jax.eval_shape(lambda: start(packing.pack(zeros()), optimizer))


def apply(
    state: TrainState,
    grads: Packed,
    rate: Float[Array, ""],
    optimizer: Any,
    *,
    apart: tuple[str, Float[Array, ""]] | None = None,
    memory: int | None = None,
) -> TrainState:
    """One update. apart: a part that was packed apart, and its own rate; at 0 it does not move.

    memory: steps that the exponential average looks back; None lets it grow with training to the
    last twentieth of it. While fewer steps than that were taken, the average is of those.
    """
    updates, inner = optimizer.update(grads, state.optimizer, state.params)
    rates = {
        name: apart[1] if apart is not None and name.endswith(f".{apart[0]}") else rate
        for name in state.params
    }
    params = {name: p - rates[name] * updates[name] for name, p in state.params.items()}
    weight = 1 / (1 + 0.05 * state.step.astype(jnp.float32))
    if memory is not None:
        weight = jnp.maximum(1 / (1 + state.step.astype(jnp.float32)), 1 / memory)
    average = jax.tree.map(lambda a, p: a + weight * (p - a), state.average, params)
    return TrainState(params, inner, average, state.step + 1)


def learning_rate(
    peak: float,
    fraction: float,
    step: int,
    *,
    warmup: int = 100,
    constant: float = 0.0,
    final: float = 0.02,
) -> float:
    """Linear warm-up, the peak until a share of the time, then a straight line to `final` of it."""
    left = (1 - min(fraction, 1.0)) / (1 - constant)
    return peak * min(1.0, (step + 1) / warmup) * (final + (1 - final) * min(1.0, left))
