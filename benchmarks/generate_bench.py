"""One model at one batch and picture size: compiling, drawing and timing."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from benchmarks import models
from benchmarks.models import Parts
from sparvar_jax.models import hart_parts, sampling
from sparvar_jax.models.family import How
from sparvar_jax.models.var_parts import guidance_ramp
from sparvar_jax.pipelines.class_requests import ClassDefaults
from sparvar_jax.pipelines.decoding import decode, look_at
from sparvar_jax.pipelines.pipeline import code_sum_shape
from sparvar_jax.pipelines.prefix_requests import PrefixDefaults
from sparvar_jax.pipelines.prefix_text import PrefixEncoder, PrefixFeatures
from sparvar_jax.pipelines.text_encoder import TextEncoder, TextFeatures
from sparvar_jax.plans.caches import Cache, with_cache
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.schedule import ScaleSchedule, infinity_schedule
from sparvar_jax.policies import parse_plan
from sparvar_jax.runtime import generate
from sparvar_jax.runtime.bound import Bound, to_host
from sparvar_jax.runtime.devices import Devices
from sparvar_jax.runtime.generate import Generator, ScaleOutput, State
from sparvar_jax.runtime.placement import Placement
from sparvar_jax.runtime.step import StepSpec, step_spec

BEYOND = {"2.25M": ((80, 80), (96, 96))}
"""Square schedules longer than any released one (1536 px), to show how cost grows."""
PROMPT = "a red apple to the left of a blue cup on a wooden table"
GUIDANCE = 3.0
PATIENCE_SECONDS = 15.0  # a slow row is not repeated for longer

Clock = list[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the pictures of one model are drawn. guidance: conditional weight of every scale."""

    schedule: ScaleSchedule
    guidance: tuple[float, ...]
    controls: sampling.Controls
    how: How = "sample"


def schedule_of(ratio: float, size: str) -> ScaleSchedule:
    """A released schedule, or the square 1M one with more scales. ratio: height over width.

    Raises ValueError for a size that does not exist at this ratio.
    """
    if size not in BEYOND:
        return infinity_schedule(ratio, size)
    if ratio != 1:
        raise ValueError(f"size {size} is square only, got a ratio of {ratio}: use 1")
    return ScaleSchedule.of(infinity_schedule(1.0, "1M").sizes + BEYOND[size])


def setting_of(parts: Parts, size: str | None) -> Setting:
    """The schedule, guidance and sampling of a model; some have one size."""
    how: How = "sample"
    if parts.begins_with_text:
        schedule, chosen = parts.transformer.config.schedule, PrefixDefaults()
        assert isinstance(chosen.guidance, float)
        guidance = hart_parts.guidance_ramp(chosen.guidance, len(schedule))
        options: dict[str, Any] = {"temperature": chosen.temperature, "top_p": chosen.top_p}
        how = "smooth" if chosen.smooth else "sample"
    elif parts.draws_classes:
        schedule, defaults = parts.transformer.config.schedule, ClassDefaults()
        guidance = guidance_ramp(1.5, len(schedule))
        kept = {"top_k": defaults.top_k, "top_p": defaults.top_p}
        options = {"temperature": defaults.temperature, **kept}
    else:
        schedule = schedule_of(parts.ratio, size or parts.size)
        guidance, options = (GUIDANCE,) * len(schedule), {}
    controls = generate.controls(len(schedule), guidance=guidance, **options)
    return Setting(schedule, guidance, controls, how)


class Bench:
    """One model at one batch and picture size; plans share their compiled steps.

    text: what the pictures are drawn from: features, an encoder that is part of every draw, or
    None for random features. Class-conditional models draw class after class. placement: devices
    that divide the work; None is one.
    """

    def __init__(
        self,
        parts: Parts,
        batch: int,
        size: str | None = None,
        text: TextFeatures | PrefixFeatures | TextEncoder | PrefixEncoder | None = None,
        cache: Cache = "full",
        placement: Placement | Devices | None = None,
    ):
        self.parts, self.batch, self.setting = parts, batch, setting_of(parts, size)
        self.keys = sampling.image_keys(0, batch)
        look = Bound(lambda: parts.tokenizer, look_at, placement)
        self.generator = Generator(parts.transformer, parts.codebook, placement, look)
        self._text = text
        self._embedding = _embed_classes if parts.draws_classes else _embed_text
        self._embed = Bound(lambda: parts.transformer, self._embedding, placement)
        self._decode = Bound(lambda: parts.tokenizer, decode, placement, bands=True)
        self._cache = cache
        self._specs: set[StepSpec] = set()

    def plan(self, name: str) -> Plan:
        """A plan of this model's depth, with guidance wherever its weight is not one."""
        flags = tuple(weight != 1 for weight in self.setting.guidance)
        depth = self.parts.transformer.config.depth
        plan = parse_plan(name, self.setting.schedule, depth, guidance=flags)
        return with_cache(plan, self._cache)

    def new_programs(self, plans: Sequence[Plan]) -> int:
        """How many steps of these plans are not compiled yet."""
        return len(self._specs_of(plans) - self._specs)

    def _specs_of(self, plans: Sequence[Plan]) -> set[StepSpec]:
        return {
            step_spec(plan, index, how=self.how)
            for plan in plans
            for index in range(len(plan.steps))
        }

    @property
    def how(self) -> How:
        """How tokens are drawn."""
        return self.setting.how

    @property
    def is_fresh(self) -> bool:
        """Whether nothing was compiled yet."""
        return not self._specs

    def compile(self, plans: Sequence[Plan]) -> None:
        """Compile all that drawing with these plans runs, in parallel threads."""
        inputs, jobs = self._input_shapes()
        jobs = [*jobs, lambda: self._embed.compile(*inputs)]
        jobs += [lambda: self._decode.compile(self.code_shape(plans[0]))]
        condition = self.condition_shape()
        jobs += [
            functools.partial(self.generator.compile, plan, condition, self.batch, how=self.how)
            for plan in plans
        ]
        with ThreadPoolExecutor(len(jobs)) as pool:
            for running in [pool.submit(job) for job in jobs]:
                running.result()
        self._specs |= self._specs_of(plans)

    def programs(self, plan: Plan) -> tuple[Any, ...]:
        """The executables of a compiled plan's steps, and of the decoder."""
        steps = self.generator.compile(plan, self.condition_shape(), self.batch, how=self.how)
        return (*steps, self._decode.compile(self.code_shape(plan)))

    def draw(self, plan: Plan, clock: Clock | None = None) -> UInt8[np.ndarray, "B h w 3"]:
        """The pictures of one generation; with a clock every part is waited for and timed."""

        def tick(name: str, value: Any) -> None:
            if clock is not None:
                jax.block_until_ready(value)
                clock.append((name, time.perf_counter()))

        tick("start", None)
        condition = self.condition()
        tick("text", condition)
        code_sum, steps = None, self.steps(plan, condition)
        del condition  # freed before the decoder runs, as in the pipeline
        for index, (state, _) in enumerate(steps):
            code_sum = state.code_sum
            tick(f"scale {index}", state)
        jax.block_until_ready(code_sum)  # as the pipeline waits, which says why
        image = to_host(self._decode(code_sum))
        tick("decode", None)
        return image

    def steps(self, plan: Plan, condition: Any) -> Iterator[tuple[State, ScaleOutput]]:
        """State and output after every scale, from the programs that `draw` runs."""
        controls = self.setting.controls
        return self.generator.steps(plan, condition, controls, self.keys, how=self.how)

    def release(self, plan: Plan) -> None:
        """Free the cache buffers kept from the last generation with this plan."""
        self.generator.start(plan, self.batch)

    def condition(self) -> Any:
        """What the steps take of class labels, of a prompt, or of text features."""
        return self._embed(*self._features())

    @functools.cached_property
    def plain_condition(self) -> Any:
        """The same from the model without kernels of ours, in its plain form."""
        plain = models.without_kernels(self.parts.transformer)
        return Bound(lambda: plain, self._embedding)(*self._features())

    def _features(self) -> tuple[Any, ...]:
        if isinstance(self._text, TextEncoder | PrefixEncoder):
            return tuple(self._text([PROMPT] * self.batch))
        return self._inputs

    def condition_shape(self) -> Any:
        return self._embed.shape(*self._input_shapes()[0])

    def code_shape(self, plan: Plan) -> Any:
        """What the tokenizer decodes, as shape and dtype."""
        return code_sum_shape(self.parts.transformer, plan, self.batch)

    @functools.cached_property
    def _inputs(self) -> tuple[Any, ...]:
        config = self.parts.transformer.config
        if self.parts.draws_classes:
            return (jnp.arange(self.batch) % config.classes,)
        if isinstance(self._text, TextFeatures | PrefixFeatures):
            return tuple(self._text)
        if self.parts.begins_with_text:
            return tuple(models.prefix_features(self.batch, config))
        return tuple(models.text_features(self.batch, config.text_width, config.text_max_length))

    def _input_shapes(self) -> tuple[tuple[Any, ...], list[Any]]:
        """Shapes of what `condition` embeds, and what compiles the text encoder."""
        if isinstance(self._text, TextEncoder | PrefixEncoder):
            features, job = self._text.shape([PROMPT] * self.batch)
            return tuple(features), [job]
        return self._inputs, []


def _embed_text(model: Any, text: Float[Array, "B M Ct"], ends: Int[Array, "B ..."]) -> Any:
    return model.embed_condition(text, ends, "learned")


def _embed_classes(model: Any, labels: Int[Array, "B"]) -> Any:
    return model.embed_condition(labels, True)


def measure(bench: Bench, plan: Plan, repeats: int) -> dict[str, Any]:
    """Timings of a compiled plan: first picture, warm median and spread, by part and by scale.

    Raises RuntimeError where the pictures are flat or anything drawn is not finite.
    """
    start = time.perf_counter()
    picture = bench.draw(plan)
    first = time.perf_counter() - start
    if picture.std() < 1:
        raise RuntimeError(f"{plan.name}: the pictures are flat: the generation did not run")
    bench.draw(plan)  # the second run of a program records its command buffers
    totals: list[float] = []
    while len(totals) < repeats and (len(totals) < 2 or sum(totals) < PATIENCE_SECONDS):
        before = time.perf_counter()
        bench.draw(plan)
        totals.append(time.perf_counter() - before)
    clock: Clock = []
    bench.draw(plan, clock)
    spent = {name: after - before for (_, before), (name, after) in itertools.pairwise(clock)}
    scales = [seconds for name, seconds in spent.items() if name.startswith("scale")]
    parts = {"text": spent["text"], "transformer": sum(scales), "decode": spent["decode"]}
    median = float(np.median(totals))
    return {
        "pixels": list(picture.shape[1:3]),
        "seconds_median": median,
        "seconds_spread": float(np.ptp(totals)),
        "seconds_all": totals,
        "images_per_second": bench.batch / median,
        "seconds_by_part": parts,
        "seconds_by_scale": scales,
        "first_draw_seconds": first,
    }
