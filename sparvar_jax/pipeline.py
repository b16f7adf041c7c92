"""Prompt to picture: text encoder, plan, generation loop and tokenizer behind one call."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from sparvar_jax import generate, loading, sampling
from sparvar_jax.generate import Generator, Progress
from sparvar_jax.loading import Model
from sparvar_jax.models import bsq_vae, t5
from sparvar_jax.plan import Plan
from sparvar_jax.policies import parse_plan
from sparvar_jax.schedule import ScaleSchedule, infinity_schedule

PerScale = float | Sequence[float]
RATIO_TOLERANCE = 1.15  # of the asked for to the nearest ratio, beyond which a call warns
SEEDS = 1 << 32

# Making a sparse plan takes longer than dispatching its steps.
_cached_plan = functools.lru_cache(maxsize=64)(parse_plan)


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything one generation runs on. condition: of the whole batch. keys: one per image."""

    plan: Plan
    condition: Any
    controls: sampling.Controls
    keys: Array


class Pipeline:
    """Text to picture with one loaded model.

    Compiled steps and functions are kept, so the second call with the same plan, batch size and
    length bucket of the prompts compiles nothing.
    """

    def __init__(self, model: Model):
        self.model = model
        self.generator = Generator(model.transformer)
        self._encode = _bind(model.text_encoder, t5.encode)
        self._condition = {
            learned: _bind(model.transformer, condition)
            for learned, condition in ((True, _with_learned_guidance), (False, _with_guidance))
        }
        self._decode = _bind(model.tokenizer, _decode)

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | Path | None = None,
        *,
        dtype: str | None = None,
        progress: Progress | None = None,
    ) -> Pipeline:
        """Load a model directory; None is the demo model. Arguments as in `loading.load_model`."""
        return cls(loading.load_model(directory, dtype=dtype, progress=progress))

    def __call__(
        self, prompts: str | Sequence[str], *, progress: Progress | None = None, **options: Any
    ) -> UInt8[np.ndarray, "B height width 3"]:
        """Draw one RGB picture per prompt. Options are those of `request`.

        progress: called as (stage, done, total) with the stages "compile" and "draw".
        """
        request = self.request(prompts, **options)
        self._compile(request, progress)
        code_sum, total = None, len(request.plan.steps)
        for done, (state, _) in enumerate(self._steps(request), 1):
            code_sum = state.code_sum
            if progress:
                jax.block_until_ready(code_sum)
                progress("draw", done, total)
        return np.asarray(self._decode(code_sum))

    def stream(
        self, prompts: str | Sequence[str], *, progress: Progress | None = None, **options: Any
    ) -> Iterator[UInt8[np.ndarray, "B height width 3"]]:
        """The decoded pictures after every scale; the last ones equal those of a plain call."""
        request = self.request(prompts, **options)
        self._compile(request, progress)
        for state, _ in self._steps(request):
            yield np.asarray(self._decode(state.code_sum))

    def request(
        self,
        prompts: str | Sequence[str],
        *,
        plan: Plan | str | None = None,
        seed: int = 0,
        guidance: PerScale | None = None,
        guidance_layer: int | None = None,
        temperature: PerScale | None = None,
        top_p: float | None = None,
        aspect_ratio: float | str | None = None,
        size: str | None = None,
        negative: str | Sequence[str] | None = None,
    ) -> Request:
        """Resolve a call: defaults, plan, text features and random keys.

        plan: a Plan, or text such as "dense" or "sparvar-fast+drop_uncond(3)".
        seed: image b draws from seed + b, whatever else is in the batch.
        guidance, temperature: one value, or one a scale; guidance 1 is off.
        guidance_layer: mix the hidden state after this block instead of the logits.
        aspect_ratio: "W:H" or width / height, snapped to the nearest supported one.
        size: "0.06M", "0.25M", "0.60M" or "1M" of the model's largest picture.
        negative: what the pictures should not show; replaces the learned "no text".
        Raises ValueError for anything that cannot be drawn.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        defaults = self.model.defaults
        guide = _numbers(defaults.guidance if guidance is None else guidance)
        temper = _numbers(defaults.temperature if temperature is None else temperature)
        if isinstance(plan, Plan):
            if aspect_ratio is not None or size is not None or guidance_layer is not None:
                raise ValueError("a Plan fixes shape and guidance layer: leave these arguments out")
            chosen = plan
        else:
            schedule = resolve_schedule(self.model, aspect_ratio, size)
            chosen = resolve_plan(self.model, plan, schedule, guide, guidance_layer)
        if chosen.depth != self.model.transformer.config.depth:
            raise ValueError(
                f"the plan has {chosen.depth} layers, the model "
                f"{self.model.transformer.config.depth}: make the plan for this model"
            )
        controls = generate.controls(
            len(chosen.schedule),
            guidance=guide,
            temperature=temper,
            top_p=defaults.top_p if top_p is None else top_p,
        )
        if not 0 <= seed <= SEEDS - len(prompts):
            raise ValueError(f"seed must lie in 0..{SEEDS - len(prompts)}, got {seed}")
        condition = self.condition(prompts, negative, guided=chosen.steps[0].rows == "both")
        return Request(chosen, condition, controls, sampling.image_keys(seed, len(prompts)))

    def encode_text(
        self, prompts: Sequence[str]
    ) -> tuple[Float[Array, "B T Ct"], Int[np.ndarray, "B"]]:
        """Text features, zero behind each prompt's end, and lengths."""
        longest = self.model.transformer.config.text_max_length
        ids, lengths = self.model.text_tokenizer.encode(prompts, longest)
        return self._encode(ids, lengths), lengths

    def condition(
        self, prompts: Sequence[str], negative: str | Sequence[str] | None, *, guided: bool
    ) -> Any:
        """What the transformer is told: conditional rows, then unconditional ones if `guided`."""
        text, lengths = self.encode_text(prompts)
        if negative is None:
            return self._condition[guided](text, lengths, None)
        if not guided:
            raise ValueError("a negative prompt works through guidance, which is off: raise it")
        others = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(others) != len(prompts):
            raise ValueError(f"got {len(others)} negative prompts for {len(prompts)} prompts")
        return self._condition[False](text, lengths, self.encode_text(others))

    def _compile(self, request: Request, progress: Progress | None) -> None:
        batch = request.keys.shape[0]
        self.generator.compile(request.plan, request.condition, batch, progress=progress)

    def _steps(self, request: Request) -> Iterator[tuple[generate.State, generate.ScaleOutput]]:
        return self.generator.steps(request.plan, request.condition, request.controls, request.keys)


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
    guide = _numbers(model.defaults.guidance if guidance is None else guidance)
    flags = tuple(g != 1 for g in guide) if isinstance(guide, tuple) else guide != 1
    name = model.defaults.plan if plan is None else plan
    depth = model.transformer.config.depth
    return _cached_plan(name, schedule, depth, guidance=flags, merge_at=guidance_layer)


def picture_size(model: Model, schedule: ScaleSchedule) -> tuple[int, int]:
    """(height, width) in pixels of the pictures of a schedule."""
    stride = model.tokenizer.config.stride * (2 if model.transformer.config.patchify else 1)
    return schedule.final[0] * stride, schedule.final[1] * stride


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


def _numbers(value: PerScale) -> float | tuple[float, ...]:
    return float(value) if isinstance(value, int | float) else tuple(float(v) for v in value)


def _bind(module: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(module, ...)` compiled; the module is flattened once, not at every call."""
    leaves, treedef = jax.tree.flatten(module)
    compiled = jax.jit(lambda leaves, *args: function(jax.tree.unflatten(treedef, leaves), *args))
    return lambda *args: compiled(leaves, *args)


def _with_learned_guidance(model: Any, text: Array, lengths: Array, _: None) -> Any:
    return model.embed_condition(text, lengths, "learned")


def _with_guidance(model: Any, text: Array, lengths: Array, other: Any) -> Any:
    return model.embed_condition(text, lengths, other)


def _decode(tokenizer: bsq_vae.BsqVae, code_sum: Array) -> UInt8[Array, "B height width 3"]:
    return bsq_vae.to_uint8(tokenizer.decode(code_sum))
