"""The Qwen2 text encoder against transformers on random shapes, and what is refused."""

import jax
import numpy as np
import pytest
import torch

from sparvar_jax.models import qwen2
from sparvar_jax.models.qwen2 import Qwen2Config
from tests.released_hart import load_qwen2

# (width, heads, key/value heads, feed-forward width, layers, theta, epsilon)
SHAPES = [
    (48, 4, 2, 96, 2, 1e6, 1e-6),
    (64, 2, 2, 56, 1, 1e4, 1e-5),
    (96, 6, 1, 80, 3, 5e5, 1e-6),
]


def theirs(shape):
    from transformers import Qwen2Config as Config
    from transformers import Qwen2Model

    width, heads, kv_heads, mlp, depth, theta, eps = shape
    torch.manual_seed(width)
    config = Config(
        vocab_size=60,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        num_hidden_layers=depth,
        rope_parameters={"rope_theta": theta, "rope_type": "default"},
        rms_norm_eps=eps,
    )
    model = Qwen2Model(config).float().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            spread = 0.1 if value.ndim == 1 else value.shape[-1] ** -0.5
            centre = float("norm" in name)
            value.copy_(torch.randn_like(value) * spread + centre)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_features_are_those_of_transformers(shape):
    """Within 1e-5 of their size: sums of at most 100 products in at most ten layers, float32."""
    model = theirs(shape)
    config = Qwen2Config.from_hf(model.config.to_dict())
    assert (config.rope_theta, config.kv_heads) == (shape[5], shape[2])
    weights = {f"model.{name}": value.numpy() for name, value in model.state_dict().items()}
    draw = np.random.default_rng(0)
    system = draw.integers(1, 60, 5).astype(np.int32)
    ids = draw.integers(1, 60, (2, 9)).astype(np.int32)
    mask = np.arange(9) < np.array([[4], [9]])
    together = np.concatenate([np.broadcast_to(system, (2, 5)), ids], 1)
    seen = np.concatenate([np.ones((2, 5), bool), mask], 1)
    with torch.no_grad():
        expected = model(
            torch.tensor(together).long(),
            attention_mask=torch.tensor(seen).long(),
            position_ids=torch.arange(14)[None].expand(2, -1),
        ).last_hidden_state[:, 5:]
    got = jax.jit(qwen2.prefix_features)(load_qwen2(config, weights), system, ids, mask)
    expected = expected.numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "expected a config.json of model_type 'qwen2'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"rope_scaling": {"type": "yarn"}}, "rotary positions of type 'yarn'"),
        ({"num_key_value_heads": 3}, "key/value heads divide"),
    ],
)
def test_other_models_are_refused(changes, message):
    config = {
        "model_type": "qwen2",
        "vocab_size": 60,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
    }
    assert Qwen2Config.from_hf(config).kv_heads == 4
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        Qwen2Config.from_hf(config)
