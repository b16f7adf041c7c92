"""Class to picture: a class-conditional VAR, plan, generation loop and tokenizer in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from sparvar_jax import checkpoint, generate, loading
from sparvar_jax.generate import Generator, Progress
from sparvar_jax.models.bsq_vae import to_uint8
from sparvar_jax.models.var import Var, guidance_ramp
from sparvar_jax.models.vqvae import Tokenised, Vqvae
from sparvar_jax.pipeline import PerScale, Request
from sparvar_jax.plan import Plan
from sparvar_jax.policies import parse_plan

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


def is_class_model(directory: str | Path) -> bool:
    """Whether a model directory holds a class-conditional transformer."""
    config = checkpoint.read_config(loading.model_folder(directory))
    return config.get("transformer", {}).get("kind") == "var"


def load_class_model(
    directory: str | Path, *, dtype: str | None = None, progress: Progress | None = None
) -> ClassModel:
    """Load a model directory; `dtype` as in `loading.load_model`."""
    folder = loading.model_folder(directory)
    config = checkpoint.read_config(folder)
    if not is_class_model(folder):
        raise ValueError(f"{folder} is no class-conditional model: give one with a VAR transformer")
    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"
    parts = []
    for done, part in enumerate(("transformer", "tokenizer"), 1):
        parts.append(loading.load_part(folder, config, part, dtype))
        if progress:
            progress("load", done, 2)
    defaults = checkpoint.config_from_json(ClassDefaults, config.get("defaults", {}))
    return ClassModel(parts[0], parts[1], defaults, folder.name)


class ClassPipeline:
    """Class to picture with one loaded model; compiled steps are kept from call to call."""

    def __init__(self, model: ClassModel):
        self.model = model
        self._generators: dict[bool, Generator] = {}
        self._condition = _bind(model.transformer, Var.embed_condition, static=("guidance",))
        self._decode = _bind(model.tokenizer, _decode)
        self._tokenise = _bind(model.tokenizer, _tokenise, static=("sides",))

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
        """Draw one RGB picture per class. Options are those of `request`.

        smooth: mix codes by a Gumbel softmax: smoother pictures, unfit for evaluation.
        progress: called as (stage, done, total) with the stages "compile" and "draw".
        """
        request = self.request(labels, **options)
        run, batch = self.generator(smooth), request.keys.shape[0]
        run.compile(request.plan, request.condition, batch, progress=progress)
        code_sum: Any = None
        steps = run.steps(request.plan, request.condition, request.controls, request.keys)
        for done, (state, _) in enumerate(steps, 1):
            code_sum = state.code_sum
            if progress:
                jax.block_until_ready(code_sum)
                progress("draw", done, len(request.plan.steps))
        return self.decode(code_sum)

    def request(
        self,
        labels: int | Sequence[int | None],
        *,
        plan: Plan | str | None = None,
        seed: int | Sequence[int] = 0,
        guidance: PerScale | None = None,
        temperature: PerScale | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Request:
        """Resolve a call: defaults, plan, condition and random keys.

        labels: one class a picture; None draws without a class (guidance then does nothing).
        plan: a Plan, or text such as "dense" or "sparvar-fast+skip_last_scales(1)".
        seed: image b draws from seed + b, or one seed an image; nothing else in the batch matters.
        guidance: strength at the last scale (0 is off), or the conditional weight of every scale.
        top_k, top_p: filters over the vocabulary; 0 and 1 filter nothing.
        Raises ValueError for anything that cannot be drawn.
        """
        config, defaults = self.model.transformer.config, self.model.defaults
        ids = _class_ids([labels] if isinstance(labels, int) else list(labels), config.classes)
        weights = _weights(defaults.guidance if guidance is None else guidance, len(config.sides))
        if not isinstance(plan, Plan):
            flags = tuple(weight != 1 for weight in weights)
            name = defaults.plan if plan is None else plan
            plan = parse_plan(name, config.schedule, config.depth, guidance=flags)
        if plan.depth != config.depth or plan.schedule != config.schedule:
            raise ValueError(
                f"the plan has {plan.depth} layers and scales {plan.schedule.sizes}, the model "
                f"{config.depth} and {config.schedule.sizes}: make the plan for this model"
            )
        temper = defaults.temperature if temperature is None else temperature
        controls = generate.controls(
            len(config.sides),
            guidance=weights,
            temperature=temper if isinstance(temper, int | float) else tuple(temper),
            top_k=defaults.top_k if top_k is None else top_k,
            top_p=defaults.top_p if top_p is None else top_p,
        )
        condition = self._condition(ids, guidance=plan.steps[0].rows == "both")
        return Request(plan, condition, controls, _keys(seed, len(ids)))

    def generator(self, smooth: bool = False) -> Generator:
        """What runs the steps; one for each way of sampling."""
        if smooth not in self._generators:
            transformer, config = self.model.transformer, self.model.transformer.config
            if smooth != config.smooth:
                transformer = nnx.merge(*nnx.split(transformer))
                transformer.config = dataclasses.replace(config, smooth=smooth)
            self._generators[smooth] = Generator(transformer, self.model.tokenizer.codebook)
        return self._generators[smooth]

    @property
    def picture_side(self) -> int:
        """Pixels of a side of the pictures."""
        return self.model.transformer.config.sides[-1] * self.model.tokenizer.config.stride

    def decode(self, code_sum: Float[Array, "B h w N"]) -> UInt8[np.ndarray, "B height width 3"]:
        """Pictures from sums of codes."""
        return np.asarray(self._decode(code_sum))

    def tokenise(self, pictures: UInt8[np.ndarray, "B height width 3"]) -> Tokenised:
        """RGB pictures as token maps of every scale; they must have the model's own size."""
        return self._tokenise(np.asarray(pictures), sides=self.model.transformer.config.sides)


def _weights(guidance: PerScale, scales: int) -> tuple[float, ...]:
    if isinstance(guidance, int | float):
        return guidance_ramp(float(guidance), scales)
    return tuple(float(weight) for weight in guidance)


def _class_ids(labels: Sequence[int | None], classes: int) -> np.ndarray:
    if not labels:
        raise ValueError("expected at least one class, got none")
    for label in labels:
        if label is not None and not 0 <= label < classes:
            raise ValueError(f"classes must lie in 0..{classes - 1}, got {label}")
    return np.array([classes if label is None else label for label in labels], np.int32)


def _keys(seed: int | Sequence[int], batch: int) -> PRNGKeyArray:
    seeds = [seed + image for image in range(batch)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise ValueError(f"got {len(seeds)} seeds for {batch} pictures")
    if min(seeds) < 0 or max(seeds) >= SEEDS:
        raise ValueError(f"seeds must lie in 0..{SEEDS - 1}, got {seeds}")
    return jax.vmap(jax.random.key)(np.array(seeds, np.uint32))


def _bind(module: Any, function: Any, static: tuple[str, ...] = ()) -> Any:
    """`function(module, ...)` compiled; the module is flattened once, not at every call."""
    leaves, treedef = jax.tree.flatten(module)

    @partial(jax.jit, static_argnames=static)
    def compiled(leaves: Any, *args: Any, **options: Any) -> Any:
        return function(jax.tree.unflatten(treedef, leaves), *args, **options)

    return partial(compiled, leaves)


def _decode(tokenizer: Vqvae, code_sum: Array) -> UInt8[Array, "B height width 3"]:
    return to_uint8(tokenizer.decode(code_sum))


def _tokenise(tokenizer: Vqvae, pictures: Array, sides: tuple[int, ...]) -> Tokenised:
    latent = tokenizer.encode(pictures.astype(jnp.float32) / 127.5 - 1)
    return tokenizer.tokenise(latent, sides)
