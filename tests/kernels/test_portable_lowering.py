"""Every Triton kernel lowers for CUDA without a GPU, with the tiles that a GPU would get."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

import pallas_kernels as pk
from pallas_kernels import shapes, support
from pallas_kernels.portable import reasons

pytestmark = pytest.mark.skipif(bool(reasons.jax_reason()), reason=reasons.jax_reason() or "-")
# One whose tiles were measured, and one with the least shared memory.
FAMILIES = {"8.6": "A10", "9.0": "H100"}


@pytest.fixture(params=FAMILIES)
def lower(monkeypatch, request):
    """Lower a call of the portable kernels for one family; raises what the device would."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        pytest.skip("this jax lowers Triton kernels only where there is a GPU")
    major, minor = request.param.split(".")
    kind = f"NVIDIA {FAMILIES[request.param]}"
    device = support.Device("gpu", kind, (int(major), int(minor)))
    monkeypatch.setattr(support, "device_of", lambda *operands: device)
    named = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=named)

    def run(function, *operands):
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(function).trace(*operands)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "triton" in text

    return run


def operands(queries, keys, head_dim=128, dtype=jnp.bfloat16):
    q = jax.ShapeDtypeStruct((1, 2, queries, head_dim), dtype)
    k = jax.ShapeDtypeStruct((2, 2, keys, head_dim), dtype)
    return q, k, k


@pytest.mark.parametrize("gaps", [(), ((121, 128),)])
@pytest.mark.parametrize("bound", [None, 100.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_dense(lower, head_dim, bound, gaps):
    def call(q, k, v):
        return pk.attention(
            q, k, v, 4121, logit_bound=bound, gaps=gaps, return_lse=True, implementation="portable"
        )

    lower(call, *operands(121, 4224, head_dim))


@pytest.mark.parametrize("block_k", [64, 128])
def test_traced_blocks(lower, block_k):
    def call(q, k, v, indices, counts):
        blocks = pk.BlockTable(indices, counts, 6425, 128, block_k, gaps=((121, 128),))
        return pk.block_sparse_attention(q, k, v, blocks, implementation="portable")

    tables = jax.ShapeDtypeStruct((1, 2, 18, 9), jnp.int32)
    counts = jax.ShapeDtypeStruct((1, 2, 18), jnp.int32)
    lower(call, *operands(2304, 6528, dtype=jnp.float16), tables, counts)


@pytest.mark.parametrize("exact", [False, True])
def test_windows(lower, exact):
    geometry = pk.Geometry.packed(((1, 1), (3, 5), (9, 21)))

    def call(q, k, v):
        return pk.window_attention(
            q, k, v, geometry, (-1, 3, 5), 1, exact=exact, implementation="portable"
        )

    lower(call, *operands(189, shapes.round_up(geometry.kv_length, 128)))


@pytest.mark.parametrize("granularity", [1, 8])
def test_columns_sums_and_selection(lower, granularity):
    def call(q, k, v):
        _, sums = pk.attention_column_sums(q, k, v, 500, 192, implementation="portable")
        chosen = pk.select_columns(sums, 30, granularity=granularity, implementation="portable")
        return pk.column_sparse_attention(
            q, k, v, chosen, 30, kv_length=500, group=192, granularity=granularity,
            logit_bound=100.0, implementation="portable",
        )  # fmt: skip

    lower(call, *operands(400, 512))


@pytest.mark.parametrize("weights", [jnp.int8, jnp.float8_e4m3fn], ids=["int8", "e4m3"])
@pytest.mark.parametrize("tokens", [1, 36, 144])
def test_products_with_8_bit_weights(lower, tokens, weights, request):
    if weights == jnp.float8_e4m3fn and request.node.callspec.params["lower"] in ("8.0", "8.6"):
        pytest.skip("e4m3 came with compute capability 8.9")
    x = jax.ShapeDtypeStruct((2, tokens, 3584), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((1000, 3584), weights)
    scale = jax.ShapeDtypeStruct((1000,), jnp.float32)
    lower(lambda *given: pk.weight_matmul(*given, implementation="portable"), x, weight, scale)
