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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from benchmarks._options import parser_of
from pallas_kernels.sparsity import Gaps, visible_rows

TOOLS = ("memcheck", "racecheck")
_FOUND = 86  # what the tool exits with where it found something
_RAN = "ran: "


Calls = dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...]]]
GAPS = ((121, 128), (300, 310))
QUERIES, KEYS = 300, 601


def run_all() -> None:
    """In the watched process: every kernel once, in bfloat16."""
    for name, (call, operands) in (attention_calls() | fused_calls()).items():
        out = jax.block_until_ready(jax.jit(call)(*operands))
        finite = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(out))
        print(f"{_RAN}{name}{'' if finite else ' not finite'}", flush=True)


def attention_calls() -> Calls:
    """Attention and selection; rows without a key hold NaN."""
    geometry = pk.Geometry.aligned(((1, 1), (3, 5), (9, 21), (13, 19)))
    where = geometry, (-1, 3, 3, 5), 1
    table = np.random.default_rng(0).random((3, 5)) < 0.6
    blocks = pk.blocks_from_mask(table, KEYS, gaps=GAPS)
    with_gaps = _draw(QUERIES, KEYS, GAPS)
    calls: Calls = {
        "dense": (_asked(pk.attention, KEYS, return_lse=True), _draw(QUERIES, KEYS)),
        "dense bounded": (_asked(pk.attention, KEYS, logit_bound=100.0), _draw(QUERIES, KEYS)),
        "dense gaps": (_asked(pk.attention, KEYS, gaps=GAPS), with_gaps),
        "blocks": (_asked(pk.block_sparse_attention, blocks), with_gaps),
        "sums": (_asked(pk.attention_column_sums, KEYS, 192, gaps=GAPS), with_gaps),
        "select": (_asked(pk.select_columns, 77), (jnp.ones((1, 2, 3, KEYS)),)),
    }
    for exact in (False, True):
        operands = _draw(13 * 19, geometry.kv_length, geometry.gaps)
        call = _asked(pk.window_attention, *where, exact=exact)
        calls[f"boxes exact={exact}"] = (call, operands)
    for size in (1, 8):
        runs = np.tile(np.arange(-(-KEYS // size)), (1, 2, 2, 1))
        lists = np.random.default_rng(size).permuted(runs, axis=3)[..., :41]
        lists, counts = jnp.asarray(lists, jnp.int32), jnp.array([[[41, 0], [7, 40]]])
        named = dict(kv_length=KEYS, granularity=size, gaps=GAPS)
        call = _asked(pk.column_sparse_attention, **named)
        calls[f"columns of {size}"] = (call, (*with_gaps, lists, counts))
    return calls


def fused_calls() -> Calls:
    """Norm, rotary positions and cross attention."""
    x, vector = jnp.ones((2, 37, 384)), jnp.ones(384)
    norm = _asked(
        lambda x, y, **n: pk.residual_norm(x, y, vector, vector, vector, bias=vector, **n)
    )
    shapes = (2, 63, 768), (256,), (4,), (2, 4, 96, 64), (2, 4, 24, 64)
    qkv, bias, temperature, cache, text = (jnp.ones(shape, jnp.bfloat16) for shape in shapes)
    angles = jnp.ones((63, 64))
    rotary = _asked(pk.rotary_to_cache, start=3, width=9, pitch=12, clear=5)
    return {
        "norm": (norm, (x, x.astype(jnp.bfloat16))),
        "rotary": (rotary, (qkv, bias, bias, temperature, angles, angles, cache, cache)),
        "cross": (
            _asked(pk.cross_attention), (qkv[..., :256], text, text, jnp.zeros((2, 4, 24)))
        ),
    }  # fmt: skip


def _asked(function: Callable[..., Any], *rest: Any, **named: Any) -> Callable[..., Any]:
    return lambda *operands: function(*operands, *rest, **named, implementation="portable")


def _draw(queries: int, keys: int, gaps: Gaps = (), head_dim: int = 128) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(queries + keys)
    cached = -(-keys // 8) * 8
    q, k, v = (rng.standard_normal((1, 2, n, head_dim)) for n in (queries, cached, cached))
    hidden = ~visible_rows(cached, keys, gaps)
    k[:, :, hidden], v[:, :, hidden] = np.nan, np.nan
    return tuple(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))


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
    parser = parser_of(__doc__)
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
