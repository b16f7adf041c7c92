"""The real OpenAI client against a real server process: what it answers, and how it ends."""

import base64
import concurrent.futures
import json
import signal
import socket
import struct
import time

import httpx
import numpy as np
import openai
import pytest

from sparvar_jax.pipelines import metadata
from tests.serve.conftest import pixels
from tests.serve.process import PLAN

PROMPT = "a red apple"
OURS = {"seed": 5, "negative_prompt": "an owl", "guidance_scale": 3.5, "plan": PLAN}


def test_pictures_are_those_of_the_pipeline(client, pipe):
    """Bit for bit, with the seed that the answer names; as many pictures make a batch of two."""
    answer = client.images.generate(prompt=PROMPT, model="gpt-image-1", extra_body={"seed": 3})
    np.testing.assert_array_equal(
        pixels(answer.data[0].b64_json), pipe(PROMPT, plan=PLAN, seed=3)[0]
    )
    assert answer.size == "32x32"
    assert answer.output_format == "png"
    drawn = sum(step.scale.tokens for step in pipe.request(PROMPT, plan=PLAN).plan.steps)
    assert answer.usage.output_tokens == drawn
    assert answer.usage.input_tokens == pipe.text_lengths([PROMPT])[0][0]
    answer = client.images.generate(prompt=PROMPT, n=2, size="32x32", extra_body=OURS)
    expected = pipe([PROMPT] * 2, plan=PLAN, seed=5, negative="an owl", guidance=3.5)
    for index, (found, picture) in enumerate(zip(answer.data, expected, strict=True)):
        np.testing.assert_array_equal(pixels(found.b64_json), picture)
        assert found.seed == 5 + index
    again = client.images.generate(prompt=PROMPT, n=2, extra_body={"seed": answer.data[0].seed})
    assert len({found.b64_json for found in (*answer.data, *again.data)}) == 4


def test_a_stream_shows_previews_and_then_the_picture(client, pipe):
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 7}
    )
    *previews, last = stream
    expected = list(pipe.stream([PROMPT], plan=PLAN, seed=7))
    assert [event.type for event in previews] == ["image_generation.partial_image"] * 2
    assert [event.partial_image_index for event in previews] == [0, 1]
    # Three scales are drawn: a preview after each of the first two.
    for event, picture in zip((*previews, last), expected, strict=True):
        np.testing.assert_array_equal(pixels(event.b64_json), picture[0])
    assert last.type == "image_generation.completed"
    assert last.usage.total_tokens == last.usage.input_tokens + last.usage.output_tokens
    (only,) = client.images.generate(prompt=PROMPT, stream=True, extra_body={"seed": 7})
    assert only.b64_json == last.b64_json


def test_files_come_in_the_form_asked_for(client, tmp_path):
    png = client.images.generate(prompt=PROMPT, extra_body={"seed": 3}).data[0].b64_json
    (tmp_path / "apple.png").write_bytes(base64.b64decode(png))
    told = metadata.read_metadata(tmp_path / "apple.png")
    assert (told["prompt"], told["seed"], told["plan"]) == (PROMPT, "3", PLAN)
    jpeg = client.images.generate(
        prompt=PROMPT, output_format="jpeg", output_compression=95, extra_body={"seed": 3}
    )
    off = pixels(jpeg.data[0].b64_json).astype(int) - pixels(png)
    assert 0 < np.abs(off).mean() < 20
    url = client.images.generate(
        prompt=PROMPT, response_format="url", output_format="webp", extra_body={"seed": 3}
    )
    assert url.data[0].url.startswith("data:image/webp;base64,UklGR")
    assert url.data[0].b64_json is None
    listed = client.models.list().data
    assert [(model.plans, model.sizes) for model in listed] == [([PLAN], ["32x32"])]
    assert client.models.retrieve("dall-e-3").id == "model"


WRONG = [
    ({"n": 0}, "n", "n"),
    ({"n": 11}, "n", "n"),
    ({"size": "1024x1024"}, "size", "32x32"),
    ({"size": 4}, "size", "string"),
    ({"plan": "dense"}, "plan", PLAN),
    ({"seed": -1}, "seed", "0"),
    ({"seed": 2**32 - 1, "n": 2}, "seed", "4294967294"),
    ({"guidance_scale": 1}, "guidance_scale", "other than 1"),
    ({"guidance_scale": "much"}, "guidance_scale", "number"),
    ({"background": "transparent"}, "background", "transparency"),
    ({"output_compression": 50}, "output_compression", "PNG"),
    ({"output_format": "gif"}, "output_format", "png"),
    ({"stream": True, "n": 2}, "n", "one at a time"),
    ({"partial_images": 4, "stream": True}, "partial_images", "3"),
    ({"prompt": "   "}, "prompt", "at least one word"),
    ({"prompt": "apple " * 40}, "prompt", "at most 32"),
    ({"prompt": "x" * 32_001}, "prompt", "32000"),
    ({"negative_prompt": "owl " * 40}, "negative_prompt", "at most 32"),
    ({"colour": "red"}, "colour", "Unknown parameter: 'colour'."),
]


def test_wrong_fields_are_refused_in_the_form_of_the_api(client, server):
    for fields, param, said in WRONG:
        with pytest.raises(openai.BadRequestError) as refusal:
            client.images.generate(**{"prompt": PROMPT, "extra_body": fields})
        assert refusal.value.param == param, fields
        assert said in refusal.value.message, fields
        assert refusal.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="prompt"):
        client.images.generate(prompt=openai.omit)
    url = f"{server.address}/v1/images/generations"
    for body, status in ((b"{", 400), (b"[" * 10_000, 400), (b" " * (300 << 10), 413), (b"3", 400)):
        answer = httpx.post(url, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{server.address}/v1/nothing").json()["error"]["code"] == "not_found"
    assert httpx.get(url).json()["error"]["code"] == "method_not_allowed"


def ask(client, seed, **options):
    """The picture of a seed, or the error."""
    try:
        answer = client.images.generate(prompt=PROMPT, extra_body={"seed": seed}, **options)
        return answer.data[0].b64_json
    except openai.OpenAIError as error:
        return error


def test_a_full_queue_says_so_and_loses_nobody_it_took(client, server):
    """Ten may wait and a batch of two is drawn: of sixty that come at once, some must be told."""
    with concurrent.futures.ThreadPoolExecutor(60) as pool:
        found = list(pool.map(lambda seed: ask(client, seed), range(60)))
    refused = [error for error in found if not isinstance(error, str)]
    assert refused
    assert len(refused) < 60
    for error in refused:
        assert isinstance(error, openai.RateLimitError)
        assert error.code == "rate_limit_exceeded"
        assert error.response.headers["retry-after"] == "1"
    assert server.metric("sparvar_waiting") == 0
    # Neighbours of a batch leave a picture alone.
    drawn = {seed: file for seed, file in enumerate(found) if isinstance(file, str)}
    seed = max(drawn)
    assert np.array_equal(pixels(drawn[seed]), pixels(ask(client, seed)))


def test_a_client_that_goes_away_frees_its_place(client, server):
    gone = 'sparvar_requests_total{status="client gone"}'
    for stream in (False, True):
        before, drawn = (
            server.metric(gone),
            server.metric(f'sparvar_pictures_total{{plan="{PLAN}"}}'),
        )
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            others = [pool.submit(ask, client, seed, n=2) for seed in range(3)]
            time.sleep(0.02)
            for _ in range(2):
                leave(server.port, {"prompt": PROMPT, "n": 1 if stream else 2, "stream": stream})
            assert all(isinstance(other.result(), str) for other in others)
        until(lambda before=before: server.metric(gone) == before + 2)
        until(lambda: server.metric("sparvar_drawing") == server.metric("sparvar_waiting") == 0)
        assert server.metric(f'sparvar_pictures_total{{plan="{PLAN}"}}') <= drawn + 6 + 4
    assert isinstance(ask(client, 0), str)


def leave(port, body):
    """Ask, and hang up at once."""
    content = json.dumps(body).encode()
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)


def until(condition):
    """Wait for a condition that must come."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_server_starts_again_at_its_port(client, process):
    before = ask(client, 11)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        lost = [pool.submit(ask, client, seed) for seed in range(4)]
        assert process.stop(signal.SIGKILL) == -signal.SIGKILL
        answers = [one.result() for one in lost]
    assert all(isinstance(one, str | openai.APIConnectionError) for one in answers)
    assert isinstance(ask(client, 11), openai.APIConnectionError)
    process.start()
    assert ask(client, 11) == before


def test_sigterm_finishes_what_was_taken(client, process, server):
    seen = server.metric("sparvar_batch_pictures_sum")
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        taken = [pool.submit(ask, client, seed, n=2) for seed in range(4)]
        # All eight are in the house: drawn, being drawn, or waiting.
        until(
            lambda: (
                server.metric("sparvar_batch_pictures_sum")
                - seen
                + server.metric("sparvar_waiting")
                == 8
            )
        )
        ended = pool.submit(process.stop)
        answers = [one.result() for one in taken]
        assert ended.result() == 0, process.log()
    assert all(isinstance(one, str) for one in answers), answers
    assert isinstance(ask(client, 0), openai.APIConnectionError)
    assert "Traceback" not in process.log()
