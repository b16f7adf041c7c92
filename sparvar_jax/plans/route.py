"""Plans chosen between while a picture is drawn: they begin alike and part after a scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float

from sparvar_jax.plans.schedule import ScaleSchedule

Decode = Callable[[Float[Array, "B h w Cd"]], Float[Array, "B height width 3"]]
"""From a sum of codes to pictures in [-1, 1]; compiled, for arrays."""


@runtime_checkable
class Chooser(Protocol):
    """What chooses. name: short, for tables."""

    @property
    def name(self) -> str: ...

    def features(
        self,
        before: Float[Array, "B h w Cd"],
        now: Float[Array, "B h w Cd"],
        schedule: ScaleSchedule,
        decode: Decode,
    ) -> Float[Array, "B F"]:
        """What is seen of every picture, on the device; the host reads it once.

        before, now: the code sums before and after the scale of the choice.
        """
        ...

    def choose(self, features: Float[np.ndarray, "B F"]) -> list[int]:
        """For every picture the number of a plan, 0 being the most careful one."""
        ...


@dataclasses.dataclass(frozen=True)
class Route:
    """After step `after` one of several plans goes on, for all pictures of a batch the same.

    plans: from the most careful to the boldest; a batch takes the most careful choice of its
    pictures.
    """

    after: int
    chooser: Chooser
    plans: tuple[Any, ...]

    def check(self, first: Any) -> None:
        """Raise ValueError unless every plan can go on from where `first` has come to."""
        if first.steps != self.plans[0].steps:
            raise ValueError("a plan with a route has the steps of the route's first plan")
        if not 0 < self.after < len(first.steps):
            raise ValueError(
                f"a route parts after a step in 1..{len(first.steps) - 1}, got {self.after}: "
                "leave its plans more scales"
            )
        for number, plan in enumerate(self.plans):
            common = self.after + 1
            if plan.steps[:common] != first.steps[:common] or plan.route is not None:
                raise ValueError(
                    f"plan {number} of a route must begin with the first one's {common} steps and "
                    "have no route of its own"
                )
            for layer in range(first.depth):
                cached = [(p.whole_rows(layer), p.store(layer)) for p in (plan, first)]
                live = plan.live_after(self.after, layer) - first.live_after(self.after, layer)
                if cached[0] != cached[1] or live:
                    raise ValueError(
                        f"layer {layer}: plan {number} of a route keeps its cache or state unlike "
                        "the first: plans of a route differ in scales and rows, not in tokens"
                    )

    def pick(self, features: jax.Array) -> int:
        """The number of the plan for a batch; waits for the device once."""
        return min(self.chooser.choose(np.asarray(features)))
