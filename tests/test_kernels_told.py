"""What a user is told of the kernels that serve: by `info` of a plan, and of what was traced."""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels import backends, support
from sparvar_jax import infinity_schedule
from sparvar_jax.models.infinity import InfinityConfig
from sparvar_jax.policies.registry import parse_plan
from sparvar_jax.study import kernels

AMPERE = support.Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108)
CONFIG = InfinityConfig(4, 128, 2, text_width=128, bits=8, dtype="bfloat16")


@pytest.mark.parametrize(
    ("path", "want"),
    [
        # Raster rows of the packed layout have no gaps; those of boxes' aligned one do.
        (None, {"dense": "portable", "cs4a decision": "portable", "cs4a": "portable",
                "csla boxes": "portable"}),
        ("cudnn", {"dense": "cudnn", "cs4a decision": "cudnn", "cs4a": "cudnn",
                   "csla boxes": "cudnn"}),
        ("xla", {"dense": "xla", "cs4a decision": "xla", "cs4a": "xla", "csla boxes": "xla"}),
    ],
)  # fmt: skip
def test_a_plan_is_told_with_the_kernels_of_its_device_and_path(monkeypatch, path, want):
    monkeypatch.setattr(support, "device_of", lambda *operands: AMPERE)
    plan = parse_plan("sparvar-fast", infinity_schedule(), 4)
    with backends.use(path):
        assert kernels.implementations(plan, CONFIG) == want
        told = kernels.told(plan, CONFIG)
    assert "csla boxes " + want["csla boxes"] in told
    assert f"on {AMPERE.kind}" in told
    assert told.endswith(f"(path {path})") is (path is not None)


def test_what_served_is_seen_where_it_is_traced():
    x, vector = jnp.ones((1, 2, 128)), jnp.ones(128)
    q = jnp.ones((1, 1, 8, 64))
    with backends.watch() as seen, backends.watch() as other:
        jax.jit(lambda x: pk.residual_norm(x, None, None, vector, vector))(x)
        jax.jit(lambda q: pk.attention(q, q, q, 8, implementation="xla"))(q)
    with backends.watch() as later:
        pass
    assert seen == other == {("residual_norm", "xla"), ("attention", "xla")}
    assert backends.told(seen) == "attention xla, residual_norm xla"
    assert not later
