"""Infinity against stored activations: float32 on the CPU, the stored bits fed back.

Tolerance: logits of these models have a standard deviation of 1.4 and are sums over 128 to 512
products in each of 2 to 4 blocks, whose float32 rounding is about 1e-6; guidance 3 and temperature
0.5 multiply an error by up to (3 + 2) / 0.5 = 10. 1e-4 covers ten times the rounding seen (2e-5).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.models import sampling
from sparvar_jax.models.bsq_vae import BsqVaeConfig, to_uint8
from sparvar_jax.runtime.generate import Generator
from tests.golden import infinity_runs, test_bsq_vae
from tests.golden.support import (
    golden_stems,
    load_golden,
    load_sidecar,
    most_exempt,
    state_dict,
)
from tests.released_bsq import load_released

TOLERANCE = 1e-4
TOP_P = 0.97
STEMS = golden_stems("infinity_*")
RUNS = [(stem, run) for stem in STEMS for run in load_sidecar(stem)["runs"]]
NAMES = {
    "block_input_before_level_embed": "input",
    "raw_logits": "raw_logits",
    "guided_logits": "guided_logits",
}


@functools.cache
def load(stem):
    sidecar, tensors = load_golden(stem)
    return sidecar, tensors, Generator(infinity_runs.load_model(sidecar, tensors))


@functools.cache
def replay(stem, run):
    sidecar, tensors, generator = load(stem)
    return infinity_runs.replay(generator, run, sidecar["runs"][run], tensors)


def close(ours, stored, what):
    """Largest difference; where guidance is off only conditional rows are stored."""
    error = np.abs(ours[: len(stored)].reshape(stored.shape) - stored).max()
    assert error <= TOLERANCE, f"{what}: max abs difference {error:.2e}"
    return error


def check_scale(captured, tensors, run, index, depth):
    """Largest error of the arrays stored for a scale."""
    names = NAMES | {f"hidden_after_block_{i:02d}": f"hidden.{i}" for i in range(depth)}
    errors = [0.0]
    for stored_name, ours in names.items():
        key = f"{run}.{stored_name}.scale_{index:02d}"
        if key in tensors:
            errors.append(close(captured[ours], tensors[key], key))
    return max(errors)


def check_labels(guided, drawn, tensors, run, index, greedy):
    """Number of bits exempt because their recorded gap is within twice the tolerance."""
    stored = tensors[f"{run}.guided_logits.scale_{index:02d}"]
    gap = np.abs(stored[..., 1] - stored[..., 0])
    exempt = 0
    if greedy:
        safe = gap > 2 * TOLERANCE
        labels = tensors[f"{run}.bit_labels.scale_{index:02d}"]
        assert np.array_equal(drawn[safe], labels[safe]), f"{run} scale {index}: labels differ"
        exempt += int((~safe).sum())
    key = f"{run}.removed_by_top_p.scale_{index:02d}"
    if key in tensors:
        # A label is removed at probability 1 - top_p, that is at this logit gap.
        safe = np.abs(gap - np.log(TOP_P / (1 - TOP_P))) > 2 * TOLERANCE
        pairs = jnp.asarray(guided.reshape(stored.shape))
        removed = np.asarray(jax.jit(sampling.bits_removed)(pairs, jnp.float32(TOP_P)))
        assert np.array_equal(removed[safe], tensors[key][safe].astype(bool)), key
        exempt += int((~safe).sum())
    return exempt, gap.size


@functools.cache
def check_run(stem, run):
    """(largest error, exempt bits, bits) of one stored run."""
    sidecar, tensors, generator = load(stem)
    replayed = replay(stem, run)
    greedy = sidecar["runs"][run]["sampler"] == "argmax"
    errors, exempt, bits = [], 0, 0
    for index, captured in enumerate(replayed.captured):
        errors.append(check_scale(captured, tensors, run, index, generator.model.config.depth))
        missed, size = check_labels(
            captured["guided_logits"], replayed.labels[index], tensors, run, index, greedy
        )
        exempt, bits = exempt + missed, bits + size
    return max(errors), exempt, bits


@pytest.mark.parametrize(("stem", "run"), RUNS)
def test_activations_and_labels(stem, run, golden_note):
    error, exempt, bits = check_run(stem, run)
    golden_note(f"max error {error:.1e}, {exempt} of {bits} bits exempt")


@pytest.mark.parametrize("stem", STEMS)
def test_few_bits_are_exempt(stem, golden_note):
    """Per file: one of its runs is so short that a single bit is more than the share."""
    counts = [check_run(stem, run)[1:] for run in load_sidecar(stem)["runs"]]
    exempt, bits = (sum(column) for column in zip(*counts, strict=True))
    assert exempt <= most_exempt(bits)
    golden_note(f"{exempt} of {bits} bits exempt ({100 * exempt / bits:.4f} %)")


@pytest.mark.parametrize("stem", STEMS)
def test_pictures(stem, golden_note):
    sidecar, tensors, _ = load(stem)
    tokenizer_sidecar, tokenizer_tensors = load_golden(sidecar["tokenizer"])
    config = BsqVaeConfig(**test_bsq_vae.configuration(tokenizer_sidecar))
    tokenizer = load_released(config, state_dict(tokenizer_tensors))
    decode = jax.jit(lambda model, latent: model.decode(latent))
    for run in sidecar["runs"]:
        if f"{run}.final_latent" not in tensors:
            continue
        replayed = replay(stem, run)
        latent = tensors[f"{run}.final_latent"].transpose(0, 2, 3, 1)
        assert np.abs(replayed.code_sum - latent).max() <= TOLERANCE
        key = f"{run}.final_image_bgr_uint8"
        if key not in tensors:
            continue
        stored = tensors[key][..., ::-1].astype(int)
        image = np.asarray(decode(tokenizer, latent[: len(stored)]))
        ours = np.asarray(to_uint8(jnp.asarray(image))).astype(int)
        steps = (image + 1) / 2 * 255
        clear = np.abs(steps - np.round(steps)) > TOLERANCE * 255 / 2
        assert np.array_equal(ours[clear], stored[clear]), f"{key}: pixels differ"
        assert np.abs(ours - stored).max() <= 1
        golden_note(f"{run}: {100 * clear.mean():.2f} % of pixels clear of a step")
