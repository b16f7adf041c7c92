"""A real server process on a tiny model, started where a test finds none."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import jax

START_SECONDS = 600
PLAN = "skip_last_scales(4)"
OPTIONS = ("--plan", PLAN, "--prompt-tokens", "32", "--batches", "1,2")


class Server:
    """A command that serves a model; the port stays the same from start to start."""

    def __init__(self, model: Path, cache: Path, *options: str, command: str = "serve"):
        self.port = free_port()
        self._command = [command, "--model", str(model), "--port", str(self.port), *options]
        self._cache, self._process, self._log = cache, None, model.parent / f"{command}.log"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> "Server":
        """Start it, and wait until it serves."""
        quickly = int(jax.config.values["jax_disable_most_optimizations"])
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XDG_CACHE_HOME": str(self._cache),
            # Programs must be those of this process, whose pictures are the truth.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": str(quickly),
        }
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sparvar_jax", *self._command],
                env=environment,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait()
        except BaseException:
            self._process.kill()
            raise
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.healthy():
            assert self.alive, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def healthy(self) -> bool:
        """Whether the port is open and pictures are drawn."""
        try:
            return httpx.get(f"{self.address}/health").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and wait for the exit code."""
        self._process.send_signal(number)
        return self._process.wait(START_SECONDS)

    def log(self) -> str:
        """What the process said."""
        return self._log.read_text()

    def metric(self, line: str) -> float:
        """The value of one line of /metrics; 0 for one that is not there."""
        for found in httpx.get(f"{self.address}/metrics").text.splitlines():
            if found.startswith(line + " "):
                return float(found.rpartition(" ")[2])
        return 0.0

    def memory(self) -> float:
        """MiB of the process."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / 2**20


def free_port() -> int:
    """A port nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
