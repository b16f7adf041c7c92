"""Tiles of products of few rows with 8-bit weights, tried on the GPU that is here.

    python -m benchmarks.tune_products            # prints lines for tuning.json
    python -m benchmarks.tune_products --write    # and puts them there

Times the four products of blocks of Infinity-8B at the rows of its first scales, with more weights
than the cache of a GPU holds, beside XLA's products with bfloat16 weights and, where it runs,
Hopper's own kernel. Candidates whose output is wrong, or that do not fit a multiprocessor, are
named and left out.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from benchmarks._options import parser_of
from benchmarks.kernel_rows import measure
from benchmarks.tune import trial
from pallas_kernels import support
from pallas_kernels.backends import Implementation
from pallas_kernels.portable import tuning
from pallas_kernels.portable.tuning import ProductTiles

WIDTH = 3584
SHAPES = ((3, 1), (1, 1), (4, 1), (1, 4))
"""Outputs and inputs of a block's products, in widths."""
BLOCKS = 3
TOLERANCE = 5e-3
"""Of bfloat16 results in the Frobenius norm: they are rounded by 2^-9 at most."""
FEW = ((64, 128, 4, 4), (64, 256, 4, 3), (64, 128, 4, 6), (128, 128, 8, 4), (32, 256, 4, 4))
SIZES: dict[int, tuple[int, tuple[tuple[int, ...], ...]]] = {
    16: (8, tuple((16, *tiles) for tiles in FEW)),
    32: (32, tuple((32, *tiles) for tiles in FEW)),
    128: (
        72,
        ((128, 64, 64, 4, 4), (128, 128, 64, 8, 4), (128, 64, 128, 4, 3), (64, 64, 128, 4, 4),
         (64, 128, 64, 4, 4), (32, 64, 128, 4, 4)),
    ),
    256: (
        288,
        ((256, 64, 64, 4, 3), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4),
         (64, 128, 64, 4, 4), (64, 64, 128, 4, 4)),
    ),
}  # fmt: skip
"""Most rows -> the rows timed, and (rows, outputs, step, warps, stages) of a program."""
Program = Callable[..., list[jax.Array]]


def candidates(most: int) -> list[ProductTiles]:
    """Tiles to try for up to so many rows."""
    names = ("rows", "outputs", "step", "warps", "stages")
    return [ProductTiles(**dict(zip(names, sizes, strict=True))) for sizes in SIZES[most][1]]


def weights() -> list[tuple[jax.Array, jax.Array]]:
    """Values and scales of all products, and no two of them the same array."""
    found = []
    for number, (outputs, inputs) in enumerate(SHAPES * BLOCKS):
        shape = (outputs * WIDTH, inputs * WIDTH)
        key = jax.random.key(number)
        values = jax.random.randint(key, shape, -127, 128, jnp.int8)
        found.append((values, jnp.full(shape[0], 1e-3)))
    return found


def activations(rows: int) -> dict[int, jax.Array]:
    """So many rows, by their width."""
    widths = {inputs * WIDTH for _, inputs in SHAPES}
    return {
        width: jax.random.normal(jax.random.key(width), (1, rows, width), jnp.bfloat16)
        for width in widths
    }


def products(xs: Any, given: Any, implementation: Implementation) -> list[jax.Array]:
    """Of all weights with the activations of their width."""
    return [
        pk.weight_matmul(xs[values.shape[1]], values, scale, implementation=implementation)
        for values, scale in given
    ]


def of_hopper(operands: Any, want: list[jax.Array], repeats: int) -> str:
    """What Hopper's own kernel takes a block, or why it does not run here."""
    program = jax.jit(functools.partial(products, implementation="hopper"))
    try:
        error = max(map(_error, program(*operands), want))
    except NotImplementedError as refusal:
        return str(refusal)
    return f"{milliseconds(program, operands, repeats):.4f} ms a block, error {error:.3g}"


def compiled(most: int, operands: Any) -> dict[ProductTiles, Program | Exception]:
    """All products in one program for each candidate: traced one by one, compiled together."""
    lowered = []

    def built(program: Any) -> Program | Exception:
        try:
            return program.compile()
        except Exception as refusal:  # no room, or whatever a compiler raises
            return refusal

    with trial(f"weights/{most}") as take:
        for tiles in candidates(most):
            take(tiles)
            # A function of its own, because tiles are no part of what jax knows a trace by.
            call = jax.jit(lambda *given: products(*given, implementation="portable"))
            lowered.append(call.lower(*operands))
    with ThreadPoolExecutor() as pool:
        return dict(zip(candidates(most), pool.map(built, lowered), strict=True))


def milliseconds(program: Program, operands: Any, repeats: int) -> float:
    """Of a block, by calls that wait for the last of ten."""
    return measure(lambda: program(*operands), 10, repeats)[0] / BLOCKS


def tried(most: int, given: Any, repeats: int) -> Iterator[tuple[ProductTiles, float]]:
    """The candidates that run and are right, with their milliseconds a block."""
    rows = SIZES[most][0]
    xs = activations(rows)
    wide = [(values.astype(jnp.bfloat16).T, scale) for values, scale in given]

    def plain(x: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
        sums = jnp.einsum("btc,co->bto", x, weight, preferred_element_type=jnp.float32)
        return (sums * scale).astype(x.dtype)

    reference = jax.jit(lambda xs, all_of: [plain(xs[w.shape[0]], w, s) for w, s in all_of])
    want = jax.block_until_ready(reference(xs, wide))
    beside = milliseconds(reference, (xs, wide), repeats)
    print(f"{rows} rows, XLA in bfloat16: {beside:.4f} ms a block", flush=True)
    del wide
    print(f"{rows} rows, Hopper's kernel: {of_hopper((xs, given), want, repeats)}", flush=True)
    for tiles, program in compiled(most, (xs, given)).items():
        if isinstance(program, Exception):
            print(f"{tiles}: {type(program).__name__}: {program}".partition("\n")[0][:200])
            continue
        error = max(map(_error, program(xs, given), want))
        spent = milliseconds(program, (xs, given), repeats)
        verdict = "" if error <= TOLERANCE else f", wrong by {error:.3g}"
        print(f"{rows} rows, {tiles}: {spent:.4f} ms a block{verdict}", flush=True)
        if not verdict:
            yield tiles, spent


def _error(ours: jax.Array, want: jax.Array) -> float:
    ours, want = ours.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.linalg.norm(ours - want) / jnp.linalg.norm(want))


def write(lines: dict[str, dict[str, int]]) -> None:
    """Put the lines of this GPU's family into `tuning.json`, one line an entry."""
    file = Path(tuning.__file__).with_name("tuning.json")
    table = json.loads(file.read_text())
    table.setdefault(tuning.family(support.device_of().capability), {}).update(lines)
    families = (
        f' "{family}": {{\n'
        + ",\n".join(f'  "{name}": {json.dumps(tiles)}' for name, tiles in entries.items())
        + "\n }"
        for family, entries in table.items()
    )
    file.write_text("{\n" + ",\n".join(families) + "\n}\n")


def main() -> None:
    """Try all candidates."""
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="into tuning.json")
    asked = parser.parse_args()
    given, lines = weights(), {}
    for most in asked.rows:
        found = dict(tried(most, given, asked.repeats))
        if found:
            best = min(found, key=lambda tiles: found[tiles])
            lines[f"weights/{most}"] = dataclasses.asdict(best)
            print(f'"weights/{most}": {json.dumps(lines[f"weights/{most}"])}', flush=True)
    if asked.write:
        write(lines)


if __name__ == "__main__":
    main()
