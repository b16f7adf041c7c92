"""The portable kernels under NVIDIA's compute-sanitizer: memory errors and data races.

    python -m benchmarks.sanitize          # on the machine with the GPU

Runs memcheck and racecheck over dense attention, lists of blocks, rectangles, columns, column sums,
selection and the fused operations, at small sizes with ragged ends, gaps and NaN in hidden rows.
Exits 1 where a tool finds something, a result is not finite or the run breaks off. The tool comes
with CUDA, or as `pip install nvidia-cuda-sanitizer-api`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

TOOLS = ("memcheck", "racecheck")
_FOUND = 86  # what the tool exits with where it found something
_RAN = "ran: "


def run_all() -> None:
    """In the watched process: every kernel once, in bfloat16."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import pallas_kernels as pk
    from pallas_kernels.sparsity import visible_rows

    def asked(function, *rest, **named):
        return lambda *operands: function(*operands, *rest, **named, implementation="portable")

    def draw(queries, keys, gaps=(), head_dim=128):
        rng = np.random.default_rng(queries + keys)
        cached = -(-keys // 8) * 8
        q, k, v = (rng.standard_normal((1, 2, n, head_dim)) for n in (queries, cached, cached))
        hidden = ~visible_rows(cached, keys, gaps)
        k[:, :, hidden], v[:, :, hidden] = np.nan, np.nan
        return tuple(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))

    gaps = ((121, 128), (300, 310))
    geometry = pk.Geometry.aligned(((1, 1), (3, 5), (9, 21), (13, 19)))
    where = geometry, (-1, 3, 3, 5), 1
    table = pk.blocks_from_mask(np.random.default_rng(0).random((3, 5)) < 0.6, 601, gaps=gaps)
    runs = {8: 76, 1: 601}
    calls = {
        "dense": (asked(pk.attention, 601, return_lse=True), draw(300, 601)),
        "dense bounded": (asked(pk.attention, 601, logit_bound=100.0), draw(300, 601)),
        "dense gaps": (asked(pk.attention, 601, gaps=gaps), draw(300, 601, gaps)),
        "blocks": (asked(pk.block_sparse_attention, table), draw(300, 601, gaps)),
        "sums": (asked(pk.attention_column_sums, 601, 192, gaps=gaps), draw(300, 601, gaps)),
        "select": (asked(pk.select_columns, 77), (jnp.ones((1, 2, 3, 601)),)),
    }
    for exact in (False, True):
        operands = draw(13 * 19, geometry.kv_length, geometry.gaps)
        calls[f"boxes exact={exact}"] = (asked(pk.window_attention, *where, exact=exact), operands)
    for size, count in runs.items():
        lists = np.random.default_rng(size).permuted(
            np.tile(np.arange(count), (1, 2, 2, 1)), axis=3
        )
        lists, numbers = jnp.asarray(lists[..., :41], jnp.int32), jnp.array([[[41, 0], [7, 40]]])
        named = dict(kv_length=601, granularity=size, gaps=gaps)
        call = asked(pk.column_sparse_attention, **named)
        calls[f"columns of {size}"] = (call, (*draw(300, 601, gaps), lists, numbers))
    x, vector = jnp.ones((2, 37, 384)), jnp.ones(384)
    norm = lambda x, y: pk.residual_norm(  # noqa: E731
        x, y, vector, vector, vector, bias=vector, implementation="portable"
    )
    calls["norm"] = (norm, (x, x.astype(jnp.bfloat16)))
    half = {n: jnp.ones(n, jnp.bfloat16) for n in ((2, 63, 768), (256,), (4,), (2, 4, 96, 64))}
    qkv, bias, temperature, cache = half.values()
    angles, place = jnp.ones((63, 64)), dict(start=3, width=9, pitch=12, clear=5)
    rotary = (qkv, bias, bias, temperature, angles, angles, cache, cache)
    calls["rotary"] = (asked(pk.rotary_to_cache, **place), rotary)
    text = jnp.ones((2, 4, 24, 64), jnp.bfloat16)
    cross = (qkv[..., :256], text, text, jnp.zeros((2, 4, 24)))
    calls["cross"] = (asked(pk.cross_attention), cross)
    for name, (call, operands) in calls.items():
        out = jax.block_until_ready(jax.jit(call)(*operands))
        finite = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(out))
        print(f"{_RAN}{name}{'' if finite else ' not finite'}", flush=True)


def sanitizer() -> str | None:
    """Where the tool is: on the path, or in its package."""
    package = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    found = sorted(package.glob("*/bin/compute-sanitizer"))
    return shutil.which("compute-sanitizer") or (str(found[-1]) if found else None)


def watch(tool: str, command: str) -> list[str]:
    """Run every kernel under one tool; what is wrong."""
    # Buffers of their own, so that a read past one is seen; the rest is not ours to watch.
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=",
    }
    kernels = ["_attention", "column_sums", "row_thresholds", "residual_norm", "rotary_to_cache"]
    watched = [part for name in kernels for part in ("--kernel-name", f"kernel_substring={name}")]
    # XLA asks the driver for what may not be there; such answers are no errors of a kernel.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    done = subprocess.run(
        [
            command, "--tool", tool, "--error-exitcode", str(_FOUND), "--print-limit", "20",
            *options, *watched, sys.executable, "-m", "benchmarks.sanitize", "--run",
        ],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    said = done.stdout + done.stderr
    print(said[-6000:], flush=True)
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", said)
    problems = [line for line in said.splitlines() if line.endswith("not finite")]
    if summary is None or _RAN not in said:
        problems.append(f"{tool} gave no summary, exit status {done.returncode}")
    elif int(summary[1]) or done.returncode:
        problems.append(f"{tool}: {summary[0]}, exit status {done.returncode}")
    return problems


def main() -> int:
    """Both tools over all kernels."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.run:
        run_all()
        return 0
    command = sanitizer()
    if command is None:
        parser.error("compute-sanitizer was not found: pip install nvidia-cuda-sanitizer-api")
    problems = [problem for tool in asked.tools for problem in watch(tool, command)]
    for problem in problems:
        print(f"wrong: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
