"""What a call asks for of a model whose text stands before its grids, and its resolution."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, SupportsIndex

from sparvar_jax.models.family import How
from sparvar_jax.models.hart_parts import guidance_ramp
from sparvar_jax.models.sampling import Controls
from sparvar_jax.pipelines.numbers import PerScale, guidance_of, numbers
from sparvar_jax.pipelines.requests import cached_plan
from sparvar_jax.plans.plan import Plan
from sparvar_jax.runtime.controls import controls as make_controls

OFF = 0.0  # the strength that leaves the conditional logits alone


@dataclasses.dataclass(frozen=True)
class PrefixDefaults:
    """What a call uses where it does not say: the settings of all released scripts.

    guidance: 0 is off; it grows linearly from the first scale on. smooth: mix codes by a Gumbel
    softmax. system_prompt: let the text encoder read the released instruction before each prompt.
    """

    plan: str = "dense"
    guidance: float | tuple[float, ...] = 4.5
    temperature: float | tuple[float, ...] = 1.0
    top_p: float = 1.0
    smooth: bool = True
    system_prompt: bool = True


@dataclasses.dataclass(frozen=True)
class PrefixOptions:
    """How to draw prompts; None takes the model's default.

    plan: a Plan, or text such as "dense" or "sparvar-fast+drop_uncond(1)".
    seed: image b draws from seed + b, or one seed an image; nothing else in the batch matters.
    guidance: strength (0, or "off", is none), or the conditional weight of every scale; the
    residuals of the last scale are guided as its logits are.
    top_p: beside the fixed number of candidates a scale; 1 filters nothing.
    smooth: mix codes instead of drawing one a token. negative: what the pictures should not show,
    as text or its features; replaces "no text".
    """

    plan: Plan | str | None = None
    seed: SupportsIndex | Sequence[SupportsIndex] = 0
    guidance: PerScale | str | None = None
    temperature: PerScale | None = None
    top_p: float | None = None
    smooth: bool | None = None
    negative: Any = None

    def resolve(self, model: Any) -> tuple[Plan, Controls]:
        """The plan and the sampling controls; ValueError for what cannot be drawn."""
        config, defaults = model.transformer.config, model.defaults
        schedule, scales = config.schedule, len(config.sides)
        weights = guidance_of(defaults.guidance if self.guidance is None else self.guidance, OFF)
        if not isinstance(weights, tuple):
            weights = guidance_ramp(weights, scales)
        plan = defaults.plan if self.plan is None else self.plan
        if not isinstance(plan, Plan):
            flags = tuple(weight != 1 for weight in weights)
            plan = cached_plan(plan, schedule, config.depth, guidance=flags)
        if plan.depth != config.depth or plan.schedule != schedule:
            raise ValueError(
                f"the plan has {plan.depth} layers and scales {plan.schedule.sizes}, the model "
                f"{config.depth} and {schedule.sizes}: make the plan for this model"
            )
        temper = defaults.temperature if self.temperature is None else self.temperature
        controls = make_controls(
            scales,
            guidance=weights,
            temperature=numbers("temperature", temper),
            top_p=defaults.top_p if self.top_p is None else self.top_p,
        )
        return plan, controls

    def how(self, model: Any) -> How:
        """How tokens are drawn."""
        smooth = model.defaults.smooth if self.smooth is None else self.smooth
        return "smooth" if smooth else "sample"
