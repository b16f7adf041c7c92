"""Tests of kernels leave the table of backends as they found it, and may choose their device."""

import pytest

from pallas_kernels import backends, support


@pytest.fixture(autouse=True)
def nothing_leaks():
    """Every test leaves the table as it found it."""
    before, path = {op: backends.names(op) for op in backends.OPS}, backends.path()
    yield
    assert {op: backends.names(op) for op in backends.OPS} == before
    assert backends.registered() == ()
    assert backends.path() == path


@pytest.fixture
def on(monkeypatch):
    """Pretend that calls run on a device."""
    return lambda device: monkeypatch.setattr(support, "device_of", lambda *operands: device)
