"""Class-conditional VAR and its VQVAE against stored arrays: JAX and the PyTorch twins, float32.

Everything comes from the sidecars. Logits, guided ones included, and images agree within 1e-4 (the
stored runs' own one-pass and cached logits differ by 8e-6). Codes in the sum have about ten terms
of order one: 1e-5. Ids and filters are compared, with the stored ids fed back, wherever logits that
are each off by the error measured in that run (which the first bound limits) could not change them.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sparvar_jax.models import sampling, vocabulary
from sparvar_jax.runtime import generate
from sparvar_jax.study.teacher import teacher_forced_logits
from tests.golden.support import golden_stems, load_sidecar, most_exempt
from tests.golden.var_runs import (
    Golden,
    condition,
    controls,
    generator,
    golden,
    models,
    plan,
    replay,
    twins,
)

STEMS = golden_stems("var_*")
WITH_IMAGES = [stem for stem in STEMS if load_sidecar(stem)["image"]]
TOLERANCE = 1e-4
ROUNDING = 1e-5
RUNS = ("argmax", "sampled")


def close(got, expected, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(got), expected, atol=tolerance, rtol=0)


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


decode = jax.jit(lambda model, x: model.decode(x))


def decoded(vqvae, code_sum) -> np.ndarray:
    return np.asarray(decode(vqvae, code_sum))


def teacher_inputs(data: Golden) -> list[np.ndarray]:
    ends = np.cumsum([side * side for side in data.sides[1:]])
    return np.split(data.tensors["teacher_forced_input"], ends[:-1], axis=1)


@pytest.mark.parametrize("stem", STEMS)
def test_one_pass_logits(stem, golden_note):
    data, (model, _) = golden(stem), models(stem)
    labels = jnp.asarray(data.tensors["labels"])

    @jax.jit
    def logits(model, inputs):
        condition = model.embed_condition(labels, guidance=False)
        return teacher_forced_logits(model, condition, inputs, model.config.schedule)

    got = logits(model, tuple(jnp.asarray(part) for part in teacher_inputs(data)))
    expected = data.tensors["teacher_forced_logits"]
    golden_note(f"max error {np.abs(np.concatenate(got, axis=1) - expected).max():.1e}")
    close(np.concatenate(got, axis=1), expected, TOLERANCE)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("stem", STEMS)
def test_production_loop(stem, run, golden_note):
    data, replayed = golden(stem), replay(stem, run)
    golden_note(f"max error of guided logits {replayed.error:.1e}")
    assert replayed.error <= TOLERANCE
    model, vqvae = models(stem)
    for scale, captured in enumerate(replayed.captured):
        name = f"scale_{scale:02d}"
        if f"{run}.raw_logits.{name}" not in data.tensors:
            continue
        close(captured["raw_logits"], data.tensors[f"{run}.raw_logits.{name}"], TOLERANCE)
        last = captured[f"hidden.{model.config.depth - 1}"]
        close(last, data.tensors[f"{run}.final_hidden.{name}"], TOLERANCE)
        place = plan(stem).place(scale)
        add_level = jax.jit(lambda model, x, place=place: model.add_level(x, place))
        entering = add_level(model, captured["input"])
        close(entering, data.tensors[f"{run}.transformer_input.{name}"], ROUNDING)
        close(replayed.sums[scale], nhwc(data.tensors[f"{run}.fhat.{name}"]), ROUNDING)
    if f"{run}.final_image" in data.tensors:
        image = (decoded(vqvae, replayed.sums[-1]) + 1) / 2
        close(image, nhwc(data.tensors[f"{run}.final_image"]), TOLERANCE)


@pytest.mark.parametrize("stem", STEMS)
def test_ids_and_filters(stem, golden_note):
    """Of all ids of a file, and of all tokens with a stored filter, few are exempt."""
    ids = np.concatenate(list(clear_ids(stem)))
    filters = np.concatenate(list(clear_filters(stem)))
    for what, clear in (("ids", ids), ("tokens' filters", filters)):
        exempt = int((~clear).sum())
        golden_note(f"{exempt} of {clear.size} {what} exempt")
        assert exempt <= most_exempt(clear.size)


def clear_ids(stem: str) -> Iterator[np.ndarray]:
    """Which tokens' largest logit is clear, per scale; there the stored ids come out."""
    data, replayed = golden(stem), replay(stem, "argmax")
    expected = data.scales("argmax.guided_logits.scale")
    ids = data.scales("argmax.token_ids.scale")
    largest = jax.jit(lambda x: vocabulary.sample(x, jnp.int32(0), jnp.float32(1), None))
    for scale, captured in enumerate(replayed.captured):
        best = np.sort(expected[scale], axis=-1)
        clear = best[..., -1] - best[..., -2] > 2 * replayed.error
        drawn = np.asarray(largest(captured["guided_logits"]))
        np.testing.assert_array_equal(drawn[clear], ids[scale][clear])
        yield clear.reshape(-1)


def clear_filters(stem: str) -> Iterator[np.ndarray]:
    """Which tokens have both thresholds clear, per scale; there the stored filters come out."""
    data, replayed, options = golden(stem), replay(stem, "sampled"), controls(stem)
    top_k, spare = int(options.top_k), 1 - float(options.top_p)
    gap = 2 * replayed.error
    expected = data.scales("sampled.guided_logits.scale")
    stored = data.scales("sampled.removed_by_filter.scale")
    removed = jax.jit(vocabulary.removed)
    for scale, captured in enumerate(replayed.captured):
        order = np.sort(expected[scale].astype(np.float64), axis=-1)
        clear = order[..., -top_k] - order[..., -top_k - 1] > gap
        order = order[..., -top_k:]
        mass = np.exp(order - order[..., -1:])
        mass = np.cumsum(mass / mass.sum(-1, keepdims=True), axis=-1)
        # Logits off by up to half the gap move a share of the mass by at most itself times gap.
        clear &= np.abs(mass - spare).min(-1) > gap * spare
        got = np.asarray(removed(captured["guided_logits"], options.top_k, options.top_p))
        np.testing.assert_array_equal(got[clear], stored[scale][clear] == 1)
        yield clear.reshape(-1)


@pytest.mark.parametrize("stem", WITH_IMAGES)
def test_image_to_tokens_and_back(stem):
    data, (_, vqvae) = golden(stem), models(stem)
    image = jnp.asarray(nhwc(data.tensors["input_image"]).astype(np.float32))
    latent = jax.jit(lambda model, image: model.encode(image))(vqvae, image)
    close(latent, nhwc(data.tensors["encoder_feature"]), TOLERANCE)
    # Everywhere the second nearest code is farther by at least this gap in squared distance.
    assert data.sidecar["image"]["min_distance_gap"] > 2 * TOLERANCE
    result = jax.jit(lambda model, latent: model.tokenise(latent, data.sides))(vqvae, latent)
    ids, sums = data.scales("image_token_ids.scale"), data.scales("fhat_after_scale")
    for got, expected in zip(result.tokens, ids, strict=True):
        np.testing.assert_array_equal(got, expected)
    inputs = np.concatenate(result.inputs, axis=1)
    close(inputs, data.tensors["teacher_forced_input"], ROUNDING)
    close(result.code_sum, nhwc(sums[-1]), ROUNDING)
    for got, expected in zip(code_sums(vqvae, data, latent, ids), sums, strict=True):
        close(got, nhwc(expected), ROUNDING)
    image = decoded(vqvae, nhwc(sums[-1]))
    close(image, nhwc(data.tensors["reconstructed_image"]), TOLERANCE)


def code_sums(vqvae, data: Golden, latent, ids) -> list[np.ndarray]:
    """The running sum after every scale, from ids."""

    @jax.jit
    def sums(book, ids):
        total, results = jnp.zeros_like(latent), []
        for scale, (side, tokens) in enumerate(zip(data.sides, ids, strict=True)):
            codes = book.lookup(tokens)
            grid = codes.reshape(-1, side, side, codes.shape[-1])
            total = book.add(total, grid, scale, len(data.sides))
            results.append(total)
        return results

    return sums(vqvae.codebook, ids)


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
    ids, sums = twin.tokenize(feature, data.sides)
    for got, expected in zip(ids, data.scales("image_token_ids.scale"), strict=True):
        np.testing.assert_array_equal(got, expected)
    for got, expected in zip(sums, data.scales("fhat_after_scale"), strict=True):
        close(got, expected, ROUNDING)
    close(twin.decode(sums[-1]), data.tensors["reconstructed_image"], TOLERANCE)


@pytest.mark.parametrize("stem", STEMS)
def test_greedy_generation_from_nothing(stem):
    """Without feedback of stored ids those of the argmax run come out: every gap is wide enough."""
    data = golden(stem)
    assert min(data.sidecar["min_top2_gap_per_scale"]) > 2 * replay(stem, "argmax").error
    _, outputs = generator(stem).run(
        plan(stem),
        condition(stem),
        generate.controls(len(data.sides), guidance=data.guidance, temperature=1.0),
        sampling.image_keys(0, len(data.tensors["labels"])),
        how="greedy",
    )
    for output, ids in zip(outputs, data.scales("argmax.token_ids.scale"), strict=True):
        np.testing.assert_array_equal(jax.device_get(output.tokens), ids)
