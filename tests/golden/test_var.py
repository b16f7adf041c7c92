"""Class-conditional VAR and its VQVAE against stored arrays: JAX and the PyTorch twins, float32.

Everything comes from the sidecars. Tolerances: logits and images within 1e-4 (the stored runs'
own one-pass and cached logits differ by 8e-6); guided logits amplify an error of the raw ones by
`2 g - 1` for a conditional weight g, so ids and filters are compared with that much of a gap and
with the stored ids fed back. Codes in the sum have about ten terms of order one: 1e-5.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert.torch_twin.var import VarTwin
from convert.torch_twin.vqvae import VqvaeTwin
from sparvar_jax import generate, sampling, vocabulary
from sparvar_jax.models.var import guidance_ramp
from sparvar_jax.plan import dense_plan
from sparvar_jax.teacher import teacher_forced_logits
from tests.golden.support import golden_stems, load_golden, load_sidecar, state_dict
from tests.released_var import load_var, load_vqvae, var_config, vqvae_config

STEMS = golden_stems("var_*")
WITH_IMAGES = [s for s in STEMS if "input_image" in load_sidecar(s)["tensor_index"]]
TOLERANCE = 1e-4
ROUNDING = 1e-5
RUNS = ("argmax", "sampled")


class Golden(NamedTuple):
    """One stored run with its weights."""

    sidecar: dict
    tensors: dict
    var_weights: dict
    vqvae_weights: dict

    def scales(self, name: str) -> list[np.ndarray]:
        """A stored quantity at every scale."""
        count = len(self.sidecar["config"]["var"]["patch_nums"])
        return [self.tensors[f"{name}_{index:02d}"] for index in range(count)]


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
    config = var_config(data.sidecar)
    pair = VarTwin(config), VqvaeTwin(vqvae_config(data.sidecar), len(config.sides))
    for twin, weights in zip(pair, (data.var_weights, data.vqvae_weights), strict=True):
        twin.load_state_dict({k: torch.tensor(v) for k, v in weights.items()})  # strict
        twin.requires_grad_(False)
    return pair


def close(got, expected, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(got), expected, atol=tolerance, rtol=0)


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def teacher_inputs(data: Golden) -> list[np.ndarray]:
    sides = data.sidecar["config"]["var"]["patch_nums"]
    ends = np.cumsum([side * side for side in sides[1:]])
    return np.split(data.tensors["teacher_forced_input"], ends[:-1], axis=1)


@pytest.mark.parametrize("stem", STEMS)
def test_one_pass_logits(stem):
    data, (model, _) = golden(stem), models(stem)
    condition = model.embed_condition(jnp.asarray(data.tensors["labels"]), guidance=False)
    inputs = tuple(jnp.asarray(part) for part in teacher_inputs(data))
    logits = teacher_forced_logits(model, condition, inputs, model.config.schedule)
    close(np.concatenate(logits, axis=1), data.tensors["teacher_forced_logits"], TOLERANCE)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("stem", STEMS)
def test_production_loop(stem, run):
    data, (model, vqvae) = golden(stem), models(stem)
    labels, sides = jnp.asarray(data.tensors["labels"]), model.config.sides
    weights = guidance_ramp(data.sidecar["cfg"], len(sides))
    options = data.sidecar["sampled_run"]
    controls = generate.controls(
        len(sides), guidance=weights, temperature=1.0, top_k=options["top_k"],
        top_p=options["top_p"],
    )  # fmt: skip
    ids = data.scales(f"{run}.token_ids.scale")
    forced = tuple(jnp.asarray(part) for part in ids)
    steps = generator(stem).steps(
        dense_plan(model.config.schedule, model.config.depth),
        model.embed_condition(labels),
        controls,
        sampling.image_keys(0, len(labels)),
        forced=forced,
        capture=True,
    )
    clear = []
    for scale, (state, output) in enumerate(steps):
        captured, name = output.captured, f"scale_{scale:02d}"
        guided = np.asarray(captured["guided_logits"])
        expected = data.tensors[f"{run}.guided_logits.{name}"]
        gain = 2 * weights[scale] - 1
        close(guided, expected, TOLERANCE * gain)
        gap = 2 * TOLERANCE * gain
        clear += [check_ids(guided, expected, ids[scale], gap)] if run == "argmax" else []
        if f"{run}.removed_by_filter.{name}" in data.tensors:
            removed = data.tensors[f"{run}.removed_by_filter.{name}"]
            clear += [check_filter(guided, expected, removed, controls, gap)]
        if f"{run}.raw_logits.{name}" in data.tensors:
            close(captured["raw_logits"], data.tensors[f"{run}.raw_logits.{name}"], TOLERANCE)
            last = captured[f"hidden.{model.config.depth - 1}"]
            close(last, data.tensors[f"{run}.final_hidden.{name}"], TOLERANCE)
            place = dense_plan(model.config.schedule, model.config.depth).place(scale)
            entering = model.add_level(captured["input"], place)
            close(entering, data.tensors[f"{run}.transformer_input.{name}"], ROUNDING)
            close(state.code_sum, nhwc(data.tensors[f"{run}.fhat.{name}"]), ROUNDING)
    assert np.mean(np.concatenate(clear)) >= 0.95, "too few tokens are decided clearly"
    if f"{run}.final_image" in data.tensors:
        image = (vqvae.decode(state.code_sum) + 1) / 2
        close(image, nhwc(data.tensors[f"{run}.final_image"]), TOLERANCE)


def check_ids(guided, expected, ids, gap):
    """Sampling without keys gives the stored ids; returns which tokens are clear enough to tell."""
    best = np.sort(expected, axis=-1)
    clear = best[..., -1] - best[..., -2] > gap
    drawn = np.asarray(vocabulary.sample(jnp.asarray(guided), 0, 1.0, None))
    np.testing.assert_array_equal(drawn[clear], ids[clear])
    return clear.reshape(-1)


def check_filter(guided, expected, removed, controls, gap):
    """Filters agree on every token whose two thresholds are clear; returns which those are."""
    got = np.asarray(vocabulary.removed(jnp.asarray(guided), controls.top_k, controls.top_p))
    top_k, spare = int(controls.top_k), 1 - float(controls.top_p)
    order = np.sort(expected.astype(np.float64), axis=-1)
    if 0 < top_k < order.shape[-1]:
        clear = order[..., -top_k] - order[..., -top_k - 1] > gap
        order = order[..., -top_k:]
    else:
        clear = np.ones(order.shape[:-1], bool)
    mass = np.exp(order - order[..., -1:])
    mass = np.cumsum(mass / mass.sum(-1, keepdims=True), axis=-1)
    # Logits that move by up to half the gap move a share of the mass by at most itself times gap.
    clear &= np.abs(mass - spare).min(-1) > gap * spare
    np.testing.assert_array_equal(got[clear], removed[clear] == 1)
    return clear.reshape(-1)


@pytest.mark.parametrize("stem", WITH_IMAGES)
def test_image_to_tokens_and_back(stem):
    data, (_, vqvae) = golden(stem), models(stem)
    sides = tuple(data.sidecar["config"]["var"]["patch_nums"])
    latent = vqvae.encode(jnp.asarray(nhwc(data.tensors["input_image"]).astype(np.float32)))
    close(latent, nhwc(data.tensors["encoder_feature"]), TOLERANCE)
    ids = data.scales("image_token_ids.scale")
    result = vqvae.tokenise(latent, sides)
    # Everywhere the second nearest code is farther by at least this gap in squared distance.
    if data.sidecar["image"]["min_distance_gap"] > 2 * TOLERANCE:
        for got, expected in zip(result.tokens, ids, strict=True):
            np.testing.assert_array_equal(got, expected)
        inputs = np.concatenate(result.inputs, axis=1)
        close(inputs, data.tensors["teacher_forced_input"], ROUNDING)
        close(result.code_sum, nhwc(data.scales("fhat_after_scale")[-1]), ROUNDING)
    total = jnp.zeros_like(latent)
    for scale, expected in enumerate(data.scales("fhat_after_scale")):
        codes = vqvae.codebook.lookup(jnp.asarray(ids[scale]))
        side = sides[scale]
        grid = codes.reshape(-1, side, side, codes.shape[-1])
        total = vqvae.codebook.add(total, grid, scale, len(sides))
        close(total, nhwc(expected), ROUNDING)
    close(vqvae.decode(total), nhwc(data.tensors["reconstructed_image"]), TOLERANCE)


@pytest.mark.parametrize("stem", STEMS)
def test_transformer_twin(stem):
    data, (twin, tokenizer) = golden(stem), twins(stem)
    labels = torch.tensor(data.tensors["labels"])
    logits = twin(labels, torch.tensor(data.tensors["teacher_forced_input"]))
    close(logits, data.tensors["teacher_forced_logits"], TOLERANCE)
    for run in RUNS:
        ids = [torch.tensor(part).long() for part in data.scales(f"{run}.token_ids.scale")]
        trace, total = twin.replay(labels, ids, tokenizer.quantize, data.sidecar["cfg"])
        for scale, step in enumerate(trace):
            for name, value in step.items():
                key = f"{run}.{name}.scale_{scale:02d}"
                if key in data.tensors:
                    close(value, data.tensors[key], TOLERANCE)
        if f"{run}.final_image" in data.tensors:
            image = (tokenizer.decode(total) + 1) / 2
            close(image, data.tensors[f"{run}.final_image"], TOLERANCE)


@pytest.mark.parametrize("stem", WITH_IMAGES)
def test_tokenizer_twin(stem):
    data, (_, twin) = golden(stem), twins(stem)
    feature = twin.feature(torch.tensor(data.tensors["input_image"]).float())
    close(feature, data.tensors["encoder_feature"], TOLERANCE)
    ids, sums = twin.tokenize(feature, data.sidecar["config"]["var"]["patch_nums"])
    for got, expected in zip(ids, data.scales("image_token_ids.scale"), strict=True):
        np.testing.assert_array_equal(got, expected)
    for got, expected in zip(sums, data.scales("fhat_after_scale"), strict=True):
        close(got, expected, ROUNDING)
    close(twin.decode(sums[-1]), data.tensors["reconstructed_image"], TOLERANCE)


@pytest.mark.parametrize("stem", STEMS)
def test_greedy_generation_from_nothing(stem):
    """Without feedback of stored ids the pictures of the argmax run come out, gaps permitting."""
    data, (model, _) = golden(stem), models(stem)
    weights = guidance_ramp(data.sidecar["cfg"], len(model.config.sides))
    gaps = data.sidecar["min_top2_gap_per_scale"]
    clear = [gap > 2 * TOLERANCE * (2 * w - 1) for gap, w in zip(gaps, weights, strict=True)]
    labels = jnp.asarray(data.tensors["labels"])
    _, outputs = generator(stem).run(
        dense_plan(model.config.schedule, model.config.depth),
        model.embed_condition(labels),
        generate.controls(len(weights), guidance=weights, temperature=1.0),
        sampling.image_keys(0, len(labels)),
        greedy=True,
    )
    expected = data.scales("argmax.token_ids.scale")
    for output, ids in list(zip(outputs, expected, strict=True))[: [*clear, False].index(False)]:
        np.testing.assert_array_equal(jax.device_get(output.tokens), ids)
