"""HART side by side: both replay the same random text, tokens and noise, layer by layer.

The codebook lives in another folder; a random one stands in for it on both sides.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from sparvar_convert.compare_var import random_quantize
from sparvar_convert.side_by_side import Options, Row, Sides, fill_twin, row, with_bits
from sparvar_convert.torch_twin.hart import HartTwin
from sparvar_jax.models import sampling
from sparvar_jax.models.hart import residual_noise
from sparvar_jax.models.hart_parts import HartConfig, guidance_ramp
from sparvar_jax.models.vqvae import Codebook, VqvaeConfig
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.runtime import generate

PICTURES = 2

Trace = list[dict[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What both sides read. noise: of the residuals, as the loop draws it from its keys."""

    text: np.ndarray
    positions: np.ndarray
    ids: list[np.ndarray]
    keys: Any
    noise: np.ndarray
    codebook: Codebook


def compare(sides: Sides, options: Options) -> tuple[Row, ...]:
    """Inputs, hidden states after every block, logits and ids of every scale, residuals."""
    inputs = _inputs(sides.config, options.seed)
    trace, total = _run_twin(sides, options, inputs)
    rows, code_sum = _replay(sides, options, inputs, trace)
    return (*rows, row(None, "code sum", total, code_sum))


def _inputs(config: HartConfig, seed: int) -> _Inputs:
    draw, last = np.random.default_rng(seed), len(config.sides) - 1
    shape = (PICTURES, config.text_tokens)
    lengths = draw.integers(1, config.text_tokens, PICTURES)
    keys = sampling.image_keys(seed, PICTURES)
    own = jax.vmap(jax.random.fold_in, (0, None))(keys, last)  # as the loop does
    drawn = (config.residual_steps + 1, config.sides[-1] ** 2, config.code_width)
    codes = VqvaeConfig(config.vocab, config.code_width)
    return _Inputs(
        draw.standard_normal((*shape, config.text_width)).astype(np.float32),
        np.minimum(np.arange(shape[1]), lengths[:, None] - 1).astype(np.int32),
        [draw.integers(0, config.vocab, (PICTURES, side * side)) for side in config.sides],
        keys,
        np.array(residual_noise(own, drawn)),
        Codebook(codes, rngs=nnx.Rngs(seed)),
    )


def _run_twin(sides: Sides, options: Options, inputs: _Inputs) -> tuple[Trace, np.ndarray]:
    with torch.device("meta"):
        twin = HartTwin(sides.config)
    filled = fill_twin(twin, sides)
    assert isinstance(filled, HartTwin)
    quantize = random_quantize(inputs.codebook, len(sides.config.sides))
    with torch.no_grad():
        trace, total = filled.replay(
            torch.tensor(inputs.text),
            torch.tensor(inputs.positions),
            [torch.tensor(part) for part in inputs.ids],
            quantize,
            options.guidance,
            torch.tensor(inputs.noise),
        )
    return trace, total.permute(0, 2, 3, 1).numpy()


def _replay(
    sides: Sides, options: Options, inputs: _Inputs, trace: Trace
) -> tuple[list[Row], np.ndarray]:
    """Rows of all scales, and the summed codes at the end."""
    generator = generate.Generator(sides.load(), inputs.codebook)
    schedule, model = sides.config.schedule, generator.model
    weights = guidance_ramp(options.guidance, len(schedule))
    features = jnp.asarray(inputs.text), jnp.asarray(inputs.positions)
    plan = dense_plan(schedule, sides.config.depth)
    steps = generator.steps(
        plan,
        jax.jit(lambda model: model.embed_condition(*features, "learned"))(model),
        generate.controls(len(schedule), guidance=weights, temperature=1.0, top_p=1.0),
        inputs.keys,
        forced=tuple(jnp.asarray(part, jnp.int32) for part in inputs.ids),
        capture=True,
    )
    rows: list[Row] = []
    code_sum = np.zeros(0)
    for index, ((state, output), theirs) in enumerate(zip(steps, trace, strict=True)):
        entering = model.add_level(output.captured["input"], plan.place(index))
        captured = {**output.captured, "transformer_input": entering}
        rows += _scale_rows(index, theirs, captured, options.tolerance)
        code_sum = np.asarray(state.code_sum)
    return rows, code_sum


def _scale_rows(
    index: int, theirs: dict[str, torch.Tensor], captured: dict, tolerance: float
) -> list[Row]:
    def of(name: str, layer: str, other: str = "") -> Row:
        ours = np.asarray(captured[other or name])
        return row(index, layer, theirs[name].numpy(), ours)

    depth = sum(name.startswith("hidden.") for name in theirs)
    rows = [of("transformer_input", "input")]
    rows += [of(f"hidden.{layer}", f"block {layer}") for layer in range(depth)]
    tokens = theirs["guided_logits"].shape[1]
    raw = theirs["raw_logits"][:, -tokens:].numpy()  # of the text the last position alone
    rows.append(row(index, "raw logits", raw, np.asarray(captured["raw_logits"])))
    guided = theirs["guided_logits"].numpy()
    best = np.partition(guided, -2, axis=-1)
    equal = guided.argmax(-1) == np.asarray(captured["guided_logits"]).argmax(-1)
    slack = 2 * tolerance * float(np.abs(guided).max())
    found = of("guided_logits", "guided logits")
    rows.append(with_bits(found, best[..., -1] - best[..., -2], equal, slack))
    if "diffusion.output" in theirs:
        rows.append(of("diffusion.condition", "residual input", "residual_condition"))
        rows.append(of("diffusion.output", "residual", "residual"))
    return rows
