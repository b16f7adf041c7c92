"""HART runs replayed through the production loop on the stored ids; everything from the sidecar."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparvar_jax.models import quantizer, sampling
from sparvar_jax.models.family import Forced
from sparvar_jax.models.hart import Hart
from sparvar_jax.models.hart_parts import guidance_ramp
from sparvar_jax.models.vqvae import Vqvae
from sparvar_jax.plans.plan import Plan, dense_plan
from sparvar_jax.runtime import generate
from tests.golden.support import load_golden, state_dict
from tests.released_hart import (
    hart_config,
    load_hart,
    load_qwen2,
    load_tokenizer,
    text_config,
    tokenizer_config,
)

TOLERANCE = 1e-4


class Golden(NamedTuple):
    """One stored file with its weights."""

    sidecar: dict
    tensors: dict
    transformer: dict
    tokenizer: dict
    text: dict

    @property
    def sides(self) -> tuple[int, ...]:
        return tuple(self.sidecar["config"]["transformer"]["patch_nums"])

    def at(self, name: str, scale: int):
        """A stored quantity of a scale, None where it is not stored."""
        return self.tensors.get(f"{name}.scale_{scale:02d}")


class Replay(NamedTuple):
    """One run. captured, sums: of every scale.

    error: the largest one of the guided logits, where a run stores none the one allowed.
    """

    captured: tuple[dict[str, np.ndarray], ...]
    sums: tuple[np.ndarray, ...]
    error: float


@functools.cache
def golden(stem: str) -> Golden:
    sidecar, tensors = load_golden(stem)
    prefixes = ("state_dict.", "tokenizer_state_dict.", "text_state_dict.")
    return Golden(sidecar, tensors, *(state_dict(tensors, prefix) for prefix in prefixes))


@functools.cache
def transformer(stem: str) -> Hart:
    data = golden(stem)
    return load_hart(hart_config(data.sidecar), data.transformer)


@functools.cache
def tokenizer(stem: str) -> Vqvae:
    data = golden(stem)
    return load_tokenizer(tokenizer_config(data.sidecar), data.tokenizer)


@functools.cache
def text_encoder(stem: str):
    data = golden(stem)
    return load_qwen2(text_config(data.sidecar), data.text)


@functools.cache
def generator(stem: str) -> generate.Generator:
    """One per file, so that its runs share compiled steps."""
    return generate.Generator(transformer(stem), tokenizer(stem).codebook)


def plan(stem: str) -> Plan:
    config = transformer(stem).config
    return dense_plan(config.schedule, config.depth)


def prompts(stem: str, run: str) -> slice:
    """Which of the stored prompts a run draws."""
    used = golden(stem).sidecar["runs"][run]["prompts_used"]
    return {"all": slice(None), "first": slice(0, 1), "last": slice(-1, None)}[used]


@functools.cache
def condition(stem: str, run: str):
    tensors, rows = golden(stem).tensors, prompts(stem, run)
    text = jnp.asarray(tensors["text.features"][rows])
    positions = jnp.asarray(tensors["text.position_ids"][rows].astype(np.int32))
    embed = jax.jit(lambda model: model.embed_condition(text, positions, "learned"))
    return embed(transformer(stem))


def ramp(stem: str, run: str) -> tuple[float, ...]:
    data = golden(stem)
    return guidance_ramp(data.sidecar["runs"][run]["cfg"], len(data.sides))


def ids(stem: str, run: str) -> list[np.ndarray]:
    """The ids that a run fed back."""
    data = golden(stem)
    stored = (data.at(f"{run}.token_ids", scale) for scale in range(len(data.sides)))
    return [part.astype(np.int32) for part in stored]


@functools.cache
def replay(stem: str, run: str) -> Replay:
    """Scale by scale on the stored ids; of a smooth run on the stored sums of codes as well."""
    data, tokens = golden(stem), ids(stem, run)
    batch, smooth = len(tokens[0]), data.sidecar["runs"][run]["more_smooth"]
    knobs = generate.controls(len(data.sides), guidance=ramp(stem, run), temperature=1.0, top_p=1.0)
    keys, loop = sampling.image_keys(0, batch), generator(stem)
    state, captured, sums, errors = loop.start(plan(stem), batch), [], [], []
    for scale, known in enumerate(tokens):
        forced = Forced(jnp.asarray(known))
        arguments = (plan(stem), scale, condition(stem, run), state, knobs, keys)
        state, output = loop.decode_scale(*arguments, forced=forced, capture=True)
        captured.append({name: np.asarray(value) for name, value in output.captured.items()})
        expected = data.at(f"{run}.guided_logits", scale)
        if expected is not None:
            got = captured[-1]["guided_logits"]
            errors.append(float(np.abs(got - expected).max()))
        following = data.at(f"{run}.fhat", scale)
        if smooth and following is not None:
            state = with_sum(state, np.moveaxis(following, 1, -1), data.sides[scale + 1])
        sums.append(np.asarray(state.code_sum))
    return Replay(tuple(captured), tuple(sums), max(errors, default=TOLERANCE))


def with_sum(state: generate.State, code_sum: np.ndarray, side: int) -> generate.State:
    """The state as if these codes had been drawn. side: of the following scale."""
    total = jnp.asarray(code_sum)
    codes = quantizer.next_input(total, (side, side), mode="area")
    codes = codes.reshape(len(total), side * side, -1)
    return dataclasses.replace(state, code_sum=total, codes=codes)


def noise(stem: str, name: str, rows: int) -> jax.Array:
    """The normal draws of a stored residual that count: of the first `rows` rows."""
    data = golden(stem)
    steps = data.sidecar["config"]["transformer"]["num_sampling_steps"]
    draws = [data.tensors[f"{name}.step_noise.{step:02d}"] for step in range(int(steps))]
    stored = [data.tensors[f"{name}.initial_noise"], *draws]
    return jnp.asarray(np.stack([part[:rows] for part in stored]), jnp.float32)


def close(got, expected, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(got), expected, atol=tolerance, rtol=0)


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


decode = jax.jit(lambda model, x: model.decode(x))


def decoded(vqvae, code_sum) -> np.ndarray:
    return np.asarray(decode(vqvae, jnp.asarray(code_sum)))
