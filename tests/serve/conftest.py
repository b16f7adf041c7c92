"""One server process for the tests that need one, and the pipeline its pictures must equal."""

import base64
import importlib.util
import io

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from sparvar_jax.cli import console
from tests.tiny_model import write_tiny_model

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "openai", "httpx", "hypothesis", "jsonschema")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_terminal_summary(terminalreporter):
    """Say why nothing of the server was tested."""
    if MISSING:
        line = f"tests/serve left out: no {', '.join(MISSING)}; install sparvar-jax[test]"
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="session")
def process(tiny, tmp_path_factory):
    from tests.serve.process import OPTIONS, Server

    cache = tmp_path_factory.getbasetemp() / "serve-cache"
    server = Server(tiny, cache, *OPTIONS, "--queue", "10")
    yield server
    if server.alive:
        server.stop()


@pytest.fixture
def server(process):
    """The running server; one that a test has ended is started again."""
    return process if process.alive else process.start()


@pytest.fixture
def client(server):
    import openai

    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def pipe(tiny, tmp_path_factory):
    """The pipeline alone; it finds the programs of the server in the same compile cache."""
    from sparvar_jax.pipelines.pipeline import Pipeline

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    cache = tmp_path_factory.getbasetemp() / "serve-cache" / "sparvar_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    console.use_compilation_cache()
    yield Pipeline.from_checkpoint(tiny)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def pixels(encoded):
    """The picture of a base64 file."""
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        return np.asarray(picture.convert("RGB"))
