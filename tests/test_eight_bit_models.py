"""Models made 8 bits: how much memory that takes, and what comes out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import models
from sparvar_jax.models import eight_bits
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.pipelines import loading, parts
from sparvar_jax.pipelines.memory import parameter_bytes
from sparvar_jax.weights import checkpoint
from tests import tiny_model

CONFIG = InfinityConfig(
    depth=8, width=64, heads=2, text_width=128, text_max_length=16, bits=8, dtype="float32"
)
LARGEST = 4 * 4 * 64 * 64  # bytes of the largest matrix, fc1
BATCH = 4 * LARGEST


def held():
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.fixture
def peak(monkeypatch):
    """Most bytes of arrays that were alive, beyond those before, whenever a matrix was rounded."""
    seen, before, rounding = [0], held(), eight_bits._narrow

    def watched(kernel, *, dtype):
        made = rounding(kernel, dtype=dtype)
        seen[0] = max(seen[0], held() - before)
        return made

    monkeypatch.setattr(eight_bits, "_narrow", watched)
    return lambda: seen[0]


@pytest.fixture(scope="module")
def parameters():
    return tiny_model.random_parameters(Infinity, CONFIG, 0)


def sizes():
    """Bytes of the dense model and of the one in 8 bits."""
    modules = (parts.abstract_module(Infinity, CONFIG, form) for form in (None, "int8"))
    return [parameter_bytes(checkpoint.abstract_parameters(module)) for module in modules]


@pytest.mark.parametrize(("written", "form"), [("orbax", "int8"), ("safetensors", "fp8")])
def test_loading_never_holds_the_dense_matrices_at_once(
    written, form, parameters, peak, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint, "LOAD_BYTES", BATCH)
    folder = tmp_path / "model"
    checkpoint.write_part(
        folder, "transformer", parameters, form=written,
        config={"kind": "infinity", **checkpoint.config_to_json(CONFIG)}, source={"made": "random"},
    )  # fmt: skip
    model = parts.load_module(folder, "transformer", Infinity, CONFIG, form)
    dense, narrow = sizes()
    assert narrow / 2 < peak() <= narrow + BATCH + LARGEST < 0.75 * dense
    block = model.blocks[3]
    for layer, path in ((block.attn.qkv, "attn.qkv"), (block.ffn.fc2, "ffn.fc2")):
        kernel = parameters[f"blocks.3.{path}.kernel"].T
        values, scale = np.asarray(layer.kernel[...]), np.asarray(layer.kernel_scale[...])
        eight_bit_integers = form == "int8" and path == "attn.qkv"
        assert values.dtype == (jnp.int8 if eight_bit_integers else jnp.float8_e4m3fn)
        top = np.abs(kernel).max(axis=1)
        np.testing.assert_allclose(scale, top / (127 if eight_bit_integers else 448), rtol=1e-6)
        error = np.abs(values.astype(np.float32) * scale[:, None] - kernel)
        step = top[:, None] / 127 / 2 if eight_bit_integers else np.abs(kernel) * 2.0**-4
        assert (error <= 1.001 * step + top[:, None] * 2.0**-18).all()


def test_random_models_are_rounded_as_they_are_drawn(peak):
    model = models.randomise(models.abstract(Infinity, CONFIG), 0, "int8")
    dense, narrow = sizes()
    assert narrow / 2 < peak() <= narrow + 2 * LARGEST < 0.75 * dense
    plain = models.randomise(models.abstract(Infinity, CONFIG), 0)
    eight_bits.narrow(plain, eight_bits.kernels(plain))
    ours, theirs = (checkpoint.abstract_parameters(one) for one in (model, plain))
    assert ours == theirs
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_model_without_such_matrices_is_not_called_rounded(tmp_path):
    tiny_model.write_tiny_model(tmp_path / "model", ("tokenizer",))
    described = loading.abstract_part(checkpoint.read_config(tmp_path / "model"), "tokenizer")
    assert not eight_bits.is_narrow(described)
    assert eight_bits.kernels(described) == {}
    config = dataclasses.replace(CONFIG, depth=1, chunks=1)
    assert eight_bits.is_narrow(parts.abstract_module(Infinity, config, "fp8"))
