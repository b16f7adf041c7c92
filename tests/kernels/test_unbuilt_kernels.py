"""Kernels that a release of jax cannot build: another backend serves, with one warning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive

import pallas_kernels as pk
from pallas_kernels import backends, support
from pallas_kernels.backends import Backend, register
from pallas_kernels.hopper import backend as hopper
from pallas_kernels.hopper import ops, reasons
from pallas_kernels.probing import lowering_reason
from tests.kernels.backend_cases import caught, operands

HOPPER = support.Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0))
needs_kernels = pytest.mark.skipif(bool(reasons.jax_reason()), reason="needs jax 0.11")

unbuilt = Primitive("unbuilt")
unbuilt.def_abstract_eval(lambda x: x)
"""Traces like any operation; no platform can lower it."""


def raising(error):
    def run(call):
        raise error

    return Backend("raises", backends.nothing, run)


def test_a_kernel_that_fails_while_traced_is_replaced_with_one_warning():
    failing = raising(AttributeError("module plgpu has no attribute kernel\nand more"))
    with register("attention", failing):
        everything = []
        for queries in (40, 40, 24):
            q, k, v = operands(queries=queries)
            # A function of its own each time: jax must trace again to ask again.
            call = lambda *a: pk.attention(*a, 72)  # noqa: E731
            out, said = caught(lambda q=q, k=k, v=v, call=call: jax.jit(call)(q, k, v))
            want = jax.jit(lambda *a: pk.attention(*a, 72, implementation="xla"))(q, k, v)
            np.testing.assert_array_equal(out, want)
            everything += said
        assert len(everything) == 1
        assert "'raises' cannot be built for attention (AttributeError: module" in everything[0]
        assert "and more" not in everything[0]
        with pytest.raises(AttributeError, match="no attribute kernel"):
            pk.attention(q, k, v, 72, implementation="raises")


def test_an_error_of_the_caller_is_no_fault_of_a_kernel():
    """Where every backend raises, nobody is blamed in a warning."""
    q, k, v = operands()
    table = pk.dense_blocks(40, 72)
    broken = pk.BlockTable(table.indices, table.counts, 72, 128, 128, gaps=((60, 80),))

    def run():
        with pytest.raises(ValueError, match="a gap"):
            pk.block_sparse_attention(q, k, v, broken)

    with register("block_sparse_attention", raising(RuntimeError("not built"))):
        assert caught(run)[1] == []


def test_a_full_device_is_not_hidden():
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
    with (
        register("attention", raising(full)),
        pytest.raises(jax.errors.JaxRuntimeError, match="EXHAUSTED"),
    ):
        pk.attention(*operands(), 72)


def test_a_kernel_that_fails_its_probe_is_never_run():
    asked = []

    def probe(call):
        asked.append(call.q.shape[2])
        return "no such layout"

    def run(call):
        raise AssertionError("asked for by name")

    failing = Backend("fails", backends.nothing, run, probe=probe)
    with register("attention", failing, before="xla"):
        everything = []
        for queries in (40, 40, 24):
            q, k, v = operands(queries=queries)
            out, said = caught(lambda q=q, k=k, v=v: pk.attention(q, k, v, 72))
            np.testing.assert_array_equal(out, pk.attention(q, k, v, 72, implementation="xla"))
            everything += said
        assert asked == [40, 24]
        assert len(everything) == 1
        assert "'fails' cannot be built for attention (no such layout)" in everything[0]
        with pytest.raises(AssertionError, match="asked for by name"):
            pk.attention(*operands(), 72, implementation="fails")


def test_lowering_a_kernel_alone_tells_what_its_program_would():
    def run(call):
        return unbuilt.bind(call.q)

    def probe(call):
        return lowering_reason(run, call)

    q, k, v = operands()
    with pytest.raises(NotImplementedError, match="unbuilt"):
        jax.jit(unbuilt.bind).trace(q).lower(lowering_platforms=("cuda",))
    with register("attention", Backend("fails", backends.nothing, run, probe=probe)):
        call = lambda *a: pk.attention(*a, 72)  # noqa: E731
        out, said = caught(lambda: jax.jit(call)(q, k, v))
        want = jax.jit(lambda *a: pk.attention(*a, 72, implementation="xla"))(q, k, v)
        np.testing.assert_array_equal(out, want)
        assert ["unbuilt" in message for message in said] == [True]


@needs_kernels
@pytest.mark.parametrize("breaks", [False, True])
def test_an_untested_jax_lowers_our_kernels_before_it_takes_them(on, monkeypatch, breaks):
    on(HOPPER)
    monkeypatch.setattr(reasons, "jax_is_tested", lambda: False)
    if breaks:
        monkeypatch.setattr(ops, "row_thresholds", lambda bits, count: unbuilt.bind(bits)[:, 0])
    sums = jax.ShapeDtypeStruct((1, 2, 3, 256), jnp.float32)

    def text():
        traced = jax.jit(lambda sums: pk.select_columns(sums, 7)).trace(sums)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    ours, xla = hopper.served()["select_columns"], backends._table["select_columns"][-1]
    with monkeypatch.context() as table:  # undone before the table is looked at again
        table.setitem(backends._table, "select_columns", (ours, xla))
        program, said = caught(text)
    assert ("@mosaic_gpu" in program) is not breaks
    assert len(said) == breaks


@needs_kernels
def test_a_tested_jax_is_not_asked_twice(monkeypatch):
    monkeypatch.setattr(reasons, "jax_is_tested", lambda: True)
    assert all(backend.probe is backends.nothing for backend in hopper.served().values())
