"""A family with a diffusion head at its last scale and a top-k of its own for every scale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.models import layers, sampling
from sparvar_jax.models.var import Var, VarConfig
from sparvar_jax.models.vqvae import Vqvae, VqvaeConfig
from sparvar_jax.pipelines import family
from sparvar_jax.pipelines.class_requests import ClassOptions
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.weights import checkpoint
from tests.tiny_model import random_parameters

CONFIG = VarConfig(
    2, 128, 2, sides=(1, 2, 4), classes=5, vocab=48, code_width=8, dtype="float32"
)  # fmt: skip
TOKENIZER = VqvaeConfig(48, 8, base_width=32, multipliers=(1, 1), blocks=1)
TOP_K = (0, 1, 3)
STEPS = 4


class Refined(Var):
    """Token ids as in VAR; at the last scale a residual, denoised from the hidden states."""

    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        inputs = config.width + config.code_width
        self.hidden = layers.linear(inputs, 32, config.precision, rngs)
        self.residual = layers.linear(32, config.code_width, config.precision, rngs)

    def finish(self, x, condition, place, draw):
        top_k = jnp.int32(TOP_K[place.index])
        own = dataclasses.replace(draw.controls, top_k=top_k)
        drawn = super().finish(x, condition, place, dataclasses.replace(draw, controls=own))
        if place.index + 1 < len(self.config.sides):
            return drawn
        return drawn._replace(codes=self.denoise(layers.layer_norm(draw.rows(x)), draw))

    def denoise(self, x, draw):
        """Four steps from noise; every one is guided, and adds noise from the image's own key."""

        def noise(step):
            shape = (x.shape[1], self.config.code_width)
            if draw.keys is None:
                return jnp.zeros((draw.batch, *shape))
            own = jax.vmap(jax.random.fold_in, (0, None))(draw.keys, step)
            return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(own)

        codes = noise(0)
        for step in range(1, STEPS + 1):
            rows = jnp.tile(codes, (len(x) // draw.batch, 1, 1))
            raw = self.residual(jnp.tanh(self.hidden(jnp.concatenate([x, rows], -1))))
            guide = sampling.mix(raw, draw.controls.guidance[draw.index]) if draw.guided else raw
            codes = 0.5 * codes + guide[: draw.batch] + 0.1 * noise(step)
        return codes

    def accumulate(self, drawn, code_sum, scale, following, codebook):
        code_sum, codes = super().accumulate(drawn, code_sum, scale, following, codebook)
        if drawn.codes is not None:
            code_sum = code_sum + drawn.codes.reshape(code_sum.shape)
        return code_sum, codes


@dataclasses.dataclass(frozen=True)
class RefinedOptions(ClassOptions):
    """Options of classes; greedy takes the likeliest tokens and denoises from zeros."""

    greedy: bool = False

    def how(self, model):
        return "greedy" if self.greedy else super().how(model)


REFINED = dataclasses.replace(
    family.VAR,
    kind="refined",
    parts={**family.VAR.parts, "transformer": {"refined": (Refined, VarConfig)}},
    options=RefinedOptions,
)
PARTS = {
    "transformer": ("refined", Refined, CONFIG),
    "tokenizer": ("vqvae", Vqvae, TOKENIZER),
}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A pipeline of the family, registered for these tests alone and loaded from a directory."""
    folder = tmp_path_factory.mktemp("refined") / "model"
    for seed, (part, (kind, module, config)) in enumerate(PARTS.items()):
        checkpoint.write_part(
            folder,
            part,
            random_parameters(module, config, seed),
            config={"kind": kind, **checkpoint.config_to_json(config)},
            source={"made": "random"},
            defaults={"guidance": 2.0} if part == "transformer" else {},
            form="safetensors",
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "_FAMILIES", dict(family._FAMILIES))
        family.register_family(REFINED)
        yield Pipeline.from_checkpoint(folder, dtype="float32")


def draw(pipe, classes, **options):
    """(code sum, tokens of every scale) of a call."""
    request = pipe.request(classes, **options)
    *_, last = outputs = list(pipe.steps(request))
    return np.asarray(last[0].code_sum), [np.asarray(output.tokens) for _, output in outputs]


def test_it_loads_and_draws_like_any_family(pipe):
    assert isinstance(pipe.model.transformer, Refined)
    assert pipe.model.family == REFINED
    pictures = pipe([1, 3], seed=5)
    assert (pictures.shape, pictures.dtype) == ((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"has no option steps.*greedy"):
        pipe([1], steps=4)
    with pytest.raises(ValueError, match="another family has the kind 'refined'"):
        family.register_family(dataclasses.replace(REFINED, options=ClassOptions))


def test_a_picture_depends_on_its_own_key_alone(pipe):
    """Tokens are equal; sums of codes are of order 1 and differ in the order of float32 sums."""
    together, tokens = draw(pipe, [1, 3], seed=5)
    for image, (label, seed) in enumerate([(1, 5), (3, 6)]):
        alone, own = draw(pipe, [label], seed=seed)
        for ours, theirs in zip(tokens, own, strict=True):
            np.testing.assert_array_equal(ours[image], theirs[0])
        np.testing.assert_allclose(together[image], alone[0], atol=1e-5, rtol=1e-5)
    assert not np.array_equal(tokens[-1], draw(pipe, [1, 3], seed=9)[1][-1])


def test_greedy_twice_is_equal(pipe):
    first, tokens = draw(pipe, [1, 3], seed=5, greedy=True)
    again, others = draw(pipe, [1, 3], seed=7, greedy=True)
    np.testing.assert_array_equal(first, again)
    for ours, theirs in zip(tokens, others, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(first, draw(pipe, [1, 3], seed=5)[0])


@pytest.fixture(scope="module")
def captured(pipe):
    """(request, outputs with inner arrays, the last state's code sum)."""
    request = pipe.request([1, 3], seed=5)
    arguments = (request.plan, request.condition, request.controls, request.keys)
    *_, last = outputs = list(pipe.generator.steps(*arguments, capture=True))
    return request, [output for _, output in outputs], np.asarray(last[0].code_sum)


def test_every_scale_has_its_own_top_k(captured):
    _, outputs, _ = captured
    ranks = []
    for output in outputs:
        logits = np.asarray(output.captured["guided_logits"])
        taken = np.take_along_axis(logits, np.asarray(output.tokens)[..., None], -1)
        ranks.append((logits > taken).sum(-1))
    assert ranks[1].max() == 0
    assert 0 < ranks[2].max() < 3


def test_the_residual_is_the_heads(pipe, captured):
    """Denoised again in float64; the head's float32 sums of 136 products are of order 1."""
    request, outputs, code_sum = captured
    model, codebook = pipe.model.transformer, pipe.model.codebook
    x = np.asarray(outputs[-1].captured["hidden.1"], np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    keys = [jax.random.fold_in(key, 2) for key in request.keys]
    noise = np.stack(
        [[jax.random.normal(jax.random.fold_in(key, step), (16, 8)) for key in keys]
         for step in range(STEPS + 1)]
    ).astype(np.float64)  # fmt: skip
    strength = float(request.controls.guidance[2])
    codes = noise[0]
    for step in range(1, STEPS + 1):
        rows = np.concatenate([x, np.concatenate([codes, codes])], -1)
        for part, after in ((model.hidden, np.tanh), (model.residual, lambda y: y)):
            rows = after(rows @ np.float64(part.kernel[...]) + np.float64(part.bias[...]))
        guided = strength * rows[:2] + (1 - strength) * rows[2:]
        codes = 0.5 * codes + guided + 0.1 * noise[step]
    plain = model.start_codes(2, request.plan.schedule)
    for output, side in zip(outputs, CONFIG.sides, strict=True):
        grid = codebook.lookup(output.tokens).reshape(2, side, side, 8)
        plain = codebook.add(plain, grid, CONFIG.sides.index(side), 3)
    np.testing.assert_allclose(code_sum - plain, codes.reshape(plain.shape), atol=1e-4)
