"""The application in this process: keys, limits, lateness, and answers as they are described."""

import json
import threading

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from sparvar_jax.serve.app import create_app
from sparvar_jax.serve.settings import Settings
from tests.serve.conftest import pixels
from tests.serve.toy import BROKEN, ToyPipe

PATH = "/v1/images/generations"
PLAN = "skip_last_scales(4)"


@pytest.fixture
def served(tiny):
    """A function that makes a client of an application with a toy behind it."""
    open_ones = []

    def make(*, gated=False, **options):
        pipe = ToyPipe(tiny, gated=gated)
        client = TestClient(
            create_app(pipe, Settings(plans=(PLAN,), **options)), raise_server_exceptions=False
        )
        client.__enter__()
        open_ones.append((client, pipe))
        return client, pipe

    yield make
    for client, pipe in open_ones:
        pipe.gate.release(100)
        client.__exit__(None, None, None)


def test_the_key_is_asked_for_where_pictures_are_drawn(served):
    client, _ = served(api_key="secret")
    for headers, status in (
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer secret"}, 200),
    ):
        answer = client.post(PATH, json={"prompt": "an owl"}, headers=headers)
        assert answer.status_code == status
        assert status == 200 or answer.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/v1/models").status_code == 401
    assert client.get("/health").json()["status"] == "ok"


def test_what_takes_too_long_is_given_up(served):
    client, pipe = served(gated=True, seconds=0.05)
    answer = client.post(PATH, json={"prompt": "an owl"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    stream = client.post(PATH, json={"prompt": "an owl", "stream": True})
    (event,) = events(stream.text)
    assert event["error"]["code"] == "timeout"
    pipe.gate.release(100)
    health = client.get("/health").json()
    while health["drawing"]:
        health = client.get("/health").json()
    assert health["waiting"] == 0
    assert pipe.scales <= 2  # it stopped between scales, and the second was never begun


def test_failures_are_errors_of_the_api(served):
    client, _ = served()
    answer = client.post(PATH, json={"prompt": BROKEN})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "plate" not in answer.json()["error"]["message"]
    (event,) = events(client.post(PATH, json={"prompt": BROKEN, "stream": True}).text)
    assert event["error"]["code"] == "server_error"
    text = client.get("/metrics").text
    assert 'sparvar_requests_total{status="500"} 2.0' in text


def test_pictures_a_filter_flags_are_refused(served):
    client, _ = served(flagged=lambda pictures: pictures[:, 0, 0, 0] > 100)
    assert client.post(PATH, json={"prompt": "an owl", "seed": 100}).status_code == 200
    answer = client.post(PATH, json={"prompt": "an owl", "seed": 100, "n": 2})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "moderation_blocked")


def test_previews_arrive_while_scales_are_drawn(served):
    """The first is sent before the second scale may begin."""
    client, pipe = served(gated=True)
    body = {"prompt": "an owl", "seed": 9, "stream": True, "partial_images": 2}
    threading.Timer(0.05, pipe.gate.release).start()
    found = []
    with client.stream("POST", PATH, json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
                pipe.gate.release()
    greys = [int(pixels(event["b64_json"])[0, 0, 0]) for event in found]
    assert greys == [7, 8, 9]


def events(text):
    """The data of server-sent events."""
    lines = text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def values_of(schema):
    """JSON that a schema allows, near its edges too, and JSON that it may not."""
    allowed = [values_of(each) for each in schema.get("anyOf", ())]
    if "enum" in schema or "const" in schema:
        allowed.append(st.sampled_from(schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "integer":
        low, high = schema.get("minimum", 0), schema.get("maximum", 2**32)
        allowed.append(st.integers(low, min(high, low + 3)) | st.integers(low - 1, high + 1))
    if schema.get("type") == "number":
        allowed.append(st.floats(-200, 200))
    if schema.get("type") == "string":
        words = st.sampled_from(["an owl", "auto", "32x32", PLAN, "", " ", "a " * 600])
        allowed.append(words | st.text(max_size=20))
    if schema.get("type") == "boolean":
        allowed.append(st.booleans())
    return st.one_of(*allowed, st.none()) if allowed else st.none()


SHORT = st.text(max_size=8)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | SHORT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SHORT, inner, max_size=3),
    max_leaves=6,
)
NAMED = st.dictionaries(SHORT, ANYTHING)
QUIET = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


def bodies(description):
    """Bodies of the request that a description shows, some of them wrong in some way."""
    schema = description["components"]["schemas"]["ImageRequest"]
    fields = {name: values_of(each) for name, each in schema["properties"].items()}
    prompt = {"prompt": st.just("an owl") | fields.pop("prompt")}
    good = st.fixed_dictionaries(prompt, optional=fields)
    odd = st.builds(lambda body, more: body | more, good, NAMED)
    names = st.sampled_from(list(fields))
    broken = st.builds(lambda body, name, value: body | {name: value}, good, names, ANYTHING)
    return st.one_of(good, good, broken, odd, ANYTHING)


def test_no_body_gets_an_answer_that_the_description_lacks(served):
    """As the OpenAPI description has it: statuses below 500, with bodies of the shape promised."""
    client, _ = served(seconds=30)
    description = client.get("/openapi.json").json()
    promised = description["paths"][PATH]["post"]["responses"]
    seen = set()

    @settings(QUIET, derandomize=True)
    @given(bodies(description))
    def check(body):
        content = json.dumps(body).encode()
        answer = client.post(PATH, content=content, headers={"Content-Type": "application/json"})
        seen.add(answer.status_code)
        assert answer.status_code < 500, body
        shape = promised[str(answer.status_code)]["content"]["application/json"]["schema"]
        if answer.headers["content-type"].startswith("text/event-stream"):
            assert all("b64_json" in event for event in events(answer.text))
            return
        whole = shape | {"components": description["components"]}
        Draft202012Validator(whole).validate(answer.json())

    check()
    assert seen == {200, 400}


@settings(QUIET, max_examples=60)
@given(content=st.binary(max_size=200), kind=st.sampled_from(["application/json", "text/plain"]))
def test_no_bytes_break_it(client_of_bytes, content, kind):
    answer = client_of_bytes.post(PATH, content=content, headers={"Content-Type": kind})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.fixture
def client_of_bytes(served):
    return served()[0]


def test_long_bodies_are_not_read(served):
    client, _ = served(most_body=100)

    def chunks():
        yield from [b"x" * 60] * 3

    for content in (b"x" * 101, chunks()):
        answer = client.post(PATH, content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    body = json.dumps({"prompt": "an owl"}).encode()
    assert client.post(PATH, content=body, headers={"Content-Type": "application/json"}).is_success
