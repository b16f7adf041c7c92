"""The demo's training tools on small arrays: packing, the optimizer, saving, time."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("optax")

from examples.train_demo import optim, programs, store, train_transformer
from examples.train_demo.models import TOY, DemoConfig, initial, networks
from sparvar_jax.models.infinity import Infinity
from sparvar_jax.models.t5 import T5Encoder, encode


def tree(rng):
    blocks = {
        i: {"kernel": rng.normal(size=(4, 8)).astype(np.float32), "bias": np.ones(8, np.float32)}
        for i in range(3)
    }
    return {"blocks": blocks, "embed": rng.normal(size=(5, 3)).astype(np.float32)}


def test_packing_puts_equal_shapes_together_and_back():
    values = tree(np.random.default_rng(0))
    packing = optim.Packing(values, muon=True)
    packed = packing.pack(values)
    assert {name: array.shape for name, array in packed.items()} == {
        "muon.4x8": (3, 4, 8),
        "adam.8": (3, 8),
        "embedding.5x3": (1, 5, 3),
    }
    back = packing.unpack(packed)
    np.testing.assert_array_equal(back["blocks"][2]["kernel"], values["blocks"][2]["kernel"])
    np.testing.assert_array_equal(back["embed"], values["embed"])


def test_only_the_transformer_learns_by_muon():
    """T5 does not scale its attention scores; Muon's updates made them saturate."""
    rng = np.random.default_rng(0)
    values = {"text": tree(rng), "transformer": tree(rng)}
    packed = optim.Packing(values, muon=True).pack(values)
    assert packed["muon.4x8"].shape == packed["adam.4x8"].shape == (3, 4, 8)


def test_a_fresh_text_encoder_reads_word_order():
    """Without trained weights: exchanged words change what every other word becomes."""
    config = replace(TOY.text, dtype="float32")
    network = networks(replace(TOY, text=config))["text"]
    params = initial(T5Encoder, config, 2)
    ids, lengths = jnp.array([[7, 5, 9, 1], [9, 5, 7, 1]]), jnp.array([4, 4])
    features = encode(network.assemble(params), ids, lengths)
    apart = jnp.linalg.norm(features[0, 1] - features[1, 1]) / jnp.linalg.norm(features[0, 1])
    assert apart > 0.1


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrices = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    for matrix in np.asarray(optim.orthogonalise(matrices)):
        values = np.linalg.svd(matrix, compute_uv=False)
        # The quintic iteration settles between 0.68 and 1.13 (Jordan et al. 2024); bfloat16.
        assert values.min() > 0.6
        assert values.max() < 1.25


def test_an_update_goes_against_the_gradient():
    values = tree(np.random.default_rng(2))
    packing, optimizer = optim.Packing(values, muon=True), optim.make_optimizer()
    state = optim.start(packing.pack(values), optimizer)
    grads = {name: array for name, array in state.params.items()}
    after = optim.apply(state, grads, jnp.float32(1e-2), optimizer)
    for name, array in after.params.items():
        assert jnp.sum(jnp.square(array)) < jnp.sum(jnp.square(state.params[name]))


def test_saved_weights_come_back_and_broken_ones_do_not_replace_them(tmp_path):
    values = tree(np.random.default_rng(3))
    assert store.save(tmp_path, "part", values)
    broken = {**values, "embed": np.full((5, 3), np.nan, np.float32)}
    assert not store.save(tmp_path, "part", broken)
    back = store.load(tmp_path, "part", values)
    # float16 keeps 11 bits.
    np.testing.assert_allclose(back["embed"], values["embed"], rtol=2**-11)
    with pytest.raises(ValueError, match="does not fit"):
        store.load(tmp_path, "part", {**values, "more": np.zeros(2, np.float32)})


def test_the_rate_warms_up_stays_and_falls():
    rate = lambda fraction, step: optim.learning_rate(1.0, fraction, step, constant=0.5)  # noqa: E731
    assert rate(0.0, 0) == pytest.approx(0.01)
    assert rate(0.3, 500) == rate(0.5, 900) == pytest.approx(1.0)
    assert rate(0.75, 1500) == pytest.approx(0.51)
    assert rate(1.0, 2000) == pytest.approx(0.02)


def test_every_prefix_length_gets_its_share_of_the_course():
    drawn = [train_transformer.course(0.9, count) for count in range(8)]
    assert {7, 10, 13} == set(drawn)
    assert train_transformer.course(0.0, 3) == 7


def test_gradients_reach_every_parameter_and_do_not_depend_on_rematerialisation():
    config = DemoConfig(
        TOY.tokenizer,
        replace(TOY.text, depth=1, vocab=16),
        replace(TOY.transformer, depth=2, chunks=1),
    )
    nets = networks(config)
    params = {
        "transformer": initial(Infinity, config.transformer, 1),
        "text": initial(T5Encoder, config.text, 2),
    }
    batch = {
        "latents": jax.random.normal(jax.random.key(0), (8, 64, 64, 16), jnp.bfloat16),
        "ids": jnp.tile(jnp.arange(32) % 16, (8, 1)),
        "lengths": jnp.full((8,), 32),
    }

    def grads(remat):
        loss = lambda p: jnp.sum(  # noqa: E731
            programs.losses_of_batch(nets, p, batch, jax.random.key(3), 3, remat)
        )
        return jax.jit(jax.grad(loss))(params)

    kept, again = grads(False), grads(True)
    for path, leaf in jax.tree_util.tree_leaves_with_path(kept):
        assert jnp.any(leaf != 0), jax.tree_util.keystr(path)
    # The same float32 operations, fused differently.
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.max(jnp.abs(a))) + 1e-8)
