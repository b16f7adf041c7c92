"""Many requests from many clients: none is lost, all are right, and memory stays where it was."""

import concurrent.futures

import numpy as np
import pytest

from tests.serve.conftest import pixels
from tests.serve.test_server import ask

pytestmark = pytest.mark.slow
REQUESTS, CLIENTS = 200, 8
GROWTH_MIB = (
    40  # ten times what 200 answers of 4 kB could leave behind, rounded up by the allocator
)


def test_nothing_is_lost_and_memory_is_flat(client, server):
    def round_of(requests):
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(lambda seed: ask(client, seed), range(requests)))

    round_of(REQUESTS)  # what is allocated once is allocated
    before = server.memory()
    files = round_of(REQUESTS)
    grown = server.memory() - before
    assert all(isinstance(file, str) for file in files)
    assert len(set(files)) == REQUESTS
    assert grown < GROWTH_MIB, f"{grown:.0f} MiB more after {REQUESTS} requests"
    for seed in (0, REQUESTS - 1):
        np.testing.assert_array_equal(pixels(files[seed]), pixels(ask(client, seed)))
    assert server.metric('sparvar_requests_total{status="200"}') >= 2 * REQUESTS
