"""Which backend serves a call, on which device; what a user is told; kernels added from outside."""

import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import backends, fused, support
from pallas_kernels.backends import Backend, register
from pallas_kernels.hopper import reasons
from tests.kernels import toy_backend
from tests.kernels.backend_cases import operands
from tests.kernels.fused_cases import norm_calls, norm_inputs

CPU = support.Device("cpu")
AMPERE = support.Device("gpu", "NVIDIA A100", (8, 0), 108)
HOPPER = support.Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0))
NEWER = support.Device("gpu", "NVIDIA B200", (10, 0), 148)
ATTENTION = (
    "attention",
    "block_sparse_attention",
    "window_attention",
    "attention_column_sums",
    "column_sparse_attention",
)


# --- a second set of kernels ---


def test_kernels_for_another_gpu_are_one_file(on):
    q, k, v = operands()
    blocks = pk.csla_blocks(pk.Geometry.packed(((2, 4), (5, 8))), (-1, 1), 1)
    calls = {
        "attention": lambda *a, **n: pk.attention(*a, 70, return_lse=True, gaps=((3, 9),), **n),
        "block_sparse_attention": lambda *a, **n: pk.block_sparse_attention(*a, blocks, **n),
    }
    with toy_backend.install():
        on(NEWER)
        assert backends.names("attention") == ("hopper", "toy", "cudnn", "portable", "xla")
        for op, call in calls.items():
            toy_backend.served.clear()
            assert pk.implementation_used(op, q, k, v) == "toy"
            out = jax.jit(call)(q, k, v)
            assert toy_backend.served == [op]
            want = jax.jit(lambda *a, call=call: call(*a, implementation="xla"))(q, k, v)
            jax.tree.map(np.testing.assert_array_equal, out, want)
        assert pk.implementation_used("window_attention", q, k, v) == "xla"
        on(CPU)
        assert pk.implementation_used("attention", q, k, v) == "xla"


def test_why_an_added_backend_refuses_reaches_the_user(on):
    wide = operands(head_dim=64)
    with toy_backend.install():
        on(NEWER)
        assert pk.implementation_used("attention", *wide) == "xla"
        np.testing.assert_array_equal(
            pk.attention(*wide, 72), pk.attention(*wide, 72, implementation="xla")
        )
        with pytest.raises(NotImplementedError, match="head dim of 32; got 64"):
            pk.attention(*wide, 72, implementation="toy")
        with pytest.raises(NotImplementedError, match=r"'toy' has no select_columns"):
            pk.select_columns(jnp.ones((1, 1, 1, 8)), 4, implementation="toy")
        on(CPU)
        with pytest.raises(NotImplementedError, match=r"capability 10.0; the device is cpu"):
            pk.attention(*operands(), 72, implementation="toy")


def test_what_was_added_is_gone_afterwards():
    with pytest.raises(RuntimeError, match="stop"), toy_backend.install():
        raise RuntimeError("stop")
    with pytest.raises(ValueError, match=r"'hopper', 'cudnn', 'portable', 'xla'\. Got 'toy'"):
        pk.attention(*operands(), 72, implementation="toy")


def test_registering_says_what_is_wrong():
    toy = Backend("toy", backends.nothing, lambda call: None)
    with pytest.raises(ValueError, match="op must be one of attention"):
        register("atention", toy)
    with pytest.raises(ValueError, match="before must be one of"):
        register("attention", toy, before="cuda")
    with pytest.raises(ValueError, match="already"):
        register("attention", Backend("xla", backends.nothing, lambda call: None))
    with pytest.raises(ValueError, match="was not registered"):
        backends.unregister("attention", "xla")


# --- names and requests ---


@pytest.mark.parametrize("device", [CPU, AMPERE, HOPPER, NEWER], ids=lambda d: d.kind or "cpu")
@pytest.mark.parametrize("op", ATTENTION)
def test_what_is_used_can_be_asked_for(on, op, device):
    on(device)
    halves = [jax.ShapeDtypeStruct((2, 2, 128, 64), jnp.bfloat16)] * 3
    used = pk.implementation_used(op, *halves)
    assert used in backends.names(op)
    assert pk.implementation_used(op, *halves, implementation=used) == used
    kernels = device == HOPPER and not reasons.jax_reason()
    other = ("cudnn" if op == "attention" else "portable") if device.is_cuda else "xla"
    assert used == ("hopper" if kernels else other)


@pytest.mark.parametrize("name", ["mosaic", "Hopper", ""])
def test_an_unknown_name_lists_the_known_ones(name):
    q, k, v = operands()
    text = jnp.zeros((1, 2, 4, 32))
    for call in (
        lambda: pk.attention(q, k, v, 72, implementation=name),
        lambda: pk.implementation_used("window_attention", q, k, v, implementation=name),
        lambda: pk.select_columns(jnp.ones((1, 1, 1, 8)), 4, implementation=name),
        lambda: norm_calls(norm_inputs(), implementation=name),
        lambda: fused.text_memory(jnp.ones((1, 4), bool), text, text, implementation=name),
    ):
        with pytest.raises(
            ValueError, match=rf"'hopper', 'cudnn', 'portable', 'xla'\. Got {name!r}"
        ):
            call()


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="op must be"):
        pk.implementation_used("atention", *operands())


@pytest.mark.parametrize("device", [AMPERE, NEWER], ids=lambda d: d.kind)
def test_a_device_that_nobody_tried_gets_the_portable_kernels(on, device):
    on(device)
    halves = [jax.ShapeDtypeStruct((2, 2, 128, 128), jnp.bfloat16)] * 3
    used = {op: pk.implementation_used(op, *halves) for op in ATTENTION}
    assert used == {op: "portable" for op in ATTENTION} | {"attention": "cudnn"}
    assert pk.implementation_used("attention", *halves, return_lse=True) == "portable"
    assert pk.implementation_used("attention", *halves, gaps=((1, 2),)) == "portable"


def test_a_path_leaves_better_kernels_out(on):
    """What an H100 serves on a path is what a device without the better ones would get."""
    on(HOPPER)
    halves = [jax.ShapeDtypeStruct((2, 2, 128, 128), jnp.bfloat16)] * 3
    served = {
        "portable": {op: "portable" for op in ATTENTION},
        "cudnn": {op: "cudnn" for op in ATTENTION},
        "xla": {op: "xla" for op in ATTENTION},
    }
    before = {op: pk.implementation_used(op, *halves) for op in ATTENTION}
    for path, want in served.items():
        with backends.use(path):
            assert backends.path() == path
            assert {op: pk.implementation_used(op, *halves) for op in ATTENTION} == want
            # A call that names a backend still gets it.
            named = pk.implementation_used("attention", *halves, implementation="cudnn")
            assert named == "cudnn"
    assert {op: pk.implementation_used(op, *halves) for op in ATTENTION} == before
    with pytest.raises(ValueError, match=r"hopper, portable, cudnn, xla; .* Got 'triton'"):
        backends.use("triton")


@pytest.mark.parametrize(("value", "want"), [("", "None"), ("portable", "portable"), ("no", "")])
def test_the_environment_names_a_path(value, want):
    code = "from pallas_kernels import backends; print(backends.path())"
    env = {"PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu", "SPARVAR_KERNELS": value}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == want
    assert (done.returncode == 0) is bool(want)
    assert want or "SPARVAR_KERNELS may also be empty. Got 'no'" in done.stderr


def test_cudnn_can_be_asked_for(on, monkeypatch):
    """jax finds no cuDNN here, so its own other implementation takes the call it is given."""
    asked, inner = [], jax.nn.dot_product_attention

    def without_cudnn(*args, implementation, **kwargs):
        asked.append(implementation)
        return inner(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
    on(HOPPER)
    q, k, v = operands(dtype=jnp.float16)
    out = pk.attention(q, k, v, 70, scale=0.2, implementation="cudnn")
    assert asked == ["cudnn"]
    want = pk.attention(q, k, v, 70, scale=0.2, implementation="xla")
    # Weights and outputs of either are rounded to float16: 2^-11 of values up to about 3.
    np.testing.assert_allclose(out, want, atol=3 * 2**-10)


def test_cudnn_says_what_it_cannot_do(on):
    q, k, v = operands(dtype=jnp.float16)
    on(AMPERE)
    assert pk.implementation_used("attention", q, k, v) == "cudnn"
    assert pk.implementation_used("attention", q, k, v, gaps=((1, 2),)) == "xla"
    assert pk.implementation_used("attention", q, k, v, return_lse=True) == "xla"
    blocks = pk.dense_blocks(40, 72)
    with pytest.raises(NotImplementedError, match="log-sum-exp"):
        pk.block_sparse_attention(q, k, v, blocks, return_lse=True, implementation="cudnn")
    with pytest.raises(NotImplementedError, match="16-bit"):
        pk.attention(*operands(), 72, implementation="cudnn")
    on(CPU)
    with pytest.raises(NotImplementedError, match="device is cpu"):
        pk.attention(q, k, v, 72, implementation="cudnn")


def test_float32_results_of_the_norm_are_the_kernels_only_when_asked_for(on):
    if reasons.jax_reason():
        pytest.skip(reasons.jax_reason())
    on(HOPPER)
    x, vector = jnp.zeros((1, 2, 128)), jnp.zeros(128)

    def calls(dtype, implementation=None):
        call = lambda x: pk.residual_norm(  # noqa: E731
            x, None, None, vector, vector, dtype=dtype, implementation=implementation
        )
        traced = jax.jit(call).trace(x)
        return traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu")

    assert calls(jnp.bfloat16) == 1
    assert calls(jnp.float32) == 0
    assert calls(jnp.float32, "hopper") == 1


# --- devices ---


def test_the_default_device_serves_what_is_nowhere_yet(monkeypatch):
    here = jax.devices("cpu")[0]
    gpu = types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0", core_count=108
    )
    monkeypatch.setattr(support, "_default_device", lambda: gpu)
    with jax.default_device(here):
        placed = operands(dtype=jnp.bfloat16)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in placed]
    assert support.device_of(shapes) == AMPERE
    assert pk.implementation_used("attention", *shapes) == "cudnn"
    assert pk.implementation_used("attention", *jax.device_put(placed, here)) == "xla"


def test_the_device_is_that_of_the_operands():
    """In a process with four devices, told apart by number: CPUs are all of one kind."""
    script = """
        import jax, numpy as np
        from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P
        from pallas_kernels import support
        support.Device.of = staticmethod(lambda device: device.id)
        devices = jax.devices()
        free = jax.numpy.ones(4)
        there = jax.device_put(free, devices[2])
        spread = NamedSharding(Mesh(np.array(devices[1:3]), ("x",)), P("x"))
        shape = jax.ShapeDtypeStruct((4,), "float32", sharding=spread)
        assert support.device_of(free, None, 3.0) == 0
        assert support.device_of(free, {"table": (there, 1)}) == 2
        assert support.device_of(free, shape) == 1
        assert support.device_of(jax.device_put(free, spread)) == 1
        seen = []
        look = lambda x: seen.append(support.device_of(x)) or x
        with jax.default_device(devices[3]):
            assert support.device_of(free) == 3
            assert support.device_of(there) == 2
            jax.jit(look)(free)
        jax.config.update("jax_default_device", "cpu")
        assert support.device_of(free) == 0
        jax.config.update("jax_default_device", devices[3])
        # Traced, a mesh tells the kind of its devices: here that of the first, not of the default.
        support._of_kind = lambda platform, kind: (platform, kind)
        jax.jit(look)(jax.device_put(free, spread))
        mapped = jax.shard_map(look, mesh=spread.mesh, in_specs=P("x"), out_specs=P("x"))
        jax.jit(mapped)(free)
        kind = ("cpu", devices[0].device_kind)
        assert seen == [3, kind, kind], seen
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    code = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(
        code, env={"PYTHONPATH": ":".join(sys.path), **flags}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_mesh_of_another_machine_has_a_kind():
    """Programs are lowered for devices that this machine has not got."""
    kind = "NVIDIA H100 80GB HBM3"
    assert support._of_kind("tpu", kind) == support.Device("tpu", kind)
