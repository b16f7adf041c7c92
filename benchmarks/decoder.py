"""Decoders of the image tokenizers: milliseconds from sums of codes to uint8 pictures.

    python -m benchmarks.decoder

Released shapes with random weights. Every row's first picture is compared with a float32 decode of
the same weights in the same run; exit 1 where one is wrong. `--tiny` rehearses with small shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jaxtyping import Array, Float

from benchmarks import _record as record
from benchmarks import models
from benchmarks._options import add_out
from benchmarks.generate_stats import GIB, program_bytes
from sparvar_jax.models.bsq_vae import BsqVae, BsqVaeConfig, to_uint8
from sparvar_jax.models.vqvae import Vqvae, VqvaeConfig
from sparvar_jax.runtime.compiling import compile_lowered

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A decoder at one picture size. batches: how many pictures at once."""

    name: str
    kind: Any
    config: BsqVaeConfig | VqvaeConfig
    pixels: int
    batches: tuple[int, ...]

    def codes(self, batch: int) -> Float[Array, "B h w Cd"]:
        """Random bits as codes of length one, what the bitwise quantiser hands over."""
        side, width = self.pixels // self.config.stride, self.config.code_width
        bits = jax.random.bernoulli(jax.random.key(1), 0.5, (batch, side, side, width))
        return jnp.where(bits, 1.0, -1.0) * width**-0.5


CASES = (
    Case("bsq_vae f16_d32", BsqVae, BsqVaeConfig.preset("f16_d32"), 1024, (1, 4)),
    Case("vqvae", Vqvae, VqvaeConfig(), 256, (1, 8, 64)),
)
TINY_CASES = (
    Case("tiny bsq_vae", BsqVae, BsqVaeConfig(8, 4, (1, 2, 2), (1, 2, 2), 24, 1, 2), 32, (1, 2)),
    Case("tiny vqvae", Vqvae, VqvaeConfig(64, 8, 32, (1, 2), 1), 16, (1, 2)),
)


def decode(model: Any, codes: Float[Array, "B h w Cd"]) -> Array:
    """What a pipeline runs after the last scale."""
    return to_uint8(model.decode(codes))


def products(jaxpr: Any) -> int:
    """Operations in convolutions and matrix products of a jaxpr, two a multiplication."""
    total = 0
    for equation in jaxpr.eqns:
        total += sum(products(inner) for inner in jaxprs_in_params(equation.params))
        if equation.primitive.name not in ("conv_general_dilated", "dot_general"):
            continue
        (left, right), out = (v.aval.shape for v in equation.invars), equation.outvars[0].aval
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            terms = math.prod(left[axis] for axis in contracted)
        else:
            terms = math.prod(right) // right[equation.params["dimension_numbers"].rhs_spec[0]]
        total += 2 * out.size * terms
    return total


def error(picture: np.ndarray, truth: np.ndarray) -> float:
    """Root mean square difference of uint8 pictures where black is -1 and white 1."""
    return float(np.sqrt(np.mean((picture / 127.5 - truth / 127.5) ** 2)))


def exact(model: Any, case: Case, codes: Float[Array, "B h w Cd"]) -> np.ndarray:
    """The decode in float32 by the same weights."""
    full = models.abstract(case.kind, case.config)
    nnx.update(full, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.state(model)))
    # One call is not worth choosing algorithms by measuring them.
    options = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else None
    return np.asarray(jax.jit(decode, compiler_options=options)(full, codes))


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of warm calls, each waited for."""
    for _ in range(3):
        jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times


def rows_of(case: Case, repeats: int) -> list[Row]:
    """One row a batch size, in bfloat16."""
    config = dataclasses.replace(case.config, dtype="bfloat16")
    model = models.randomise(models.abstract(case.kind, config), 0)
    rows, truth = [], None
    for batch in case.batches:
        codes, start = case.codes(max(case.batches))[:batch], time.perf_counter()
        program = compile_lowered(jax.jit(decode).lower(model, codes))
        row: Row = {"case": case.name, "pixels": [case.pixels] * 2, "batch": batch}
        row |= {"dtype": "bfloat16", "compile_seconds": time.perf_counter() - start}
        times = seconds(lambda program=program, codes=codes: program(model, codes), repeats)
        median = float(np.median(times))
        tflop = products(jax.make_jaxpr(decode)(model, codes).jaxpr) / 1e12
        row |= {"median_ms": 1e3 * median, "spread_ms": 1e3 * float(np.ptp(times))}
        row |= {"images_per_second": batch / median, "tflop": tflop, "tflops": tflop / median}
        # As the compiler lays out buffers; autotuning, in the same process, may have held more.
        needs = models.bytes_of(model) + codes.nbytes + program_bytes(program)
        row |= {"peak_gib": needs / GIB, "tolerance": tolerance(model)}
        truth = exact(model, case, codes[:1]) if truth is None else truth
        row |= {"error": error(np.asarray(program(model, codes))[:1], truth)}
        rows.append(row | {"contrast": float(np.std(truth / 127.5))})
        print(line(rows[-1]), flush=True)
    return rows


def tolerance(model: Any) -> float:
    """How far from float32 bfloat16 may be: its roundings add up as independent errors do.

    Every convolution rounds what it reads and what it writes: values near one by up to 2^-9.
    """
    leaves = nnx.to_flat_state(nnx.state(model.decoder))
    convolutions = sum(path[-1] == "kernel" for path, _ in leaves)
    return (2 * convolutions) ** 0.5 * 2**-9


def is_wrong(row: Row) -> bool:
    """Whether a picture is too far from the true one, or the true one too flat to tell."""
    return not (row["error"] <= row["tolerance"] <= row["contrast"] / 10)


def line(row: Row) -> str:
    """One row in one line of text."""
    return (
        f"{row['case']} {row['pixels'][0]} px x{row['batch']}: {row['median_ms']:.3f} ms "
        f"(spread {row['spread_ms']:.3f}), {row['tflops']:.0f} TFLOP/s, {row['peak_gib']:.2f} GiB, "
        f"compile {row['compile_seconds']:.1f} s, error {row['error']:.4f} of "
        f"{row['tolerance']:.4f}, contrast {row['contrast']:.2f}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure every case and write one JSON file; 1 where a picture is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="small shapes, as a rehearsal")
    add_out(parser)
    options = parser.parse_args(arguments)
    rows, name = [], "decoder-tiny" if options.tiny else "decoder"
    for case in TINY_CASES if options.tiny else CASES:
        rows += rows_of(case, options.repeats)
        record.write(name, rows, folder=options.out)
    wrong = [row for row in rows if is_wrong(row)]
    for row in wrong:
        print(f"wrong: {line(row)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
