"""Clients of a server, in a process of their own: each asks again as soon as it has its picture.

    python -m benchmarks.serve_client http://127.0.0.1:8000 --clients 8 --seconds 20

Prints JSON: seconds of every answer, and over all. Imports neither jax nor this package.
"""

from __future__ import annotations

import argparse
import json
import threading
import time

import httpx

PROMPT = "a red apple to the left of a blue cup on a wooden table"


def load(address: str, clients: int, seconds: float) -> dict[str, object]:
    """Seconds of the answers that so many clients get in some time, after one each unmeasured."""
    answers: list[tuple[float, float]] = []
    barrier = threading.Barrier(clients + 1)

    def ask(client: httpx.Client, seed: int) -> None:
        body = {"prompt": PROMPT, "seed": seed}
        client.post(f"{address}/v1/images/generations", json=body).raise_for_status()

    def work(number: int) -> None:
        with httpx.Client(timeout=600) as client:
            ask(client, number)
            barrier.wait()
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                start = time.perf_counter()
                ask(client, number)
                answers.append((start, time.perf_counter()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    barrier.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    whole = max(stop for _, stop in answers) - began
    return {"seconds": [stop - start for start, stop in answers], "whole": whole}


def main() -> None:
    """Ask, and print what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    asked = parser.parse_args()
    print(json.dumps(load(asked.address, asked.clients, asked.seconds)))


if __name__ == "__main__":
    main()
