"""Two replicas on a local Ray cluster, one of them killed under load."""

import concurrent.futures
import time

import numpy as np
import pytest

from tests.serve.conftest import pixels
from tests.serve.process import PLAN, free_port

# Ray declares fields in pydantic's older way, and forks below the threads of jax: its own affairs.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
]
REQUESTS, CLIENTS = 80, 4


@pytest.fixture(scope="module")
def ray_cluster():
    ray = pytest.importorskip("ray", reason="replicas need sparvar-jax[ray]")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray
    from ray import serve

    serve.shutdown()
    ray.shutdown()


def replicas(ray):
    """Actors of the deployment, by name."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [actor for actor in named if actor["name"].startswith("SERVE_REPLICA::")]


def test_no_request_is_lost_with_a_replica(ray_cluster, tiny, pipe):
    import openai
    from ray import serve

    from sparvar_jax.serve.deployment import build

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = {"model": str(tiny), "replicas": "2", "plans": PLAN, "prompt_tokens": "32"}
    serve.run(build(arguments))
    assert len(replicas(ray_cluster)) == 2
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=8)

    def ask(seed):
        answer = client.images.generate(prompt="a red apple", extra_body={"seed": seed})
        return answer.data[0].b64_json

    first = ask(3)
    np.testing.assert_array_equal(pixels(first), pipe("a red apple", plan=PLAN, seed=3)[0])
    previews = client.images.generate(prompt="an owl", stream=True, partial_images=2)
    assert len(list(previews)) == 3
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pool.submit(ask, seed) for seed in range(REQUESTS)]
        while sum(answer.done() for answer in answers) < REQUESTS // 4:
            time.sleep(0.01)
        victim = replicas(ray_cluster)[0]
        actor = ray_cluster.get_actor(victim["name"], namespace=victim["namespace"])
        ray_cluster.kill(actor)
        files = [answer.result(timeout=300) for answer in answers]
    assert len(set(files)) == REQUESTS
    assert files[3] == first
    client.close()
