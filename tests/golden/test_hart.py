"""HART against stored arrays: text encoder, transformer and tokenizer, float32.

Everything comes from the sidecars. Hidden states and logits pass at most some forty blocks of sums
of at most a few thousand products of values up to ten: sqrt(4000) roundings of 2^-24 of ten each,
times a growth of two or three, stay below 1e-4. Ids and filters are compared wherever logits off by
the error measured in that run (which this bound limits) could not change them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.models import (
    hart_parts,
    layers,
    prefix_tokens,
    quantizer,
    qwen2,
    vocabulary,
)
from tests.golden import hart_runs
from tests.golden.hart_runs import (
    TOLERANCE,
    close,
    decoded,
    golden,
    ids,
    nhwc,
    replay,
    tokenizer,
    transformer,
)
from tests.golden.support import golden_stems, load_sidecar

STEMS = golden_stems("hart_*")
RUNS = [(stem, run) for stem in STEMS for run in load_sidecar(stem)["runs"]]
SMOOTH = [(s, run) for s, run in RUNS if load_sidecar(s)["runs"][run]["more_smooth"]]
ROUNDING = 1e-5
NEAREST = 1e-4  # in squared distance of latents that differ by 1e-5
EXEMPT_SHARE = 1e-2


def likeliest(stem: str, run: str) -> bool:
    """Whether a run stores likeliest ids, or feeds them back."""
    sidecar = load_sidecar(stem)
    stored = any(name.startswith(f"{run}.argmax_ids.") for name in sidecar["tensor_index"])
    return stored or sidecar["runs"][run]["sampler"].startswith("argmax")


@pytest.mark.parametrize("stem", STEMS)
def test_text_features_and_positions(stem):
    tensors = golden(stem).tensors
    mask = tensors["text.mask"] == 1
    np.testing.assert_array_equal(prefix_tokens.positions(mask), tensors["text.position_ids"])
    system = tensors["text.system_ids"].astype(np.int32)
    for front, name in ((system, "features"), (system[:0], "features_without_system_prompt")):
        got = jax.jit(qwen2.prefix_features)(
            hart_runs.text_encoder(stem), front, tensors["text.prompt_ids"].astype(np.int32), mask
        )
        close(got, tensors[f"text.{name}"], TOLERANCE)


@pytest.mark.parametrize("stem", STEMS)
def test_levels_and_rotary_tables(stem):
    """Angles of some hundred radians have a rounding of 1e-5."""
    data, model = golden(stem), transformer(stem)
    close(jax.jit(lambda m: m.levels())(model), data.tensors["level_embedding"], ROUNDING)
    positions = data.tensors["text.position_ids"].astype(np.int32)
    positions = np.concatenate([positions, np.zeros_like(positions)])
    for scale in model.config.schedule.scales:
        rotary = functools.partial(hart_parts.rotary, model.config, scale=scale)
        table = jax.jit(rotary)(jnp.asarray(positions))
        for name, got in zip(("cos", "sin"), table, strict=True):
            expected = data.at(f"rotary.{name}", scale.index)
            if expected is not None:
                close(got, expected, ROUNDING)


@pytest.mark.parametrize(("stem", "run"), RUNS)
def test_production_loop(stem, run, golden_note):
    data, model, replayed = golden(stem), transformer(stem), replay(stem, run)
    golden_note(f"max error of guided logits {replayed.error:.1e}")
    assert replayed.error <= TOLERANCE
    condition, plan = hart_runs.condition(stem, run), hart_runs.plan(stem)
    for scale, captured in enumerate(replayed.captured):
        hidden = [captured[f"hidden.{layer}"] for layer in range(model.config.depth)]
        place = plan.place(scale)
        add_level = jax.jit(lambda m, x, place=place: m.add_level(x, place))
        entering = add_level(model, captured["input"])
        logits = captured["raw_logits"]
        if scale == 0:  # the loop asks for the last position alone
            logits = model.head_logits(jnp.asarray(hidden[-1]), condition)
            close(logits[:, -1:], captured["raw_logits"], ROUNDING)
        expected = {
            "transformer_input": (entering, ROUNDING),
            "raw_logits": (logits, TOLERANCE),
            **{f"hidden_after_block_{n:02d}": (x, TOLERANCE) for n, x in enumerate(hidden)},
        }
        for name, (got, tolerance) in expected.items():
            if data.at(f"{run}.{name}", scale) is not None:
                close(got, data.at(f"{run}.{name}", scale), tolerance)
        attention = data.at(f"{run}.block_00_attention", scale)
        if attention is not None:
            feed = data.at(f"{run}.block_00_feed_forward", scale)
            close(hidden[0] - np.asarray(entering) - feed, attention, TOLERANCE)
            block = model.blocks[0]
            between = np.asarray(entering) + attention
            got = block.ffn(layers.rms_norm(jnp.asarray(between), block.norm.scale[...]))
            close(got, feed, TOLERANCE)
        total = data.at(f"{run}.fhat", scale)
        if total is not None:
            close(replayed.sums[scale], nhwc(total), TOLERANCE)


@pytest.mark.parametrize(("stem", "run"), RUNS)
def test_filters(stem, run):
    """The share removed at every scale, and which entries where they are stored."""
    data, replayed = golden(stem), replay(stem, run)
    recorded = data.sidecar["runs"][run]["fraction_removed_by_top_k"]
    for scale, captured in enumerate(replayed.captured):
        removed = captured["removed"]
        assert removed.mean() == pytest.approx(recorded[scale], abs=1e-6)
        stored = data.at(f"{run}.removed_by_top_k", scale)
        if stored is None:
            continue
        keep = int((stored[0, 0] == 0).sum())
        order = np.sort(captured["guided_logits"], axis=-1)
        clear = order[..., -keep] - order[..., -keep - 1] > 2 * replayed.error
        assert clear.mean() >= 1 - 10 * EXEMPT_SHARE
        np.testing.assert_array_equal(removed[clear], stored[clear] == 1)


@pytest.mark.parametrize(("stem", "run"), [pair for pair in RUNS if likeliest(*pair)])
def test_likeliest_ids(stem, run, golden_note):
    """Every id whose gap is clear; with a clear recorded gap, every id of the scale."""
    data, replayed = golden(stem), replay(stem, run)
    gaps = data.sidecar["runs"][run]["min_top2_gap_per_scale"]
    exempt = 0
    for scale, captured in enumerate(replayed.captured):
        expected = data.at(f"{run}.argmax_ids", scale)
        expected = ids(stem, run)[scale] if expected is None else expected
        best = np.sort(captured["guided_logits"], axis=-1)
        clear = best[..., -1] - best[..., -2] > 2 * replayed.error
        assert clear.all() or gaps[scale] <= 4 * TOLERANCE
        exempt += int((~clear).sum())
        got = np.where(captured["removed"], -np.inf, captured["guided_logits"]).argmax(-1)
        np.testing.assert_array_equal(got[clear], expected[clear])
    golden_note(f"{exempt} ids exempt")
    assert exempt <= EXEMPT_SHARE * sum(part.size for part in ids(stem, run))


@pytest.mark.parametrize(("stem", "run"), SMOOTH)
def test_mixtures(stem, run):
    """Codes mixed from filtered logits and stored noise, scale by scale.

    From stored logits they are right to rounding. Logits that are off by e change logarithms of
    weights by d = e (1 + r) / tau, so weights by 2 d in all, and the mixture by that share of the
    largest code.
    """
    data, replayed, book = golden(stem), replay(stem, run), tokenizer(stem).codebook
    taus = data.sidecar["runs"][run]["gumbel_tau"]
    largest = float(np.abs(np.asarray(book.codes[...])).max())
    checked = 0
    for scale, captured in enumerate(replayed.captured):
        expected, draws = (data.at(f"{run}.{n}", scale) for n in ("codes", "gumbel_exponentials"))
        if expected is None or draws is None:
            continue
        share = hart_parts.progress(scale, len(data.sides))
        noise = -np.log(draws.astype(np.float32))
        mixed = jax.jit(lambda book, *x, s=share: book.lookup(vocabulary.mixed(*x, s)))
        change = 2 * replayed.error * (1 + share) / taus[scale]
        stored = data.at(f"{run}.guided_logits", scale)
        sources = [(captured["guided_logits"], ROUNDING + change * largest)]
        sources += [] if stored is None else [(stored, TOLERANCE)]
        for logits, tolerance in sources:
            kept = np.where(captured["removed"], -np.inf, logits)
            got = mixed(book, jnp.asarray(kept), jnp.asarray(noise))
            close(got, nhwc(expected).reshape(got.shape), tolerance)
            checked += 1
    assert checked


@pytest.mark.parametrize("stem", STEMS)
def test_image_to_hybrid_tokens_and_back(stem):
    data, vqvae = golden(stem), tokenizer(stem)
    tensors, sides = data.tensors, data.sides
    image = jnp.asarray(nhwc(tensors["tokenizer.image"]).astype(np.float32))
    latent = jax.jit(lambda model, x: model.encode(x))(vqvae, image)
    close(latent, nhwc(tensors["tokenizer.encoder_feature"]), TOLERANCE)
    close(latent, nhwc(tensors["tokenizer.fhat_hybrid_forward"]), TOLERANCE)
    stored = [data.at("tokenizer.token_ids", scale) for scale in range(len(sides))]
    inputs, total = known_ids(vqvae.codebook, latent, stored, sides)
    close(inputs, tensors["tokenizer.teacher_forced_input"], TOLERANCE)
    close(total, nhwc(tensors["tokenizer.fhat_discrete_only_with_phi"]), TOLERANCE)
    if min(data.sidecar["image"]["nearest_code_gap_per_scale"]) > NEAREST:
        result = jax.jit(lambda model, x: model.tokenise(x, sides))(vqvae, latent)
        for got, expected in zip(result.tokens, stored, strict=True):
            np.testing.assert_array_equal(got, expected)
        close(np.concatenate(result.inputs, axis=1), inputs, TOLERANCE)
        close(result.code_sum, total, TOLERANCE)
    before = nhwc(tensors["tokenizer.fhat_before_last"])
    codes = vqvae.codebook.lookup(jnp.asarray(stored[-1])).reshape(before.shape)
    rest = (np.asarray(latent) - before).reshape(1, -1, before.shape[-1])
    close(rest, tensors["tokenizer.residual_before_last_tokens"], TOLERANCE)
    discrete = before + np.asarray(codes)
    close(discrete, nhwc(tensors["tokenizer.fhat_hybrid_discrete_without_phi"]), TOLERANCE)
    got = decoded(vqvae, discrete)
    close(got, nhwc(tensors["tokenizer.image_discrete_without_phi"]), TOLERANCE)


def known_ids(book, latent, stored, sides) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of all scales but the first and the last sum, from stored ids.

    Those of every scale come out wherever the second nearest code is clearly farther.
    """
    codes, total, inputs = np.asarray(book.codes[...], np.float64), jnp.zeros_like(latent), []

    @functools.partial(jax.jit, static_argnames="scale")
    def step(book, total, known, scale):
        side = sides[scale]
        grid = quantizer.next_input(total, (side, side), mode="area") if scale else None
        rest = quantizer.resize(latent - total, (side, side), "area")
        flat = rest.reshape(len(latent), side * side, -1)
        found = book.lookup(known).reshape(rest.shape)
        return grid, flat, book.nearest(flat), book.add(total, found, scale, len(sides))

    for scale, side in enumerate(sides):
        grid, flat, nearest_ids, total = step(book, total, jnp.asarray(stored[scale]), scale)
        if scale:
            inputs.append(np.asarray(grid).reshape(len(latent), side * side, -1))
        points = np.asarray(flat, np.float64)
        distance = (codes**2).sum(-1) - 2 * points @ codes.T
        nearest = np.partition(distance, 1, axis=-1)
        clear = nearest[..., 1] - nearest[..., 0] > NEAREST
        np.testing.assert_array_equal(np.asarray(nearest_ids)[clear], stored[scale][clear])
    return np.concatenate(inputs, axis=1), np.asarray(total)
