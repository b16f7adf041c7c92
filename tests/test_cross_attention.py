"""Cross-attention with a short text folded into its maps, against float64 and the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparvar_jax.models.cross_attention import CrossAttention, FoldedText, TextMemory
from sparvar_jax.models.layers import Precision

WIDTH, HEADS = 256, 2
HEAD_DIM = WIDTH // HEADS


def example(tokens, rows=2, dtype="bfloat16"):
    """A layer with biases, 40 queries, and texts of full length and of five tokens."""
    layer = CrossAttention(WIDTH, HEADS, Precision(dtype), nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 8))

    def randomise(leaf):
        spread = 1.0 if leaf.ndim == 1 else 2.0 * WIDTH**-0.5
        return (spread * jax.random.normal(next(keys), leaf.shape)).astype(leaf.dtype)

    nnx.update(layer, jax.tree.map(randomise, nnx.state(layer)))
    x = jax.random.normal(next(keys), (rows, 40, WIDTH)).astype(dtype)
    memory = jax.random.normal(next(keys), (rows, tokens, WIDTH)).astype(dtype)
    mask = jnp.arange(tokens) < jnp.array([tokens, 5])[:rows, None]
    return layer, x, memory, mask


def truth(layer, x, memory, mask):
    """Float64, projection by projection, without the output's bias."""
    state = {
        "/".join(map(str, path)): np.asarray(leaf[...], np.float64)
        for path, leaf in nnx.to_flat_state(nnx.state(layer))
    }
    x, memory = np.asarray(x, np.float64), np.asarray(memory, np.float64)

    def heads(array):
        return array.reshape(*array.shape[:2], HEADS, HEAD_DIM)

    q = heads(x @ state["q/kernel"] + state["q/bias"])
    k, v = np.split(memory @ state["kv/kernel"], 2, axis=-1)
    k, v = heads(k), heads(v + state["v_bias"])
    scores = np.einsum("rthd,rmhd->rhtm", q, k) / np.sqrt(HEAD_DIM)
    scores = np.where(np.asarray(mask)[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("rhtm,rmhd->rthd", weights, v)
    return out.reshape(x.shape) @ state["proj/kernel"]


def error(out, want):
    return np.linalg.norm(np.asarray(out, np.float64) - want) / np.linalg.norm(want)


def test_folding_a_short_text_is_as_exact_as_the_plain_form():
    """Both round operands of four products to bfloat16; neither is allowed much more error."""
    layer, x, memory, mask = inputs = example(tokens=32)
    folded, plain = (layer.text(memory, mask, fused) for fused in (None, "xla"))
    assert isinstance(folded, FoldedText)
    assert isinstance(plain, TextMemory)
    want = truth(*inputs)
    reference = error(layer(x, plain, "xla"), want)
    assert 0 < reference < 2e-2
    assert error(layer(x, folded, None), want) <= 1.5 * reference


def test_folded_text_serves_the_first_rows_alone():
    layer, x, memory, mask = example(tokens=16)
    text = layer.text(memory, mask, None)
    both, alone = layer(x, text, None), layer(x[:1], text, None)
    assert error(alone, np.asarray(both[:1], np.float64)) < 2**-9


@pytest.mark.parametrize(("tokens", "dtype"), [(33, "bfloat16"), (16, "float32")])
def test_long_texts_and_exact_precision_stay_plain(tokens, dtype):
    layer, x, memory, mask = inputs = example(tokens, dtype=dtype)
    text = layer.text(memory, mask, None)
    assert isinstance(text, TextMemory)
    assert error(layer(x, text, None), truth(*inputs)) < (2e-2 if dtype == "bfloat16" else 1e-5)
