"""The residual head of HART: an MLP that denoises, for every token, what its code leaves out.

It is the diffusion loss head of MAR (arXiv 2406.11838): a network of the noisy residual, of the
time and of the token's hidden state, sampled in a few guided ancestral steps. Everything of a
schedule is computed once, in float64, when a step is traced; guidance and noise are traced.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from sparvar_jax.models import layers
from sparvar_jax.models.layers import Linear, Precision

BASE_STEPS = 1000
SIZE = 0.6
"""What a residual is multiplied by: part of the released code, not of the weights."""
SINUSOIDS = 256
NEUTRAL = 1.0
"""The guidance at which the released code does not mix; by its formula that would be at 0."""


@dataclasses.dataclass(frozen=True)
class ResidualShape:
    """Shape of a residual head. steps: of its sampler."""

    code_width: int
    condition_width: int
    width: int = 1024
    depth: int = 6
    steps: int = 8

    def __post_init__(self):
        if min(dataclasses.astuple(self)) < 1 or not 2 <= self.steps <= BASE_STEPS:
            raise ValueError(
                f"a residual head needs positive sizes and 2..{BASE_STEPS} steps, got {self}"
            )


class Schedule(NamedTuple):
    """The respaced cosine schedule, float64, one entry a step; entry 0 has the least noise.

    times: what the network is told. recip, recipm1: square roots of 1 / alpha and 1 / alpha - 1,
    alpha being the product of what every step keeps. mean_start, mean_now: weights of the predicted
    start and of the current state in the next mean. log_least: logarithm of the least variance.
    """

    times: Shaped[np.ndarray | Array, "K"]
    betas: Float[np.ndarray | Array, "K"]
    alphas: Float[np.ndarray | Array, "K"]
    recip: Float[np.ndarray | Array, "K"]
    recipm1: Float[np.ndarray | Array, "K"]
    mean_start: Float[np.ndarray | Array, "K"]
    mean_now: Float[np.ndarray | Array, "K"]
    log_least: Float[np.ndarray | Array, "K"]


@functools.lru_cache
def schedule(steps: int) -> Schedule:
    """The tables of a sampler of so many steps, spread over the 1000 the head was trained with."""
    edges = np.arange(BASE_STEPS + 1) / BASE_STEPS
    kept = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    base = np.cumprod(1 - np.minimum(1 - kept[1:] / kept[:-1], 0.999))
    times = np.array([round(k * (BASE_STEPS - 1) / (steps - 1)) for k in range(steps)])
    before = np.concatenate([[1.0], base[times][:-1]])
    betas = 1 - base[times] / before
    alphas = np.cumprod(1 - betas)
    before = np.concatenate([[1.0], alphas[:-1]])
    least = betas * (1 - before) / (1 - alphas)
    return Schedule(
        times,
        betas,
        alphas,
        np.sqrt(1 / alphas),
        np.sqrt(1 / alphas - 1),
        betas * np.sqrt(before) / (1 - alphas),
        (1 - before) * np.sqrt(1 - betas) / (1 - alphas),
        np.log(np.concatenate([least[1:2], least[1:]])),
    )


def sinusoids(x: Shaped[Array, "K"]) -> Float[Array, "K channels"]:
    """Cosines, then sines, of numbers at 128 frequencies from 1 down to nearly 1/10000."""
    half = SINUSOIDS // 2
    frequencies = np.exp(-np.log(10000.0) * np.arange(half, dtype=np.float32) / half)
    angles = x.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _exact(inputs: int, outputs: int, precision: Precision, rngs: nnx.Rngs) -> Linear:
    """A linear map of float32 weights and products."""
    single = jnp.float32
    return layers.linear(inputs, outputs, precision, rngs, weights=single, compute=single)


class NumberEmbed(nnx.Module):
    """Numbers (a diffusion time, a scale) to vectors: sinusoids and a small MLP, in float32."""

    def __init__(self, width: int, precision: Precision, rngs: nnx.Rngs):
        self.fc1 = _exact(SINUSOIDS, width, precision, rngs)
        self.fc2 = _exact(width, width, precision, rngs)

    def __call__(self, x: Shaped[Array, "K"]) -> Float[Array, "K C"]:
        return self.fc2(jax.nn.silu(self.fc1(sinusoids(x))))


class ResidualBlock(nnx.Module):
    """A gated, modulated MLP on the float32 residual stream of the head."""

    def __init__(self, width: int, precision: Precision, rngs: nnx.Rngs):
        self.norm = layers.Scale(width, bias=True, dtype=jnp.float32)
        self.ada = layers.linear(width, 3 * width, precision, rngs)
        self.fc1 = layers.linear(width, width, precision, rngs)
        self.fc2 = layers.linear(width, width, precision, rngs)

    def __call__(
        self, h: Float[Array, "G M W"], active: Float[Array, "G M W"]
    ) -> Float[Array, "G M W"]:
        shift, scale, gate = jnp.split(self.ada(active).astype(jnp.float32), 3, axis=-1)
        assert self.norm.bias is not None
        x = layers.layer_norm(h) * self.norm.scale[...] + self.norm.bias[...]
        branch = self.fc2(jax.nn.silu(self.fc1(x * (1 + scale) + shift)))
        return h + gate * branch.astype(jnp.float32)


class ResidualHead(nnx.Module):
    """Parameters of the head, and its network; `sample` is what callers want."""

    def __init__(self, shape: ResidualShape, precision: Precision, rngs: nnx.Rngs):
        self.shape, width = shape, shape.width
        self.time_embed = NumberEmbed(width, precision, rngs)
        self.cond_embed = layers.linear(shape.condition_width, width, precision, rngs)
        self.input_proj = _exact(shape.code_width, width, precision, rngs)
        self.blocks = nnx.List([ResidualBlock(width, precision, rngs) for _ in range(shape.depth)])
        self.final_ada = layers.linear(width, 2 * width, precision, rngs)
        # At the noisiest step its result is multiplied by twenty thousand.
        self.final = _exact(width, 2 * shape.code_width, precision, rngs)

    def network(
        self,
        x: Float[Array, "M N"],
        time: Float[Array, "W"],
        condition: Float[Array, "G M W"],
    ) -> Float[Array, "G M N2"]:
        """Noise and variance [.., 2N], float32, of the same states under every condition.

        time, condition: as `time_embed` and `cond_embed` make them.
        """
        active = jax.nn.silu((condition + time).astype(self.cond_embed.dtype))
        h = jnp.broadcast_to(self.input_proj(x), (*condition.shape[:2], self.shape.width))
        for block in self.blocks:
            h = block(h, active)
        shift, scale = jnp.split(self.final_ada(active).astype(jnp.float32), 2, axis=-1)
        return self.final(layers.layer_norm(h) * (1 + scale) + shift)


class Denoised(NamedTuple):
    """One residual a row, and what every step saw, the noisiest first."""

    residual: Float[Array, "M N"]
    states: Float[Array, "K M N"]
    outputs: Float[Array, "K G M N2"]
    starts: Float[Array, "K M N"]


def sample(
    head: ResidualHead,
    condition: Float[Array, "G M C"],
    guidance: Float[Array, ""],
    noise: Float[Array, "K1 M N"],
) -> Denoised:
    """Residuals of M tokens by guided ancestral sampling, float32.

    condition: hidden states; of two groups the second is unconditional, one group is not guided.
    guidance: t of `(1 + t) * conditional - t * unconditional`; 1 mixes nothing, as released.
    noise: N(0, 1), the initial states and then one draw a step, the last of which is not used.
    """
    steps = head.shape.steps
    table = Schedule(*(jnp.asarray(values[::-1].copy(), jnp.float32) for values in schedule(steps)))
    logs = jnp.asarray(np.log(schedule(steps).betas)[::-1].copy(), jnp.float32)
    strength = jnp.where(guidance == NEUTRAL, 0.0, guidance)
    embedded = head.cond_embed(condition).astype(jnp.float32)
    times = head.time_embed(jnp.asarray(table.times))

    def step(x: Array, of: tuple[Any, ...]) -> tuple[Array, tuple[Array, ...]]:
        entry, log_most, time, draw, last = of
        output = head.network(x, time, embedded)
        eps, variance = jnp.split(output, 2, axis=-1)
        mixed = eps[0] if len(eps) == 1 else (1 + strength) * eps[0] - strength * eps[1]
        start = jnp.clip(entry.recip * x - entry.recipm1 * mixed, -1, 1)
        mean = entry.mean_start * start + entry.mean_now * x
        share = (variance[0] + 1) / 2
        log_variance = share * log_most + (1 - share) * entry.log_least
        following = mean + jnp.where(last, 0.0, jnp.exp(log_variance / 2) * draw)
        return following, (x, output, start)

    ending = jnp.arange(steps) == steps - 1
    x, seen = jax.lax.scan(step, noise[0], (table, logs, times, noise[1:], ending))
    return Denoised(SIZE * x, *seen)
