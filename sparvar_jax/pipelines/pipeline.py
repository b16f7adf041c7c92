"""Prompt to picture: text encoder, plan, generation loop and tokenizer behind one call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, UInt8

from sparvar_jax.models import bsq_vae, sampling
from sparvar_jax.models.family import How
from sparvar_jax.pipelines import loading
from sparvar_jax.pipelines.loading import Model
from sparvar_jax.pipelines.requests import (
    Options,
    PerScale,
    Prompts,
    Request,
    parse_ratio,
    picture_size,
    resolve_plan,
    resolve_schedule,
)
from sparvar_jax.pipelines.text_encoder import TextEncoder, TextFeatures
from sparvar_jax.plans.plan import Plan
from sparvar_jax.runtime import generate
from sparvar_jax.runtime.bound import Bound, to_host
from sparvar_jax.runtime.generate import Generator, Progress

__all__ = [
    "Options",
    "PerScale",
    "Pipeline",
    "Request",
    "TextEncoder",
    "TextFeatures",
    "parse_ratio",
    "picture_size",
    "resolve_plan",
    "resolve_schedule",
]
SEEDS = 1 << 32
Jobs = list[Callable[[], Any]]


class Pipeline:
    """Text to picture with one loaded model.

    Compiled steps and functions are kept, so the second call with the same plan, batch size and
    length bucket of the prompts compiles nothing.
    """

    def __init__(self, model: Model, *, text_encoder: bool = True):
        self.model = model
        self.generator = Generator(model.transformer)
        longest = model.transformer.config.text_max_length
        self._text = (
            TextEncoder(model.text_encoder, model.text_tokenizer, longest) if text_encoder else None
        )
        self._condition = {
            learned: Bound(model.transformer, condition)
            for learned, condition in ((True, _with_learned_guidance), (False, _with_guidance))
        }
        self._decode = Bound(model.tokenizer, _decode)

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | Path | None = None,
        *,
        dtype: str | None = None,
        text_encoder: bool = True,
        progress: Progress | None = None,
    ) -> Pipeline:
        """Load a model directory; None is the demo model.

        text_encoder: False loads none, for calls with features of a `TextEncoder` used before.
        Other arguments as in `loading.load_model`.
        """
        model = loading.load_model(
            directory, dtype=dtype, text_encoder=text_encoder, progress=progress
        )
        return cls(model, text_encoder=text_encoder)

    def __call__(
        self, prompts: Prompts, *, progress: Progress | None = None, **options: Any
    ) -> UInt8[np.ndarray, "B height width 3"]:
        """Draw one RGB picture per prompt, or per row of text features.

        Options are those of `requests.Options`. progress: called as (stage, done, total) with the
        stages "compile" and "draw".
        """
        request = self.request(prompts, **options)
        self._compile(request, progress)
        code_sum, total = None, len(request.plan.steps)
        for done, (state, _) in enumerate(self._steps(request), 1):
            code_sum = state.code_sum
            if progress:
                jax.block_until_ready(code_sum)
                progress("draw", done, total)
        return to_host(self._decode(code_sum))

    def stream(
        self, prompts: Prompts, *, progress: Progress | None = None, **options: Any
    ) -> Iterator[UInt8[np.ndarray, "B height width 3"]]:
        """The decoded pictures after every scale; the last ones equal those of a plain call.

        What cannot be drawn is refused at once, not at the first picture.
        """
        return self._stream(self.request(prompts, **options), progress)

    def _stream(
        self, request: Request, progress: Progress | None
    ) -> Iterator[UInt8[np.ndarray, "B height width 3"]]:
        self._compile(request, progress)
        for state, _ in self._steps(request):
            yield to_host(self._decode(state.code_sum))

    def request(self, prompts: Prompts, **options: Any) -> Request:
        """Resolve a call: plan, controls, condition and random keys, as `Options` say.

        Raises ValueError for anything that cannot be drawn.
        """
        asked, prompts = Options(**options), _listed(prompts)
        plan, controls = asked.resolve(self.model)
        batch = _batch(prompts, asked.seed)
        learned, arguments = _condition_arguments(prompts, asked.negative, plan, self.encode_text)
        condition = self._condition[learned](*arguments)
        return Request(plan, condition, controls, sampling.image_keys(asked.seed, batch))

    def warm_up(
        self, prompts: Prompts, *, progress: Progress | None = None, **options: Any
    ) -> None:
        """Compile all that a call with these arguments runs, in parallel, and draw nothing.

        Of the prompts only their number and length bucket matter. Works without weights as well.
        """
        asked, prompts, jobs = Options(**options), _listed(prompts), []
        plan, _ = asked.resolve(self.model)
        batch = _batch(prompts, asked.seed)
        learned, arguments = _condition_arguments(
            prompts, asked.negative, plan, lambda texts: self._text_shape(texts, jobs)
        )
        condition = self._condition[learned]
        jobs += [lambda: condition.compile(*arguments)]
        jobs += [lambda: self._decode.compile(code_sum_shape(self.model.transformer, plan, batch))]
        compile_all(self.generator, plan, condition.shape(*arguments), batch, jobs, progress)

    def encode_text(self, prompts: Prompts) -> TextFeatures:
        """Text features of prompts; features are returned as they are."""
        if isinstance(prompts, TextFeatures):
            return prompts
        return self._encoder()(_listed(prompts))

    def _text_shape(self, prompts: Prompts, jobs: Jobs) -> TextFeatures:
        if isinstance(prompts, TextFeatures):
            return prompts
        features, job = self._encoder().shape(prompts)
        jobs.append(job)
        return features

    def _encoder(self) -> TextEncoder:
        if self._text is None:
            raise ValueError(
                "this pipeline has no text encoder: give it the features of a TextEncoder, or load "
                "it with text_encoder=True"
            )
        return self._text

    def _compile(self, request: Request, progress: Progress | None) -> None:
        batch = request.keys.shape[0]
        self.generator.compile(request.plan, request.condition, batch, progress=progress)

    def _steps(self, request: Request) -> Iterator[tuple[generate.State, generate.ScaleOutput]]:
        return self.generator.steps(request.plan, request.condition, request.controls, request.keys)


def compile_all(
    generator: Generator,
    plan: Plan,
    condition: Any,
    batch: int,
    jobs: Jobs,
    progress: Progress | None,
    how: How = "sample",
) -> None:
    """Compile a plan's steps, and beside them whatever else a call needs."""
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(job) for job in jobs]
        generator.compile(plan, condition, batch, how=how, progress=progress)
        for job in running:
            job.result()


def code_sum_shape(transformer: Any, plan: Plan, batch: int) -> Any:
    """What the tokenizer decodes, as shape and dtype."""
    return jax.eval_shape(lambda: transformer.start_codes(batch, plan.schedule))


def count(prompts: Sequence[str] | TextFeatures) -> int:
    """How many pictures prompts or their features ask for."""
    return len(prompts.lengths) if isinstance(prompts, TextFeatures) else len(prompts)


def _batch(prompts: Sequence[str] | TextFeatures, seed: int) -> int:
    """How many pictures, each of which must have a seed."""
    batch = count(prompts)
    try:
        seed = operator.index(seed)
    except TypeError:
        raise ValueError(f"seed must be a whole number, got {seed!r}") from None
    if not 0 <= seed <= SEEDS - batch:
        raise ValueError(f"seed must lie in 0..{SEEDS - batch}, got {seed}")
    return batch


def _listed(prompts: Prompts) -> Any:
    if isinstance(prompts, str):
        return [prompts]
    return prompts if isinstance(prompts, TextFeatures) else list(prompts)


def _condition_arguments(
    prompts: Any, negative: Prompts | None, plan: Plan, encode: Callable[[Any], TextFeatures]
) -> tuple[bool, tuple[Any, ...]]:
    """Whether guidance is learned, and what the transformer is told: text, lengths, negative."""
    text, guided = encode(prompts), plan.steps[0].rows == "both"
    if negative is None:
        return guided, (*text, None)
    if not guided:
        raise ValueError("a negative prompt works through guidance, which is off: raise it")
    others = [negative] * count(prompts) if isinstance(negative, str) else _listed(negative)
    if count(others) != count(prompts):
        raise ValueError(f"got {count(others)} negative prompts for {count(prompts)} prompts")
    return False, (*text, encode(others))


def _with_learned_guidance(model: Any, text: Array, lengths: Array, _: None) -> Any:
    return model.embed_condition(text, lengths, "learned")


def _with_guidance(model: Any, text: Array, lengths: Array, other: Any) -> Any:
    return model.embed_condition(text, lengths, other)


def _decode(tokenizer: bsq_vae.BsqVae, code_sum: Array) -> UInt8[Array, "B height width 3"]:
    return bsq_vae.to_uint8(tokenizer.decode(code_sum))
