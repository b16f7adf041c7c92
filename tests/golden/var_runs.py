"""Stored class-conditional runs replayed through the production loop on the stored ids."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from sparvar_convert.torch_twin.var import VarTwin
from sparvar_convert.torch_twin.vqvae import VqvaeTwin

from sparvar_jax.models import sampling
from sparvar_jax.models.var import guidance_ramp
from sparvar_jax.plans.plan import Plan, dense_plan
from sparvar_jax.runtime import generate
from tests.golden.support import load_golden, state_dict
from tests.released_var import load_var, load_vqvae, var_config, vqvae_config


class Golden(NamedTuple):
    """One stored file with its weights."""

    sidecar: dict
    tensors: dict
    var_weights: dict
    vqvae_weights: dict

    @property
    def sides(self) -> tuple[int, ...]:
        return tuple(self.sidecar["config"]["var"]["patch_nums"])

    @property
    def guidance(self) -> tuple[float, ...]:
        """Conditional weight of every scale."""
        return guidance_ramp(self.sidecar["cfg"], len(self.sides))

    def scales(self, name: str) -> list[np.ndarray]:
        """A stored quantity at every scale."""
        return [self.tensors[f"{name}_{index:02d}"] for index in range(len(self.sides))]


class Replay(NamedTuple):
    """What one run gave, per scale: captured arrays and running sums of codes.

    error: the largest one of the guided logits.
    """

    captured: tuple[dict[str, np.ndarray], ...]
    sums: tuple[np.ndarray, ...]
    error: float


@functools.cache
def golden(stem: str) -> Golden:
    sidecar, tensors = load_golden(stem)
    _, tokenizer = load_golden(sidecar["vqvae_file"])
    return Golden(
        sidecar,
        tensors,
        state_dict(tensors, "var_state_dict."),
        state_dict(tokenizer, "vqvae_state_dict."),
    )


@functools.cache
def models(stem: str):
    data = golden(stem)
    vqvae = load_vqvae(vqvae_config(data.sidecar), data.vqvae_weights)
    return load_var(var_config(data.sidecar), data.var_weights), vqvae


@functools.cache
def generator(stem: str) -> generate.Generator:
    """One per file, so that its runs share compiled steps."""
    model, vqvae = models(stem)
    return generate.Generator(model, vqvae.codebook)


@functools.cache
def twins(stem: str) -> tuple[VarTwin, VqvaeTwin]:
    data = golden(stem)
    pair = VarTwin(var_config(data.sidecar)), VqvaeTwin(vqvae_config(data.sidecar), len(data.sides))
    for twin, weights in zip(pair, (data.var_weights, data.vqvae_weights), strict=True):
        twin.load_state_dict({k: torch.tensor(v) for k, v in weights.items()})  # strict
        twin.requires_grad_(False)
    return pair


def plan(stem: str) -> Plan:
    config = models(stem)[0].config
    return dense_plan(config.schedule, config.depth)


@functools.cache
def condition(stem: str):
    labels = jnp.asarray(golden(stem).tensors["labels"])
    return jax.jit(lambda model: model.embed_condition(labels))(models(stem)[0])


def controls(stem: str) -> sampling.Controls:
    """Those of the sampled run; the argmax run draws with the same guidance."""
    data = golden(stem)
    options = data.sidecar["sampled_run"]
    return generate.controls(
        len(data.sides),
        guidance=data.guidance,
        temperature=1.0,
        top_k=options["top_k"],
        top_p=options["top_p"],
    )


@functools.cache
def replay(stem: str, run: str) -> Replay:
    """One stored run, scale by scale, on the ids it drew."""
    data = golden(stem)
    forced = tuple(jnp.asarray(part) for part in data.scales(f"{run}.token_ids.scale"))
    steps = generator(stem).steps(
        plan(stem),
        condition(stem),
        controls(stem),
        sampling.image_keys(0, len(forced[0])),
        forced=forced,
        capture=True,
    )
    captured, sums = [], []
    for state, output in steps:
        captured.append({name: np.asarray(value) for name, value in output.captured.items()})
        sums.append(np.asarray(state.code_sum))
    expected = data.scales(f"{run}.guided_logits.scale")
    pairs = zip(captured, expected, strict=True)
    error = max(float(np.abs(ours["guided_logits"] - theirs).max()) for ours, theirs in pairs)
    return Replay(tuple(captured), tuple(sums), error)
