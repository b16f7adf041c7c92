"""What works on groups of rows: the same as all rows together, in the memory of one group."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from sparvar_jax.models import groups, hart_parts
from sparvar_jax.models.family import Draw, Forced
from sparvar_jax.models.hart import Hart, HartConfig
from sparvar_jax.models.infinity_parts import FeedForward
from sparvar_jax.models.layers import Precision
from sparvar_jax.models.sampling import image_keys
from sparvar_jax.models.var import Var
from sparvar_jax.models.var_parts import VarConfig
from sparvar_jax.models.vqvae import Vqvae, VqvaeConfig
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.runtime.controls import controls
from sparvar_jax.weights import matrix
from sparvar_jax.weights.matrix import FEWEST_TOKENS

WIDTH, HIDDEN = 32, 128


def plain(width=WIDTH, hidden=HIDDEN):
    return FeedForward(width, hidden, Precision("float32"), nnx.Rngs(0))


def gated():
    return hart_parts.FeedForward(HartConfig(1, 32, 2, dtype="float32"), nnx.Rngs(0))


def narrow():
    """Both matrices in 8 bits, each in its own dtype; the norm before them gives 8 bits too."""
    made = plain()
    for layer in (made.fc1, made.fc2):
        small = matrix.narrow(layer.kernel[...], layer.narrow)
        layer.kernel, layer.kernel_scale = nnx.Param(small.values), nnx.data(nnx.Param(small.scale))
        layer.is_narrow = True
    return made


@pytest.mark.parametrize(
    ("count", "tokens", "least", "expected"),
    [
        (2, 4096, 2, 2),  # one picture of 1024x1024 and its unconditional row
        (2, 9216, 2, 2),  # one picture, however large
        (16, 4096, 2, 2),
        (128, 1024, 2, 8),
        (8, 2304, 2, 3),  # at most 3 together: groups of 3, 3 and 2
        (10, 2304, 2, 3),  # of 3, 3, 3 and 1
        (9, 2048, 2, 3),  # not 4, 4 and 1: groups of a size
        (1000, 1, 2, 1000),
        (4, 8192, 1, 1),  # pictures of two rows each
    ],
)
def test_how_many_go_together(count, tokens, least, expected):
    found = groups.at_once(count, tokens, least)
    assert found == expected


@pytest.mark.parametrize("make", [plain, gated, narrow])
def test_a_layer_over_groups_gives_what_it_gives_at_once(make, monkeypatch):
    """Five rows: groups of two, and a last one. Only the order of additions may change: a float32
    sum of I terms is off by I + 2 roundings of the sum of magnitudes at most (Higham, section 3.1),
    which is about sqrt(I) times the sum where signs are mixed; both ways are.

    In 8 bits sums are exact, but a GELU rounded apart may put a value one step of e4m3 further,
    which is at most 1/8 of it: rarely, so that the difference as a whole stays far below.
    """
    layer = make()
    x = jax.random.normal(jax.random.key(1), (5, FEWEST_TOKENS, WIDTH))
    whole = layer(x)
    monkeypatch.setattr(groups, "TOKENS_AT_ONCE", 2 * FEWEST_TOKENS)
    ours = jax.jit(layer)(x)
    assert "while" in jax.jit(layer).lower(x).as_text()
    if make is narrow:  # its norm may have rounded already
        np.testing.assert_array_equal(jax.jit(layer)(pallas_kernels.quantise(x, jnp.int8)), ours)
    error = np.linalg.norm(ours - whole) / np.linalg.norm(whole)
    derived = 2 * (WIDTH + 2 + HIDDEN + 2) * 2.0**-24 * HIDDEN**0.5
    assert error < (1e-3 if make is narrow else derived)


@pytest.mark.parametrize("make", [plain, gated, narrow])
def test_one_picture_is_not_divided(make):
    """Two rows of the largest scale: the products alone, and so the same bits as ever."""
    layer = make()
    text = jax.jit(layer).lower(jax.ShapeDtypeStruct((2, 4096, WIDTH), jnp.float32)).as_text()
    assert "while" not in text
    assert "concatenate" not in text


def temporaries(rows, layer):
    """Bytes that XLA lays out besides arguments and results."""
    x = jax.ShapeDtypeStruct((rows, 4096, WIDTH), jnp.float32)
    return jax.jit(layer).lower(x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("make", [plain, gated])
def test_the_hidden_maps_of_a_batch_take_what_those_of_a_picture_take(make):
    """By XLA's own account. Without groups sixteen rows would take eight times as much."""
    layer = make()
    one, two, eight = (temporaries(rows, layer) for rows in (2, 4, 16))
    hidden = 4 * 2 * 4096 * HIDDEN
    assert hidden <= one
    # A group's input and output are copies of a row's width.
    assert one <= two <= one + 2 * 4 * 2 * 4096 * WIDTH + 4096
    assert eight <= two + 4096


@pytest.mark.parametrize("make", [plain, gated])
def test_layers_after_each_other_take_what_two_take(make):
    """By XLA's own account: no layer holds room for its result while another one runs."""

    def stacked(count):
        def run(x):
            for _ in range(count):
                x = x + layer(jnp.tanh(x))
            return x

        return run

    layer, rows = make(), 16
    two, six = (temporaries(rows, stacked(count)) for count in (2, 6))
    assert six < two + 4 * rows * 4096 * WIDTH / 2


@functools.cache
def of_classes():
    """A model, what three of its pictures are told, and what turns their tokens into codes."""
    config = VarConfig(
        1, 32, 2, sides=(1, 4, 6), classes=5, vocab=48, code_width=8, dtype="float32"
    )
    model = Var(config, rngs=nnx.Rngs(0))
    return model, model.embed_condition(jnp.arange(3)), None


@functools.cache
def of_prompts():
    config = HartConfig.preset(
        "hart_tiny", depth=1, width=64, heads=2, residual_depth=1, dtype="float32"
    )
    model = Hart(config, rngs=nnx.Rngs(0))
    codes = VqvaeConfig(config.vocab, 8, base_width=32, multipliers=(1, 2), blocks=1)
    text = jax.random.normal(jax.random.key(4), (3, config.text_tokens, config.text_width))
    condition = model.embed_condition(text, jnp.zeros((3, config.text_tokens), int), "learned")
    return model, condition, Vqvae(codes, rngs=nnx.Rngs(1)).codebook


def drawn(family, *, how="sample", keys=True, **changes):
    """What the pictures draw at the last scale from made-up hidden states."""
    model, condition, codebook = family()
    schedule = model.config.schedule
    index = len(schedule) - 1
    place = dense_plan(schedule, 1).place(index, 0)
    shape = (6, schedule.scales[index].tokens, model.config.width)
    x = 3 * jax.random.normal(jax.random.key(2), shape)
    draw = Draw(
        controls(len(schedule), guidance=3.0), index, 3, image_keys(5, 3) if keys else None, how,
        guided=True, codebook=codebook,
    )  # fmt: skip
    draw = dataclasses.replace(draw, **changes)
    return jax.jit(lambda x, condition: model.finish(x, condition, place, draw))(x, condition)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        (of_classes, {}),
        (of_prompts, {"how": "smooth"}),  # ids are drawn too, for the residuals
        *(
            pytest.param(family, options, marks=pytest.mark.slow)
            for family, options in (
                (of_classes, {"how": "smooth"}),
                (of_classes, {"keys": False}),
                (of_prompts, {}),
                (of_prompts, {"keys": False}),
            )
        ),
    ],
)
def test_pictures_drawn_in_groups_are_those_drawn_at_once(family, options, monkeypatch):
    """A group of two and one of one: every picture has its own key, and meets its own rows.

    Sums of a row's channels may be added in another order, which moves logits by less than what
    would change a token here, and mixtures and residuals by some roundings of 1.
    """
    whole = drawn(family, **options)
    monkeypatch.setattr(groups, "TOKENS_AT_ONCE", 4 * family()[0].config.schedule.scales[-1].tokens)
    ours = drawn(family, **options)
    assert whole.captured
    assert not ours.captured
    assert len({bytes(np.asarray(picture)) for picture in ours.tokens}) == 3
    np.testing.assert_allclose(ours.tokens, whole.tokens, rtol=0, atol=1e-4)
    assert (ours.codes is None) == (whole.codes is None)
    if whole.codes is not None:
        np.testing.assert_allclose(ours.codes, whole.codes, rtol=0, atol=1e-4)


def test_what_is_captured_or_forced_is_drawn_at_once(monkeypatch):
    monkeypatch.setattr(groups, "TOKENS_AT_ONCE", 1)
    assert drawn(of_classes, complete=True).captured["raw_logits"].shape[0] == 6
    tokens = jnp.zeros((3, 36), jnp.int32)
    given = drawn(of_classes, forced=Forced(tokens))
    np.testing.assert_array_equal(given.tokens, tokens)
