"""What a server draws: requests checked against what is compiled, and turned into tickets."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import warnings
from collections.abc import Iterator
from typing import Any

from sparvar_jax.models.text_tokens import BUCKETS, padded_length
from sparvar_jax.pipelines.numbers import guidance_of
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.pipelines.requests import OFF, picture_size, resolve_schedule, shape_of
from sparvar_jax.serve.errors import wrong
from sparvar_jax.serve.schema import SEEDS, ImageRequest
from sparvar_jax.serve.settings import Settings

GUIDED = 2.0
"""Any number that is not "off": programs are the same for all."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A size pictures are drawn in, as options of the pipeline. name: "WIDTHxHEIGHT"."""

    name: str
    aspect_ratio: float
    size: str


@dataclasses.dataclass(frozen=True)
class Bucket:
    """What pictures must share to be drawn as one batch.

    prompt, negative: padded tokens. guidance: None is the model's default.
    """

    plan: str
    shape: Shape
    prompt: int
    negative: int | None
    guidance: float | None

    @property
    def options(self) -> dict[str, Any]:
        """Options of the pipeline's call."""
        guided = {} if self.guidance is None else {"guidance": self.guidance}
        shape = {"aspect_ratio": self.shape.aspect_ratio, "size": self.shape.size}
        return {"plan": self.plan, **shape, **guided}


@dataclasses.dataclass(frozen=True)
class Order:
    """A request that can be drawn. previews: steps after which one is shown, of all `steps`.

    text_tokens, image_tokens: read, and drawn, for one picture.
    """

    bucket: Bucket
    prompt: str
    negative: str | None
    seed: int
    count: int
    steps: int
    previews: tuple[int, ...]
    text_tokens: int
    image_tokens: int


class Menu:
    """The plans, sizes and prompt lengths of a server; ValueError for what the model cannot do."""

    def __init__(self, pipe: Pipeline, settings: Settings):
        if pipe.model.family.draws != "prompts":
            draws = pipe.model.family.draws
            raise ValueError(f"{pipe.model.name} draws {draws}: serve a model that draws prompts")
        self.settings, self._pipe = settings, pipe
        longest = pipe.model.transformer.config.text_max_length
        self.longest = min(settings.prompt_tokens or longest, longest)
        self.plans = settings.plans or (pipe.model.defaults.plan,)
        shapes = [_shape(pipe.model, size) for size in settings.sizes] or [_own(pipe.model)]
        self.shapes = {shape.name: shape for shape in shapes}
        default = guidance_of(pipe.model.defaults.guidance, OFF)
        by_scale = isinstance(default, tuple)
        self.guided = any(g != OFF for g in default) if by_scale else default != OFF
        # Guidance by scale may be off in some: one number for all is another program.
        self._guidances = [None, *([GUIDED] if by_scale else [])]
        if settings.unguided:
            self._guidances.append(OFF if self.guided else GUIDED)
        self._steps = {
            (plan, shape): self._tokens(plan, shape) for plan in self.plans for shape in shapes
        }

    def order(self, asked: ImageRequest) -> Order:
        """What a request draws. Raises `Refused` naming the field that is wrong."""
        settings, count = self.settings, asked.n or 1
        if count > settings.most_pictures:
            raise wrong("n", f"n must be at most {settings.most_pictures}, got {count}")
        _check_form(asked, count)
        bucket, text_tokens = self._bucket(asked)
        tokens = self._steps[bucket.plan, bucket.shape]
        seed = secrets.randbelow(SEEDS - count + 1) if asked.seed is None else asked.seed
        if seed > SEEDS - count:
            raise wrong("seed", f"seed must be at most {SEEDS - count} for {count} pictures")
        wanted = (asked.partial_images or 0) if asked.stream else 0
        return Order(
            bucket,
            asked.prompt,
            asked.negative_prompt,
            seed,
            count,
            len(tokens),
            preview_steps(len(tokens), wanted),
            text_tokens,
            sum(tokens),
        )

    def buckets(self) -> Iterator[Bucket]:
        """Everything that is compiled before the first request, cheapest first."""
        lengths = sorted({padded_length(n, self.longest) for n in (*BUCKETS, self.longest)})
        negatives = [None, *(lengths if self.settings.negative else ())]
        for plan, shape, length, negative, guidance in itertools.product(
            self.plans, self.shapes.values(), lengths, negatives, self._guidances
        ):
            guided = self.guided if guidance is None else guidance != OFF
            if guided or negative is None:
                yield Bucket(plan, shape, length, negative, guidance)

    def _bucket(self, asked: ImageRequest) -> tuple[Bucket, int]:
        """The bucket of a request, and the tokens of its texts."""
        plan, size = asked.plan or self.plans[0], asked.size or "auto"
        if plan not in self.plans:
            raise wrong("plan", f"this server draws the plans {', '.join(self.plans)}")
        if size != "auto" and size not in self.shapes:
            raise wrong("size", f"this server draws the sizes auto, {', '.join(self.shapes)}")
        shape = next(iter(self.shapes.values())) if size == "auto" else self.shapes[size]
        tokens, prompt = self._length("prompt", asked.prompt)
        negative = None
        if asked.negative_prompt is not None:
            more, negative = self._length("negative_prompt", asked.negative_prompt)
            tokens += more
        guidance = self._guidance(asked.guidance_scale, negative is not None)
        return Bucket(plan, shape, prompt, negative, guidance), tokens

    def _length(self, name: str, text: str) -> tuple[int, int]:
        """(tokens, padded tokens) of a text that can be read whole."""
        most = self.settings.most_prompt
        if len(text) > most:
            code = "string_above_max_length"
            raise wrong(name, f"{name} has {len(text)} characters, at most {most}", code)
        if not text.strip():
            raise wrong(name, f"{name} is empty: describe the picture in at least one word")
        try:
            ((tokens, padded),) = self._pipe.text_lengths([text])
        except ValueError as error:
            raise wrong(name, f"{name}: the text has no tokens") from error
        if tokens > self.longest:
            message = f"{name} has {tokens} tokens, at most {self.longest}: shorten it"
            raise wrong(name, message, "string_above_max_length")
        return tokens, padded

    def _guidance(self, asked: float | None, negative: bool) -> float | None:
        guided = self.guided if asked is None else asked != OFF
        if negative and not self.settings.negative:
            raise wrong("negative_prompt", "this server takes no negative prompts")
        if negative and not guided:
            raise wrong("negative_prompt", "a negative prompt works through guidance: raise it")
        if guided != self.guided and not self.settings.unguided:
            side = "other than 1" if self.guided else "1"
            raise wrong("guidance_scale", f"this server draws with a guidance {side}")
        return asked

    def _tokens(self, plan: str, shape: Shape) -> tuple[int, ...]:
        """Tokens drawn by every step of a plan."""
        options = Bucket(plan, shape, 0, None, None).options
        resolved, _ = self._pipe.model.family.options(**options).resolve(self._pipe.model)
        return tuple(step.scale.tokens for step in resolved.steps)


def preview_steps(steps: int, count: int) -> tuple[int, ...]:
    """Steps, evenly spread over those before the last, after which a preview is shown.

    Fewer than asked for where there are not so many.
    """
    count = min(count, steps - 1)
    return tuple(steps * (index + 1) // (count + 1) - 1 for index in range(count))


def _check_form(asked: ImageRequest, count: int) -> None:
    """Refuse what no answer has the form for."""
    if asked.stream and count > 1:
        raise wrong("n", "events do not say which picture they show: stream one at a time")
    if asked.background == "transparent":
        raise wrong("background", "pictures have no transparency: leave background out")
    lossless = (asked.output_format or "png") == "png"
    if lossless and asked.output_compression not in (None, 100):
        raise wrong("output_compression", "PNG files take 100 alone: choose webp or jpeg")


def _shape(model: Any, name: str) -> Shape:
    width, _, height = name.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"a size is WIDTHxHEIGHT in pixels, got {name!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes that differ are refused here
        ratio, size = shape_of(model, int(height), int(width))
        found = _named(model, ratio, size)
    if found.name != name:
        raise ValueError(f"{model.name} cannot draw {name}, but {found.name}")
    return found


def _own(model: Any) -> Shape:
    return _named(model, model.defaults.aspect_ratio, model.defaults.size)


def _named(model: Any, ratio: float, size: str) -> Shape:
    height, width = picture_size(model, resolve_schedule(model, ratio, size))
    return Shape(f"{width}x{height}", float(ratio), size)
