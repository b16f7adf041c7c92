"""Class to picture: a class-conditional VAR, plan, generation loop and tokenizer in one call."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from sparvar_jax.models.bsq_vae import to_uint8
from sparvar_jax.models.family import How
from sparvar_jax.models.sampling import KEY_KIND, Controls
from sparvar_jax.models.var import Var, guidance_ramp
from sparvar_jax.models.vqvae import Tokenised, Vqvae
from sparvar_jax.pipelines import loading
from sparvar_jax.pipelines.pipeline import Jobs, code_sum_shape, compile_all
from sparvar_jax.pipelines.requests import PerScale, Request, cached_plan, numbers
from sparvar_jax.plans.plan import Plan
from sparvar_jax.runtime import generate
from sparvar_jax.runtime.bound import Bound, to_host
from sparvar_jax.runtime.generate import Generator, Progress
from sparvar_jax.weights import checkpoint

SEEDS = 1 << 32


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
    guidance: strength at the last scale (0 is off), or the conditional weight of every scale.
    top_k, top_p: filters over the vocabulary; 0 and 1 filter nothing.
    """

    plan: Plan | str | None = None
    seed: int | Sequence[int] = 0
    guidance: PerScale | None = None
    temperature: PerScale | None = None
    top_k: int | None = None
    top_p: float | None = None

    def resolve(self, model: ClassModel) -> tuple[Plan, Controls]:
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
        controls = generate.controls(
            len(config.sides),
            guidance=weights,
            temperature=numbers(
                defaults.temperature if self.temperature is None else self.temperature
            ),
            top_k=defaults.top_k if self.top_k is None else self.top_k,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
        )
        return plan, controls


@dataclasses.dataclass(frozen=True)
class ClassModel:
    """The loaded parts of one class-conditional model directory."""

    transformer: Var
    tokenizer: Vqvae
    defaults: ClassDefaults = ClassDefaults()
    name: str = "model"

    def __post_init__(self) -> None:
        config, tokenizer = self.transformer.config, self.tokenizer.config
        shape = (config.vocab, config.code_width)
        if shape != (tokenizer.vocab, tokenizer.code_width):
            raise ValueError(
                f"{self.name}: the transformer draws from {shape[0]} codes of width {shape[1]}, "
                f"the tokenizer has {tokenizer.vocab} of width {tokenizer.code_width}: convert "
                "the VQVAE this transformer was trained with"
            )

    @property
    def parts(self) -> dict[str, Any]:
        """Module of every part."""
        return {"transformer": self.transformer, "tokenizer": self.tokenizer}

    @property
    def stride(self) -> int:
        """Pixels of a side that one token covers."""
        return self.tokenizer.config.stride


def is_class_model(directory: str | Path | None) -> bool:
    """Whether a model directory (None: the demo model) holds a class-conditional transformer."""
    config = checkpoint.read_config(loading.model_folder(directory))
    return config.get("transformer", {}).get("kind") == "var"


def load_class_model(
    directory: str | Path, *, dtype: str | None = None, progress: Progress | None = None
) -> ClassModel:
    """Load a model directory; dtype: of all parts, see `loading.compute_dtype`."""
    dtype = loading.compute_dtype(dtype)
    folder = loading.model_folder(directory)
    model = describe_class_model(folder, dtype)
    config, parts = checkpoint.read_config(folder), model.parts
    for done, part in enumerate(parts, 1):
        parts[part] = loading.load_part(folder, config, part, dtype)
        if progress:
            progress("load", done, len(parts))
    return dataclasses.replace(model, **parts)


def describe_class_model(folder: Path, dtype: str | None = None) -> ClassModel:
    """The model with shapes and dtypes in place of weights; dtype None is the stored one."""
    config = checkpoint.read_config(folder)
    if not is_class_model(folder):
        raise ValueError(f"{folder} is no class-conditional model: give one with a VAR transformer")
    transformer, tokenizer = (
        loading.abstract_part(config, part, dtype) for part in ("transformer", "tokenizer")
    )
    defaults = checkpoint.config_from_json(ClassDefaults, config.get("defaults", {}))
    return ClassModel(transformer, tokenizer, defaults, folder.name)


class ClassPipeline:
    """Class to picture with one loaded model; compiled steps are kept from call to call."""

    def __init__(self, model: ClassModel):
        self.model = model
        self.generator = Generator(model.transformer, model.tokenizer.codebook)
        self._condition = {
            guided: Bound(model.transformer, condition)
            for guided, condition in ((True, _guided_condition), (False, _plain_condition))
        }
        self._decode = Bound(model.tokenizer, _decode)
        sides = model.transformer.config.sides
        self._tokenise = Bound(
            model.tokenizer, lambda tokenizer, pictures: _tokenise(tokenizer, pictures, sides)
        )

    @classmethod
    def from_checkpoint(
        cls, directory: str | Path, *, dtype: str | None = None, progress: Progress | None = None
    ) -> ClassPipeline:
        """Load a model directory with a VAR transformer and its VQVAE."""
        return cls(load_class_model(directory, dtype=dtype, progress=progress))

    def __call__(
        self,
        labels: int | Sequence[int | None],
        *,
        smooth: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> UInt8[np.ndarray, "B height width 3"]:
        """Draw one RGB picture per class. Options are those of `ClassOptions`.

        smooth: mix codes by a Gumbel softmax: smoother pictures, unfit for evaluation.
        progress: called as (stage, done, total) with the stages "compile" and "draw".
        """
        request = self.request(labels, **options)
        run, batch, how = self.generator, request.keys.shape[0], _how(smooth)
        run.compile(request.plan, request.condition, batch, how=how, progress=progress)
        code_sum: Any = None
        steps = run.steps(request.plan, request.condition, request.controls, request.keys, how=how)
        for done, (state, _) in enumerate(steps, 1):
            code_sum = state.code_sum
            if progress:
                jax.block_until_ready(code_sum)
                progress("draw", done, len(request.plan.steps))
        return self.decode(code_sum)

    def request(self, labels: int | Sequence[int | None], **options: Any) -> Request:
        """Resolve a call: plan, controls, condition and random keys, as `ClassOptions` say.

        labels: one class a picture; None draws without a class (guidance then does nothing).
        Raises ValueError for anything that cannot be drawn.
        """
        asked, ids = ClassOptions(**options), self._ids(labels)
        plan, controls = asked.resolve(self.model)
        condition = self._condition[plan.steps[0].rows == "both"](ids)
        return Request(plan, condition, controls, _keys(asked.seed, len(ids)))

    def warm_up(
        self,
        labels: int | Sequence[int | None],
        *,
        smooth: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        """Compile all that a call with as many labels runs, in parallel, and draw nothing.

        Works without weights as well.
        """
        asked, ids = ClassOptions(**options), self._ids(labels)
        plan, _ = asked.resolve(self.model)
        _keys(asked.seed, len(ids))  # complains before the work
        condition = self._condition[plan.steps[0].rows == "both"]
        total = code_sum_shape(self.model.transformer, plan, len(ids))
        jobs: Jobs = [lambda: condition.compile(ids), lambda: self._decode.compile(total)]
        shape = condition.shape(ids)
        compile_all(self.generator, plan, shape, len(ids), jobs, progress, _how(smooth))

    def _ids(self, labels: int | Sequence[int | None]) -> np.ndarray:
        return _class_ids(_listed("classes", labels), self.model.transformer.config.classes)

    @property
    def picture_side(self) -> int:
        """Pixels of a side of the pictures."""
        return self.model.transformer.config.sides[-1] * self.model.tokenizer.config.stride

    def decode(self, code_sum: Float[Array, "B h w N"]) -> UInt8[np.ndarray, "B height width 3"]:
        """Pictures from sums of codes."""
        return to_host(self._decode(code_sum))

    def tokenise(self, pictures: UInt8[np.ndarray, "B height width 3"]) -> Tokenised:
        """RGB pictures as token maps of every scale; they must have the model's own size."""
        return self._tokenise(np.asarray(pictures))


def _how(smooth: bool) -> How:
    return "smooth" if smooth else "sample"


def _weights(guidance: PerScale, scales: int) -> tuple[float, ...]:
    weights = numbers(guidance)
    return weights if isinstance(weights, tuple) else guidance_ramp(weights, scales)


def _listed(name: str, value: Any) -> list[Any]:
    """One whole number or several of any library as Python's; None stays; 2.7 is refused."""
    given = list(value) if isinstance(value, Sequence) or np.ndim(value) else [value]
    try:
        return [None if number is None else operator.index(number) for number in given]
    except TypeError:
        raise ValueError(f"{name} must be whole numbers, got {value!r}") from None


def _class_ids(labels: Sequence[int | None], classes: int) -> np.ndarray:
    if not labels:
        raise ValueError("expected at least one class, got none")
    for label in labels:
        if label is not None and not 0 <= label < classes:
            raise ValueError(f"classes must lie in 0..{classes - 1}, got {label}")
    return np.array([classes if label is None else label for label in labels], np.int32)


def _keys(seed: int | Sequence[int], batch: int) -> PRNGKeyArray:
    seeds: list[Any] = _listed("seeds", seed)
    if not np.ndim(seed):  # type: ignore[arg-type]
        seeds = [seeds[0] + image for image in range(batch)]
    if len(seeds) != batch:
        raise ValueError(f"got {len(seeds)} seeds for {batch} pictures")
    if min(seeds) < 0 or max(seeds) >= SEEDS:
        raise ValueError(f"seeds must lie in 0..{SEEDS - 1}, got {seeds}")
    key = functools.partial(jax.random.key, impl=KEY_KIND)
    return jax.vmap(key)(np.array(seeds, np.uint32))


def _guided_condition(transformer: Var, labels: Array) -> Any:
    return transformer.embed_condition(labels, guidance=True)


def _plain_condition(transformer: Var, labels: Array) -> Any:
    return transformer.embed_condition(labels, guidance=False)


def _decode(tokenizer: Vqvae, code_sum: Array) -> UInt8[Array, "B height width 3"]:
    return to_uint8(tokenizer.decode(code_sum))


def _tokenise(tokenizer: Vqvae, pictures: Array, sides: tuple[int, ...]) -> Tokenised:
    latent = tokenizer.encode(pictures.astype(jnp.float32) / 127.5 - 1)
    return tokenizer.tokenise(latent, sides)
