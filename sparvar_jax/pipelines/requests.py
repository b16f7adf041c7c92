"""What a call of the pipeline asks for, and its resolution to schedule, plan and controls."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from sparvar_jax.models import sampling
from sparvar_jax.pipelines.loading import Model
from sparvar_jax.pipelines.text_encoder import TextFeatures
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.schedule import ScaleSchedule, infinity_schedule
from sparvar_jax.policies import parse_plan
from sparvar_jax.runtime import generate

PerScale = float | Sequence[float]
Prompts = str | Sequence[str] | TextFeatures
RATIO_TOLERANCE = 1.15  # of the asked for to the nearest ratio, beyond which a call warns

# Making a sparse plan takes longer than dispatching its steps.
cached_plan = functools.lru_cache(maxsize=64)(parse_plan)


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything one generation runs on. condition: of the whole batch. keys: one per image."""

    plan: Plan
    condition: Any
    controls: sampling.Controls
    keys: Array


@dataclasses.dataclass(frozen=True)
class Options:
    """How to draw; None takes the model's default.

    plan: a Plan, or text such as "dense" or "sparvar-fast+drop_uncond(3)".
    seed: image b draws from seed + b, whatever else is in the batch.
    guidance, temperature: one value, or one a scale; guidance 1 is off.
    guidance_layer: mix the hidden state after this block instead of the logits.
    aspect_ratio: "W:H" or width / height, snapped to the nearest supported one.
    size: "0.06M", "0.25M", "0.60M" or "1M" of the model's largest picture.
    negative: what the pictures should not show, as text or its features; replaces the learned
    "no text".
    """

    plan: Plan | str | None = None
    seed: int = 0
    guidance: PerScale | None = None
    guidance_layer: int | None = None
    temperature: PerScale | None = None
    top_p: float | None = None
    aspect_ratio: float | str | None = None
    size: str | None = None
    negative: Prompts | None = None

    def resolve(self, model: Model) -> tuple[Plan, sampling.Controls]:
        """The plan and the sampling controls; ValueError for what cannot be drawn."""
        defaults = model.defaults
        guide = numbers(defaults.guidance if self.guidance is None else self.guidance)
        temper = numbers(defaults.temperature if self.temperature is None else self.temperature)
        plan = self._plan(model, guide)
        depth = model.transformer.config.depth
        if plan.depth != depth:
            raise ValueError(
                f"the plan has {plan.depth} layers, the model {depth}: make the plan for this model"
            )
        controls = generate.controls(
            len(plan.schedule),
            guidance=guide,
            temperature=temper,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
        )
        return plan, controls

    def _plan(self, model: Model, guidance: float | tuple[float, ...]) -> Plan:
        shape = (self.aspect_ratio, self.size)
        if not isinstance(self.plan, Plan):
            schedule = resolve_schedule(model, *shape)
            return resolve_plan(model, self.plan, schedule, guidance, self.guidance_layer)
        if (*shape, self.guidance_layer) != (None, None, None):
            raise ValueError("a Plan fixes shape and guidance layer: leave these arguments out")
        return self.plan


def resolve_schedule(
    model: Model, aspect_ratio: float | str | None = None, size: str | None = None
) -> ScaleSchedule:
    """The scales of a picture; None takes the model's defaults. Warns of a ratio far away."""
    defaults = model.defaults
    ratio = parse_ratio(defaults.aspect_ratio if aspect_ratio is None else aspect_ratio)
    schedule = infinity_schedule(1 / ratio, size or defaults.size)
    height, width = schedule.final
    off = ratio * height / width
    if max(off, 1 / off) > RATIO_TOLERANCE:
        warnings.warn(
            f"the supported ratio nearest to {ratio:.3g} is {width / height:.3g}", stacklevel=3
        )
    return schedule


def resolve_plan(
    model: Model,
    plan: str | None,
    schedule: ScaleSchedule,
    guidance: PerScale | None = None,
    guidance_layer: int | None = None,
) -> Plan:
    """The plan that a text (None: the model's default) names, with guidance where it is not 1."""
    guide = numbers(model.defaults.guidance if guidance is None else guidance)
    flags = tuple(g != 1 for g in guide) if isinstance(guide, tuple) else guide != 1
    name = model.defaults.plan if plan is None else plan
    depth = model.transformer.config.depth
    return cached_plan(name, schedule, depth, guidance=flags, merge_at=guidance_layer)


def picture_size(model: Model, schedule: ScaleSchedule) -> tuple[int, int]:
    """(height, width) in pixels of the pictures of a schedule."""
    return schedule.final[0] * model.stride, schedule.final[1] * model.stride


def parse_ratio(ratio: float | str) -> float:
    """Width / height from a number or from "W:H"; ValueError for anything else."""
    try:
        if isinstance(ratio, str) and ":" in ratio:
            width, height = (float(part) for part in ratio.split(":"))
            value = width / height
        else:
            value = float(ratio)
    except (ValueError, ZeroDivisionError, TypeError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"aspect ratio must be W:H such as 16:9, or a positive number: {ratio!r}")
    return value


def numbers(value: PerScale) -> float | tuple[float, ...]:
    """A float, or a tuple of them: one a scale. Scalars of numpy and jax are numbers as well."""
    if isinstance(value, Sequence) or np.ndim(value):
        return tuple(float(v) for v in value)  # type: ignore[union-attr]
    return float(value)
