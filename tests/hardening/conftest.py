"""Small checkpoints and a runner that all tests of the folder share."""

from types import SimpleNamespace

import pytest

from sparvar_jax.models.infinity import InfinityConfig
from tests.convert import sources
from tests.hardening.runs import Runner

SMALL = InfinityConfig(
    depth=1, width=64, heads=2, text_width=128, bits=16, mlp_width=64, text_max_length=4
)


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """Files of a transformer and a tokenizer that go together."""
    folder = tmp_path_factory.mktemp("released")
    weights = sources.infinity_weights(SMALL)
    return SimpleNamespace(
        weights=weights,
        transformer=sources.flat(weights, folder),
        tokenizer=sources.container(sources.tokenizer_weights(), folder),
    )


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    made = Runner(tmp_path_factory.mktemp("runner"))
    yield made
    made.close()
