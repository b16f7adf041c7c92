"""What a call asks for that draws classes, and its resolution to plan and controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, SupportsIndex

from sparvar_jax.models.family import How
from sparvar_jax.models.sampling import Controls
from sparvar_jax.models.var_parts import guidance_ramp
from sparvar_jax.pipelines.numbers import PerScale, flag, guidance_of, numbers
from sparvar_jax.pipelines.requests import cached_plan
from sparvar_jax.plans.plan import Plan
from sparvar_jax.runtime.controls import controls as make_controls

OFF = 0.0  # the strength that leaves the conditional logits alone


@dataclasses.dataclass(frozen=True)
class ClassDefaults:
    """What a call uses where it does not say; the released evaluation settings.

    guidance: 0 is off; it grows linearly from the first scale to the last.
    """

    plan: str = "dense"
    guidance: float | tuple[float, ...] = 1.5
    temperature: float | tuple[float, ...] = 1.0
    top_k: int = 900
    top_p: float = 0.96


@dataclasses.dataclass(frozen=True)
class ClassOptions:
    """How to draw; None takes the model's default.

    plan: a Plan, or text such as "dense" or "sparvar-fast+skip_last_scales(1)".
    seed: image b draws from seed + b, or one seed an image; nothing else in the batch matters.
    guidance: strength at the last scale (0, or "off", is none), or the conditional weight of every
    scale. smooth: mix codes by a Gumbel softmax: smoother pictures, unfit for evaluation; None as
    the model says.
    top_k, top_p: filters over the vocabulary; 0 and 1 filter nothing.
    """

    plan: Plan | str | None = None
    seed: SupportsIndex | Sequence[SupportsIndex] = 0
    guidance: PerScale | str | None = None
    temperature: PerScale | None = None
    top_k: int | None = None
    top_p: float | None = None
    smooth: bool | None = None

    def resolve(self, model: Any) -> tuple[Plan, Controls]:
        """The plan and the sampling controls; ValueError for what cannot be drawn."""
        config, defaults = model.transformer.config, model.defaults
        guidance = defaults.guidance if self.guidance is None else self.guidance
        weights = _weights(guidance, len(config.sides))
        plan = defaults.plan if self.plan is None else self.plan
        if not isinstance(plan, Plan):
            flags = tuple(weight != 1 for weight in weights)
            plan = cached_plan(plan, config.schedule, config.depth, guidance=flags)
        if plan.depth != config.depth or plan.schedule != config.schedule:
            raise ValueError(
                f"the plan has {plan.depth} layers and scales {plan.schedule.sizes}, the model "
                f"{config.depth} and {config.schedule.sizes}: make the plan for this model"
            )
        controls = make_controls(
            len(config.sides),
            guidance=weights,
            temperature=numbers(
                "temperature",
                defaults.temperature if self.temperature is None else self.temperature,
            ),
            top_k=defaults.top_k if self.top_k is None else self.top_k,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
        )
        return plan, controls

    def how(self, model: Any) -> How:
        """How tokens are drawn."""
        smooth = model.transformer.config.smooth if self.smooth is None else self.smooth
        return "smooth" if flag("smooth", smooth) else "sample"


def _weights(guidance: Any, scales: int) -> tuple[float, ...]:
    weights = guidance_of(guidance, OFF)
    return weights if isinstance(weights, tuple) else guidance_ramp(weights, scales)
