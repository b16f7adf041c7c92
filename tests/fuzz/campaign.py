"""The campaign: children try cases within limits, a parent watches, failures become tests.

A child tells its parent, a line of JSON each: what it begins, what it found, and its counts. One
that dies or stands still is replaced, and the case it had begun is the failure.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import hypothesis

PATIENCE = 180.0  # seconds without a word, on a busy machine
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@dataclasses.dataclass
class Found:
    """One failure. signature: what tells it from others."""

    target: str
    case: str
    kind: str
    signature: str
    told: str

    def as_test(self) -> str:
        """A test that fails as long as the failure is there."""
        name = f"test_{self.target}_{abs(hash(self.signature)) % 10**6:06d}"
        lines = ["", *self.told.splitlines()[-12:]]
        comment = "\n    # ".join(line[:160] for line in lines).lstrip("\n ")
        return (
            f"def {name}():  # {self.kind}\n"
            "    from math import inf, nan  # noqa: F401\n\n"
            "    from tests.fuzz.limits import limited\n"
            "    from tests.fuzz.targets import check\n\n"
            f"    {comment}\n"
            f"    limited(lambda: check({self.target!r}, {self.case}))\n"
        )


@dataclasses.dataclass
class Counts:
    """What a campaign tried."""

    cases: int = 0
    read: int = 0
    refused: int = 0
    largest: int = 0
    slowest: float = 0.0
    found: list[Found] = dataclasses.field(default_factory=list)


def try_target(name: str, cases: int, seed: int, known: set[str], seconds: float) -> Iterator[dict]:
    """Try one target in this process; yields what a parent is told."""
    from tests.fuzz import limits, targets

    target, ends = targets.TARGETS[name], time.monotonic() + seconds
    counts: collections.Counter = collections.Counter()
    worst = {"largest": 0, "slowest": 0.0}
    failed: dict[str, Any] = {}

    def attempt(case: Any) -> None:
        if time.monotonic() > ends and not failed:
            return
        _say({"begin": name, "case": repr(case)})
        limits.forget_largest()
        before, start = limits.largest_resident(), time.process_time()
        try:
            with limits.quiet():
                refused = limits.limited(lambda: targets.check(name, case))
        except Exception as error:
            signature = _signature(error)
            counts["cases"] += 1
            if signature in known:
                return
            failed.update(case=repr(case), error=error, signature=signature)
            raise
        counts["cases"] += 1
        counts["refused" if refused else "read"] += 1
        worst["largest"] = max(worst["largest"], limits.largest_resident() - before)
        worst["slowest"] = max(worst["slowest"], time.process_time() - start)

    settings = hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        print_blob=False,
    )
    run = hypothesis.seed(seed)(settings(hypothesis.given(target.cases)(attempt)))
    try:
        run()
    except Exception as error:
        if not failed:
            raise
        del error
        real = failed["error"]
        told = "".join(traceback.format_exception(real, limit=-6))
        kind = type(real).__name__
        yield {"found": [name, failed["case"], kind, failed["signature"], told[-3000:]]}
    yield {"counts": dict(counts), **worst}


def _signature(error: BaseException) -> str:
    """Where an error came from: its kind and the last places in its way."""
    frames = traceback.extract_tb(error.__traceback__)[-2:]
    places = (f"{os.path.basename(frame.filename)}:{frame.name}" for frame in frames)
    return f"{type(error).__name__} {' '.join(places)}"


def _say(message: dict) -> None:
    os.write(_parent[0], (json.dumps(message) + "\n").encode())


_parent = [1]


def child(arguments: list[str]) -> None:
    """Serve a parent: [target, cases, seed, known, seconds] lines on stdin, answers on stdout."""
    del arguments
    _parent[0] = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from tests.fuzz import targets

    del targets
    _say({"ready": True})
    for line in sys.stdin:
        name, cases, seed, known, seconds = json.loads(line)
        for message in try_target(name, cases, seed, set(known), seconds):
            _say(message)
        _say({"end": name})


class Child:
    """A process that tries cases, replaced when it dies or stands still."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self._process: subprocess.Popen | None = None
        self._buffer, self._patience = b"", patience

    def try_target(
        self, name: str, cases: int, seed: int, known: set[str], seconds: float
    ) -> Counts:
        """Counts of one round; a death of the child is a failure of the case it had begun."""
        process = self._process or self._start()
        counts, begun = Counts(), ""
        assert process.stdin
        process.stdin.write(
            (json.dumps([name, cases, seed, sorted(known), seconds]) + "\n").encode()
        )
        process.stdin.flush()
        while (message := self._read(process)) is not None:
            if "begin" in message:
                begun = message["case"]
            elif "found" in message:
                counts.found.append(Found(*message["found"]))
            elif "counts" in message:
                counts.cases = message["counts"].get("cases", 0)
                counts.read = message["counts"].get("read", 0)
                counts.refused = message["counts"].get("refused", 0)
                counts.largest, counts.slowest = message["largest"], message["slowest"]
            elif "end" in message:
                return counts
        process.kill()
        code = process.wait()
        _close(process)
        self._process, self._buffer = None, b""
        kind = "hang" if code == -9 else f"death with {code}"
        counts.cases += 1
        counts.found.append(Found(name, begun, kind, f"{name} {kind}", kind))
        return counts

    def _start(self) -> subprocess.Popen:
        path = os.pathsep.join(
            [_ROOT, os.path.join(_ROOT, "convert"), os.environ.get("PYTHONPATH", "")]
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz", "--child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=_ROOT,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "JAX_PLATFORMS": "cpu",
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "HF_HUB_OFFLINE": "1",
                "PYTHONHASHSEED": "0",
            },
        )
        assert self._read(self._process) == {"ready": True}
        return self._process

    def _read(self, process: subprocess.Popen) -> dict | None:
        assert process.stdout
        while b"\n" not in self._buffer:
            if not select.select([process.stdout], [], [], self._patience)[0]:
                return None
            more = os.read(process.stdout.fileno(), 1 << 16)
            if not more:
                return None
            self._buffer += more
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        if self._process:
            assert self._process.stdin
            self._process.stdin.close()  # which ends it
            self._process.wait()
            _close(self._process)
            self._process = None


def _close(process: subprocess.Popen) -> None:
    """Close the pipes of a process that has ended."""
    for pipe in (process.stdin, process.stdout):
        assert pipe
        pipe.close()


def add(total: Counts, more: Counts) -> None:
    """Add a round to a sum."""
    total.cases += more.cases
    total.read += more.read
    total.refused += more.refused
    total.largest = max(total.largest, more.largest)
    total.slowest = max(total.slowest, more.slowest)
    total.found += more.found
