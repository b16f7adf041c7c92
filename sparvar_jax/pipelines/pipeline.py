"""Prompts or classes to pictures: plan, generation loop and tokenizer behind one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from sparvar_jax.models.family import How
from sparvar_jax.models.layers import DtypeName
from sparvar_jax.models.sampling import Controls
from sparvar_jax.models.vqvae import Tokenised
from sparvar_jax.pipelines import asking, loading
from sparvar_jax.pipelines.decoding import decode, look_at
from sparvar_jax.pipelines.loading import Model
from sparvar_jax.pipelines.numbers import image_keys
from sparvar_jax.pipelines.parts import Weights
from sparvar_jax.pipelines.requests import Options, Request
from sparvar_jax.pipelines.results import Pictures, Result, require_output_type, result
from sparvar_jax.pipelines.sharing import Shared
from sparvar_jax.pipelines.subjects import Jobs
from sparvar_jax.pipelines.text_encoder import TextEncoder, TextFeatures
from sparvar_jax.plans.caches import Cache, check_cache, with_cache
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.schedule import Scale
from sparvar_jax.runtime.bound import Bound, to_host
from sparvar_jax.runtime.devices import Asked, Devices, devices_of
from sparvar_jax.runtime.generate import Generator, ScaleOutput, State
from sparvar_jax.runtime.progress import Progress

__all__ = ["Options", "Pipeline", "Request", "TextEncoder", "TextFeatures"]
Callback = Callable[[int, Scale, Array], Any]
"""Called after every scale as (step, scale, sum of codes); `Pipeline.decode` makes it a picture."""


class Pipeline(Shared):
    """Draws with one loaded model.

    Compiled steps and functions are kept, so the second call with the same plan, batch size and
    length bucket of the prompts compiles nothing. Weights are read at every call: what is changed
    in place, or put in by setting `model`, shows in the next picture.
    devices: a number of devices, "auto" or devices, over which every call's work is divided; None
    is the default device.
    """

    def __init__(
        self,
        model: Model,
        *,
        text_encoder: bool = True,
        cache: Cache = "full",
        devices: Asked | Devices = None,
    ):
        """cache: how keys and values are kept; see `plans.caches`."""
        check_cache(cache)
        if not isinstance(devices, Devices):
            devices = devices_of(devices, model.transformer.config.heads)
        self._model, self.cache, self.devices = model, cache, devices
        look = Bound(lambda: self.model.tokenizer, look_at, devices)
        self.generator = Generator(model.transformer, model.codebook, devices, look)
        self.subject = model.family.subject(
            lambda: self.model, text_encoder=text_encoder, devices=devices
        )
        self._decode = Bound(lambda: self.model.tokenizer, decode, devices, bands=True)

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | Path | None = None,
        *,
        dtype: str | None = None,
        text_encoder: bool = True,
        weights: Weights = "dense",
        stream: DtypeName | None = None,
        cache: Cache = "full",
        devices: Asked = None,
        progress: Progress | None = None,
    ) -> Pipeline:
        """Load a model directory of any family; None is the demo model.

        text_encoder: False loads none, for calls with features of a `TextEncoder` used before.
        cache: "lean" keeps the keys and values that a later scale reads, "int8" these in 8 bits,
        "full" all of them. devices: weights are restored to all of them at once. Other arguments as
        in `loading.load_model`.
        """
        found = loading.devices_for(directory, devices)
        model = loading.load_model(
            directory,
            dtype=dtype,
            text_encoder=text_encoder,
            weights=weights,
            stream=stream,
            devices=found,
            progress=progress,
        )
        return cls(model, text_encoder=text_encoder, cache=cache, devices=found)

    @property
    def model(self) -> Model:
        """The model drawn with; another one may be set."""
        return self._model

    @model.setter
    def model(self, model: Model) -> None:
        if model.family != self._model.family:
            raise ValueError(
                f"this pipeline draws {self._model.family.draws} with a {self._model.family.kind} "
                f"model, got the kind {model.family.kind}: make a pipeline of its own"
            )
        self._model = model
        self.generator.model, self.generator.codebook = model.transformer, model.codebook

    @overload
    def __call__(
        self, subject: Any = None, *, output_type: None = None, **rest: Any
    ) -> Pictures: ...

    @overload
    def __call__(self, subject: Any = None, *, output_type: str, **rest: Any) -> Result: ...

    def __call__(
        self,
        subject: Any = None,
        *,
        output_type: str | None = None,
        callback: Callback | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Pictures | Result:
        """Draw one RGB picture per prompt, or row of text features, or class.

        subject: what is drawn; `prompt`, `prompts` or `labels` may name it.

        Options are those of the family: `requests.Options`, `class_requests.ClassOptions`.
        output_type: None gives uint8 [B, height, width, 3], which has `.images` too; "pil", "np"
        and "jax" give a `Result`. callback: see `Callback`. progress: called as (stage, done,
        total) with the stages "compile" and "draw".
        """
        require_output_type(output_type)
        request = self.request(subject, **options)
        self._compile(request, progress)
        code_sum: Any = None
        scales, steps = request.plan.steps, self.steps(request)
        del request  # the condition is freed before the decoder runs
        for done, (state, _) in enumerate(steps, 1):
            code_sum = state.code_sum
            if callback:
                callback(done - 1, scales[done - 1].scale, code_sum)
            if progress:
                jax.block_until_ready(code_sum)
                progress("draw", done, len(scales))
        # A device holds what the last scale reads until it is done: not beside the decoder's maps.
        jax.block_until_ready(code_sum)
        return result(self.decode(code_sum), output_type)

    def stream(
        self, subject: Any = None, *, progress: Progress | None = None, **options: Any
    ) -> Iterator[UInt8[np.ndarray, "B height width 3"]]:
        """The decoded pictures after every scale; the last ones equal those of a plain call.

        What cannot be drawn is refused at once, not at the first picture.
        """
        return self._stream(self.request(subject, **options), progress)

    def _stream(
        self, request: Request, progress: Progress | None
    ) -> Iterator[UInt8[np.ndarray, "B height width 3"]]:
        self._compile(request, progress)
        for state, _ in self.steps(request):
            yield self.decode(state.code_sum)

    def request(self, subject: Any = None, **options: Any) -> Request:
        """Resolve a call: plan, controls, condition and random keys, as the options say.

        Raises ValueError for anything that cannot be drawn.
        """
        subject, asked = self._asked(subject, options)
        plan, controls = self._resolved(asked)
        keys = image_keys(asked.seed, self.subject.count(subject))
        condition = self.subject.condition(subject, asked, plan)
        return Request(plan, condition, controls, keys, asked.how(self.model))

    def warm_up(
        self, subject: Any = None, *, progress: Progress | None = None, **options: Any
    ) -> None:
        """Compile all that a call with these arguments runs, in parallel, and draw nothing.

        Of prompts only their number and length bucket matter, of classes their number. Works
        without weights as well.
        """
        subject, asked = self._asked(subject, options)
        plan, _ = self._resolved(asked)
        batch = self.subject.count(subject)
        image_keys(asked.seed, batch)  # complains before the work
        condition, jobs = self.subject.shape(subject, asked, plan)
        total = code_sum_shape(self.model.transformer, plan, batch)
        jobs = [*jobs, lambda: self._decode.compile(total)]
        compile_all(self.generator, plan, condition, batch, jobs, progress, asked.how(self.model))

    def steps(self, request: Request) -> Iterator[tuple[State, ScaleOutput]]:
        """State and output after every scale of a request."""
        return self.generator.steps(
            request.plan, request.condition, request.controls, request.keys, how=request.how
        )

    def decode(self, code_sum: Float[Array, "B h w Cd"]) -> UInt8[np.ndarray, "B height width 3"]:
        """Pictures from sums of codes."""
        return to_host(self.pixels(code_sum))

    def pixels(self, code_sum: Float[Array, "B h w Cd"]) -> UInt8[Array, "B height width 3"]:
        """Pictures from sums of codes, on the device and not waited for."""
        return self._decode(code_sum)

    def encode_text(self, prompts: Any) -> Any:
        """Text features of prompts, for models that draw such; features are left as they are."""
        return self._ability("encode")(prompts)

    def text_lengths(self, prompts: Any) -> list[tuple[int, int]]:
        """(tokens, padded tokens) of prompts; pictures of equal padding can share a batch.

        For models that draw such. Tokens of a prompt that is too long to be read count as well.
        """
        return self._ability("lengths")(prompts)

    def tokenise(self, pictures: UInt8[np.ndarray, "B height width 3"]) -> Tokenised:
        """RGB pictures of the model's own size as token maps, for models that draw classes."""
        return self._ability("tokenise")(pictures)

    @property
    def picture_side(self) -> int:
        """Pixels of a side of the pictures of a model that draws one square size."""
        return self.model.transformer.config.schedule.final[0] * self.model.stride

    def _ability(self, name: str) -> Any:
        found = getattr(self.subject, name, None)
        if found is None:
            draws = self.model.family.draws
            raise ValueError(f"{self.model.name} draws {draws}: it cannot {name}")
        return found

    def _asked(self, subject: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        """What is drawn, and the options by our own names."""
        return asking.asked(self.model, self.subject, subject, options, lambda: self.picture_side)

    def _resolved(self, asked: Any) -> tuple[Plan, Controls]:
        """The plan with this pipeline's cache, and the controls."""
        plan, controls = asked.resolve(self.model)
        return with_cache(plan, self.cache), controls

    def _compile(self, request: Request, progress: Progress | None) -> None:
        batch = request.keys.shape[0]
        self.generator.compile(
            request.plan, request.condition, batch, how=request.how, progress=progress
        )


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
