"""What a call asks for that draws prompts, and its resolution to schedule, plan and controls."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, SupportsIndex

from jaxtyping import Array, Key

from sparvar_jax.models import sampling
from sparvar_jax.models.family import How
from sparvar_jax.pipelines.numbers import (
    PerScale,
    guidance_of,
    numbers,
    parse_ratio,
)
from sparvar_jax.pipelines.text_encoder import TextFeatures
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.schedule import SIZES, ScaleSchedule, infinity_schedule
from sparvar_jax.policies import parse_plan
from sparvar_jax.runtime.controls import controls as make_controls
from sparvar_jax.weights.json_file import BOUNDS
from sparvar_jax.weights.numbers import whole
from sparvar_jax.weights.told import shown

Prompts = str | Sequence[str] | TextFeatures
RATIO_TOLERANCE = 1.15  # of the asked for to the nearest ratio, beyond which a call warns

OFF = 1.0  # the weight of the conditional logits that leaves them alone

# Making a sparse plan takes longer than dispatching its steps.
_cached_plan = functools.lru_cache(maxsize=64)(parse_plan)


def cached_plan(text: Any, schedule: ScaleSchedule, depth: int, **options: Any) -> Plan:
    """`parse_plan`, each plan made once; ValueError for what is no text."""
    if not isinstance(text, str):
        raise ValueError(
            f"a plan is a Plan, or text such as 'dense', got {shown(text)}: `sparvar plans` "
            "lists them"
        )
    return _cached_plan(text, schedule, depth, **options)


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a call uses where it does not say; the `defaults` of `config.json`.

    guidance, temperature: one value, or one a scale. aspect_ratio: width / height.
    """

    plan: str = "dense"
    guidance: float | tuple[float, ...] = 3.0
    temperature: float | tuple[float, ...] = 0.5
    top_p: float = 0.97
    size: str = "1M"
    aspect_ratio: float = 1.0


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything one generation runs on. condition: of the whole batch. keys: one an image."""

    plan: Plan
    condition: Any
    controls: sampling.Controls
    keys: Key[Array, "B"]
    how: How = "sample"


@dataclasses.dataclass(frozen=True)
class Options:
    """How to draw prompts; None takes the model's default.

    plan: a Plan, or text such as "dense" or "sparvar-fast+drop_uncond(3)".
    seed: image b draws from seed + b, or one seed an image; nothing else in the batch matters.
    guidance, temperature: one value, or one a scale; guidance 1, or "off", is none.
    guidance_layer: mix the hidden state after this block instead of the logits.
    aspect_ratio: "W:H" or width / height, snapped to the nearest supported one.
    size: "0.06M", "0.25M", "0.60M" or "1M" of the model's largest picture.
    negative: what the pictures should not show, as text or its features; replaces the learned
    "no text".
    """

    plan: Plan | str | None = None
    seed: SupportsIndex | Sequence[SupportsIndex] = 0
    guidance: PerScale | str | None = None
    guidance_layer: int | None = None
    temperature: PerScale | None = None
    top_p: float | None = None
    aspect_ratio: float | str | None = None
    size: str | None = None
    negative: Prompts | None = None

    def resolve(self, model: Any) -> tuple[Plan, sampling.Controls]:
        """The plan and the sampling controls; ValueError for what cannot be drawn."""
        defaults = model.defaults
        guide = guidance_of(defaults.guidance if self.guidance is None else self.guidance, OFF)
        temper = defaults.temperature if self.temperature is None else self.temperature
        plan = self._plan(model, guide)
        depth = model.transformer.config.depth
        if plan.depth != depth:
            raise ValueError(
                f"the plan has {plan.depth} layers, the model {depth}: make the plan for this model"
            )
        controls = make_controls(
            len(plan.schedule),
            guidance=guide,
            temperature=numbers("temperature", temper),
            top_p=defaults.top_p if self.top_p is None else self.top_p,
        )
        return plan, controls

    def how(self, model: Any) -> How:
        """How tokens are drawn."""
        del model
        return "sample"

    def _plan(self, model: Any, guidance: float | tuple[float, ...]) -> Plan:
        shape = (self.aspect_ratio, self.size)
        if not isinstance(self.plan, Plan):
            schedule = resolve_schedule(model, *shape)
            return resolve_plan(model, self.plan, schedule, guidance, self.guidance_layer)
        if (*shape, self.guidance_layer) != (None, None, None):
            raise ValueError("a Plan fixes shape and guidance layer: leave these arguments out")
        return self.plan


def resolve_schedule(
    model: Any, aspect_ratio: float | str | None = None, size: str | None = None
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
    model: Any,
    plan: str | None,
    schedule: ScaleSchedule,
    guidance: PerScale | None = None,
    guidance_layer: int | None = None,
) -> Plan:
    """The plan that a text (None: the model's default) names, with guidance where it is not 1."""
    guide = guidance_of(model.defaults.guidance if guidance is None else guidance, OFF)
    flags = tuple(g != 1 for g in guide) if isinstance(guide, tuple) else guide != 1
    name = model.defaults.plan if plan is None else plan
    depth = model.transformer.config.depth
    merge = None if guidance_layer is None else whole("guidance_layer", guidance_layer)
    return cached_plan(name, schedule, depth, guidance=flags, merge_at=merge)


def picture_size(model: Any, schedule: ScaleSchedule) -> tuple[int, int]:
    """(height, width) in pixels of the pictures of a schedule."""
    return schedule.final[0] * model.stride, schedule.final[1] * model.stride


def shape_of(model: Any, height: SupportsIndex, width: SupportsIndex) -> tuple[float, str]:
    """(width / height, size) whose pictures come nearest to so many pixels.

    Raises ValueError for a side that is not a positive whole number. Warns where the pictures that
    can be drawn differ.
    """
    high, wide = whole("height", height), whole("width", width)
    if not 1 <= min(high, wide) <= max(high, wide) <= BOUNDS["pixels"][1]:
        raise ValueError(
            "height and width must be positive numbers of pixels, at most "
            f"{BOUNDS['pixels'][1]}, got {shown(high)}x{shown(wide)}"
        )
    sizes = {size: picture_size(model, infinity_schedule(high / wide, size)) for size in SIZES}
    size = min(sizes, key=lambda name: abs(math.log(math.prod(sizes[name]) / (high * wide))))
    if sizes[size] != (high, wide):
        near = "{}x{}".format(*sizes[size])
        warnings.warn(f"the supported size nearest to {high}x{wide} is {near}", stacklevel=3)
    return wide / high, size
