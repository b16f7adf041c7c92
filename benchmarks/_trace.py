"""Where device time goes: kernels of a profiled call, summed by name."""

from __future__ import annotations

import pathlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable

import jax
from jax.profiler import ProfileData


def kernel_times(call: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Milliseconds and launches per GPU kernel during one call, longest first.

    Numbers in names are dropped, so that the copies of one kernel in many layers add up. The entry
    "(span)" is the time from the first kernel's start to the last one's end.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = ProfileData.from_file(str(file))
    spent: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    first, last = float("inf"), 0.0
    for plane in profile.planes:
        if "GPU" not in plane.name:
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                name = re.sub(r"\d+", "#", event.name)
                spent[name] += event.duration_ns / 1e6
                launches[name] += 1
                first = min(first, event.start_ns)
                last = max(last, event.start_ns + event.duration_ns)
    table = {name: {"ms": ms, "launches": launches[name]} for name, ms in spent.most_common()}
    table["(span)"] = {"ms": (last - first) / 1e6 if launches else 0.0, "launches": 1}
    return table
