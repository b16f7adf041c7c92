"""The T5 encoder against transformers' PyTorch encoder with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sparvar_convert.rules import Ignore, translate
from sparvar_convert.tables.t5 import TABLE, table_for

from sparvar_jax.models import eight_bits
from sparvar_jax.models.t5 import T5Config, T5Encoder, encode, relative_buckets

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 97,
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 80,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "feed_forward_proj": "gated-gelu",
}
CONFIGS = {
    "small": SMALL,
    "inner width differs": SMALL | {"d_kv": 16, "num_heads": 5, "num_layers": 3},
    "many buckets": SMALL
    | {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    "one head, other eps": SMALL | {"num_heads": 1, "layer_norm_epsilon": 1e-3},
    "original T5": SMALL | {"feed_forward_proj": "relu"},
}
# Float32 sums of up to a few hundred terms in another order: 1e-5 of the largest value is about
# 80 units in the last place.
TOLERANCE = 1e-5


def reference_encoder(fields):
    torch.manual_seed(0)
    config = transformers.T5Config(**fields, dropout_rate=0.0)
    model = transformers.T5EncoderModel(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "layer_norm" in name:
                value.copy_(1 + 0.2 * torch.randn_like(value))
            if "relative_attention_bias" in name:
                value.copy_(torch.randn_like(value))
    return model


def ours_from(model, fields, dtype="float32"):
    encoder = T5Encoder(T5Config.from_hf(fields, dtype=dtype), rngs=nnx.Rngs(0))
    graph, state = nnx.split(encoder)
    flat = dict(nnx.to_flat_state(state))
    paths = {".".join(map(str, path)): path for path in flat}
    for key, value in model.state_dict().items():
        (entry,) = TABLE.matches(key)
        if isinstance(entry, Ignore):
            continue
        target = translate(key, entry.source, entry.target)
        array = entry.transform.forward(value.numpy())
        variable = flat[paths.pop(target)]
        assert variable.shape == array.shape, key
        flat[tuple(int(p) if p.isdigit() else p for p in target.split("."))] = variable.replace(
            jnp.asarray(array, variable.dtype)
        )
    assert not paths, f"no key fills {paths}"
    return nnx.merge(graph, nnx.from_flat_state(flat))


def random_batch(length, lengths, vocab=97):
    ids = np.random.default_rng(length).integers(2, vocab, (len(lengths), length)).astype(np.int32)
    return ids, np.array(lengths, np.int32)


def reference_features(model, ids, lengths):
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids).long(), attention_mask=mask.long())
    return (out.last_hidden_state * mask[..., None]).numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_features_equal_those_of_transformers(name):
    model = reference_encoder(CONFIGS[name])
    ours = ours_from(model, CONFIGS[name])
    ids, lengths = random_batch(37, [37, 11, 1])
    expected = reference_features(model, ids, lengths)
    got = np.asarray(jax.jit(encode)(ours, ids, lengths))
    assert got.dtype == np.float32
    assert np.abs(got - expected).max() / np.abs(expected).max() <= TOLERANCE


def rounded_by_hand(model):
    """Every matrix of the blocks in int8 with one scale an output, as transformers would hold it
    in float64."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 2 and ".layer." in name and "relative" not in name:
                scale = value.abs().amax(dim=1, keepdim=True) / 127
                value.copy_(torch.round(value / scale) * scale)
    return model.double()


@pytest.mark.parametrize("name", ["small", "original T5"])
def test_eight_bit_weights_give_what_transformers_gives_with_weights_rounded_alike(name):
    """What is multiplied by them stays float32, so that the bound is that of dense matrices."""
    model = reference_encoder(CONFIGS[name])
    ids, lengths = random_batch(37, [37, 11, 1])
    dense = reference_features(model, ids, lengths)
    ours = {dtype: ours_from(model, CONFIGS[name], dtype) for dtype in ("float32", "bfloat16")}
    expected = reference_features(rounded_by_hand(model), ids, lengths)
    for encoder in ours.values():
        paths = eight_bits.kernels(encoder)
        maps = 7 if encoder.config.activation == "gated-gelu" else 6
        assert set(paths.values()) == {"int8 weights"}
        assert len(paths) == maps * encoder.config.depth
        eight_bits.narrow(encoder, paths)
        assert {leaf.dtype for leaf in jax.tree.leaves(encoder.blocks)} == {
            jnp.dtype("int8"), jnp.dtype("float32"),
        }  # fmt: skip
        assert eight_bits.form_of(encoder) == "int8"
    got = np.asarray(jax.jit(encode)(ours["float32"], ids, lengths))
    largest = np.abs(expected).max()
    assert np.abs(got - expected).max() / largest <= TOLERANCE
    assert np.abs(dense - expected).max() / largest > 100 * TOLERANCE
    rough = np.asarray(jax.jit(encode)(ours["bfloat16"], ids, lengths))
    # Rounded twice, from bfloat16, weights are off by as much again as in the test of bfloat16.
    assert np.abs(rough - expected).mean() / np.abs(expected).mean() <= 20 * 2**-9


def test_padding_has_no_influence():
    ours = ours_from(reference_encoder(SMALL), SMALL)
    ids, lengths = random_batch(24, [24, 9, 2])
    outside = np.arange(24)[None] >= lengths[:, None]
    ids, lengths = jnp.asarray(ids), jnp.asarray(lengths)
    base = np.asarray(encode(ours, ids, lengths))
    assert not base[outside].any()
    for filler in (0, 96, 10_000, -1):
        filled = jnp.where(outside, filler, ids)
        other = np.asarray(encode(ours, filled, lengths))
        np.testing.assert_array_equal(other, base)
    # A row of weights that is not finite and only padding would touch stays without effect.
    ours.embed[...] = ours.embed[...].at[1].set(jnp.nan)
    poisoned = np.asarray(encode(ours, jnp.where(outside, 1, ids), lengths))
    np.testing.assert_array_equal(poisoned, base)
    alone = np.asarray(encode(ours, ids[1:2, :9], lengths[1:2]))
    assert np.abs(alone[0] - base[1, :9]).max() <= TOLERANCE * np.abs(base).max()


def test_bfloat16_stays_near_float32():
    model = reference_encoder(SMALL)
    ids, lengths = random_batch(40, [40, 17])
    ids, lengths = jnp.asarray(ids), jnp.asarray(lengths)
    exact = np.asarray(encode(ours_from(model, SMALL), ids, lengths))
    ours = ours_from(model, SMALL, dtype="bfloat16")
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(ours))}
    rough = np.asarray(jax.jit(encode)(ours, ids, lengths))
    assert kinds == {"bfloat16", "float32"}
    assert rough.dtype == np.float32
    # About ten roundings of 2^-9 each lie between input and output.
    assert np.abs(rough - exact).mean() / np.abs(exact).mean() <= 10 * 2**-9


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (16, 64), (4, 3), (64, 500)])
def test_relative_buckets_equal_those_of_transformers(buckets, distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = torch.arange(512)[None, :] - torch.arange(512)[:, None]
    expected = T5Attention._relative_position_bucket(
        offset, bidirectional=True, num_buckets=buckets, max_distance=distance
    )
    np.testing.assert_array_equal(relative_buckets(512, buckets, distance), expected.numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "gated-silu"}, "gated-silu"),
        ({"model_type": "bert"}, "model_type 't5'"),
        ({"num_heads": 0}, "positive"),
        ({"relative_attention_num_buckets": 7}, "even number"),
    ],
)
@pytest.mark.unchecked
def test_unsupported_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        T5Config.from_hf(SMALL | change)


def test_a_config_with_missing_fields_is_refused():
    with pytest.raises(ValueError, match="lacks d_model, num_heads"):
        T5Config.from_hf({k: v for k, v in SMALL.items() if k not in ("d_model", "num_heads")})


def test_every_key_of_a_full_model_matches_one_entry():
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**SMALL))
    keys = list(model.state_dict())
    assert any(key.startswith("decoder.") for key in keys)
    assert all(len(TABLE.matches(key)) == 1 for key in keys)
    alone = [key for key in keys if key != "shared.weight"]
    tied = table_for(alone)
    assert all(len(tied.matches(key)) == 1 for key in alone)
    assert tied.matches("encoder.embed_tokens.weight")[0].target == "embed"
    assert not TABLE.matches("encoder.block.0.layer.2.layer_norm.weight")
