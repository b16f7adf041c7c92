"""A router: after the fourth scale from the end it picks, from what the picture has come to, how
much of the rest is drawn. Features and coefficients of SkipVAR (arXiv 2506.08908).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparvar_jax.models import quantizer
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.route import Decode, Route
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.policies.arguments import checked
from sparvar_jax.policies.routing import Policy
from sparvar_jax.policies.scales import drop_uncond, skip_last_scales

LOOK = 4
"""The scale on whose latent grid pictures are looked at: 8x8 tokens of the square schedule."""
FREE_CIRCLE = 0.4
"""Frequencies within this share of the half spectrum are low ones."""


@dataclasses.dataclass(frozen=True)
class Regression:
    """Multinomial logistic regression on two standardised features: one row a class."""

    mean: tuple[float, float]
    scale: tuple[float, float]
    coefficients: tuple[tuple[float, float], ...]
    intercepts: tuple[float, ...]

    def classes(self, features: Float[np.ndarray, "B 2"]) -> np.ndarray:
        """The likeliest class of every picture, counted from 0."""
        standard = (features.astype(np.float64) - self.mean) / np.asarray(self.scale)
        return np.argmax(standard @ np.asarray(self.coefficients).T + self.intercepts, axis=1)


SKIP = Regression(
    (0.11532, 0.48923),
    (0.05765, 0.07562),
    ((1.924, 1.724), (0.960, 0.297), (-0.0594, -0.5505), (-2.825, -1.470)),
    (-0.8910, 0.7389, 0.8068, -0.6548),
)
"""How many last scales to skip, 0..3, for a similarity (SSIM) of .84; fitted on Infinity-2B."""
ROWS = Regression(
    (0.17938, 0.57361),
    (0.06273, 0.05396),
    ((1.016, 0.991), (0.317, -0.0029), (-1.334, -0.988)),
    (-2.848, 0.4558, 2.392),
)
"""In how many last scales, 1..3, to leave the unconditional rows out where none is skipped."""


@dataclasses.dataclass(frozen=True)
class SkipVar:
    """SkipVAR's choice. careful: added to the intercept of "skip nothing"; 0 as published."""

    careful: float = 0.0

    name = "skipvar"

    def features(
        self,
        before: Float[Array, "B h w Cd"],
        now: Float[Array, "B h w Cd"],
        schedule: ScaleSchedule,
        decode: Decode,
    ) -> Float[Array, "B 2"]:
        """How much the outlines changed, and the share of high frequencies, of small pictures."""
        fine = before.shape[1] // schedule.final[0]
        size = tuple(fine * side for side in schedule.sizes[LOOK])
        pictures = [decode(_small(x, size=size)) for x in (before, now)]
        return _seen(*pictures)

    def choose(self, features: Float[np.ndarray, "B 2"]) -> list[int]:
        """0..2: rows left out in so many scales and one; 3..5: scales skipped."""
        careful = (SKIP.intercepts[0] + self.careful, *SKIP.intercepts[1:])
        skipped = dataclasses.replace(SKIP, intercepts=careful).classes(features)
        rows = ROWS.classes(features)
        return [2 + int(n) if n else int(m) for n, m in zip(skipped, rows, strict=True)]


@functools.partial(jax.jit, static_argnames="size")
def _small(x: Float[Array, "B h w Cd"], *, size: tuple[int, int]) -> Float[Array, "B h2 w2 Cd"]:
    return quantizer.resize(x, size)


@jax.jit
def _seen(
    before: Float[Array, "B height width 3"], now: Float[Array, "B height width 3"]
) -> Float[Array, "B 2"]:
    old, new = (x.astype(jnp.float32).mean(-1) for x in (before, now))
    change = jnp.abs(outlines(new) - outlines(old)).mean((1, 2))
    return jnp.stack([change, high_frequencies(new)], axis=-1)


def outlines(x: Float[Array, "B height width"]) -> Float[Array, "B height width"]:
    """Magnitude of Sobel's gradient, zeros beyond the border."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1)))
    smooth = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    across = smooth[:, :, 2:] - smooth[:, :, :-2]
    smooth = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
    along = smooth[:, 2:] - smooth[:, :-2]
    return jnp.sqrt(across**2 + along**2)


def high_frequencies(x: Float[Array, "B height width"]) -> Float[Array, "B"]:
    """Share of the spectrum's amplitude outside of a circle around frequency zero."""
    _, height, width = x.shape
    amplitude = jnp.abs(jnp.fft.fftshift(jnp.fft.fft2(x), axes=(1, 2)))
    radius = int(FREE_CIRCLE * min(height, width) / 2)
    y, x_ = np.ogrid[:height, :width]
    outside = (y - height // 2) ** 2 + (x_ - width // 2) ** 2 > radius**2
    return (amplitude * outside).sum((1, 2)) / amplitude.sum((1, 2))


@checked
def router(careful: float = 0.0) -> Policy:
    """Skip the last scales, or leave their unconditional rows out, as each picture allows.

    Chosen after the fourth scale from the end (SkipVAR, fitted on Infinity-2B for an SSIM of .84).
    A batch takes the most careful choice of its pictures; the host looks once. Policies after this
    one apply to every plan it may take. careful: raises how often nothing is skipped.
    """

    def apply(plan: Plan) -> Plan:
        after = len(plan.schedule) - 4
        if after <= LOOK or len(plan.steps) != len(plan.schedule):
            raise ValueError(
                f"router chooses among the last three of at least {LOOK + 5} scales, the plan "
                f"draws {len(plan.steps)} of {len(plan.schedule)}: take a larger size, and skip "
                "no scales before it"
            )
        plans = tuple(make(n)(plan) for make in (drop_uncond, skip_last_scales) for n in (1, 2, 3))
        return dataclasses.replace(plans[0], route=Route(after, SkipVar(careful), plans))

    return apply
