"""Seconds of whole generations, from text features to the uint8 picture on the host.

    python -m benchmarks.generate --model infinity_2b --plans dense sparvar-paper

Every row is checked in the same run: the last scale is computed again from the same state without
any kernel of ours, and the guided logits must agree to bfloat16 accuracy. No picture may be flat.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _record as record
from benchmarks import models
from benchmarks._trace import kernel_times
from sparvar_jax import generate, sampling
from sparvar_jax.models import bsq_vae
from sparvar_jax.models.var_parts import guidance_ramp
from sparvar_jax.plan import Plan, with_implementation
from sparvar_jax.policies import parse_plan
from sparvar_jax.schedule import ScaleSchedule, infinity_schedule

# Kernels and XLA round attention outputs to bfloat16 (2^-9 relative) in every layer; forty layers
# of independent roundings add up to about 40**0.5 * 2**-9 = 1.2e-2. Guidance 3 can triple it.
LOGIT_TOLERANCE = 4e-2


BEYOND = {"2.25M": ((80, 80), (96, 96))}
"""Square schedules longer than any released one (1536 px), to show how cost grows."""


def schedule_of(ratio: float, size: str) -> ScaleSchedule:
    """A released schedule, or the square 1M one with more scales."""
    if size not in BEYOND:
        return infinity_schedule(ratio, size)
    return ScaleSchedule.of(infinity_schedule(1.0, "1M").sizes + BEYOND[size])


@dataclasses.dataclass
class Bench:
    """One model with its compiled parts; `draw` is what is timed.

    inputs: what `embed` takes besides the weights: text features and lengths, or class labels.
    """

    generator: generate.Generator
    decode: Callable[[Any], Any]
    embed: Callable[..., Any]
    inputs: tuple[jax.Array, ...]
    schedule: ScaleSchedule
    guidance: tuple[float, ...]
    codebook: Any = None

    @property
    def batch(self) -> int:
        return self.inputs[0].shape[0]

    @property
    def controls(self) -> sampling.Controls:
        return generate.controls(len(self.schedule), guidance=self.guidance)

    def plan(self, name: str) -> Plan:
        flags = tuple(weight != 1 for weight in self.guidance)
        depth = self.generator.model.config.depth
        return parse_plan(name, self.schedule, depth, guidance=flags)

    def draw(self, plan: Plan, clock: list[tuple[str, float]] | None = None) -> np.ndarray:
        """The pictures of one generation; with a clock every part is waited for and timed."""

        def tick(name: str, value: Any) -> None:
            if clock is not None:
                jax.block_until_ready(value)
                clock.append((name, time.perf_counter()))

        tick("start", None)
        condition = self.embed(*self.inputs)
        tick("text", condition)
        keys = sampling.image_keys(0, self.batch)
        code_sum = None
        for index, (state, _) in enumerate(
            self.generator.steps(plan, condition, self.controls, keys)
        ):
            code_sum = state.code_sum
            tick(f"scale {index}", state)
        image = np.asarray(self.decode(code_sum))
        tick("decode", None)
        return image

    def check(self, plan: Plan) -> float:
        """Relative error of the last scale's guided logits against plain XLA on the same state."""
        condition = self.embed(*self.inputs)
        keys = sampling.image_keys(0, self.batch)
        state, last = self.generator.start(plan, self.batch), len(plan.steps) - 1
        for index in range(last):
            state, _ = self.generator.decode_scale(
                plan, index, condition, state, self.controls, keys
            )
        logits = []
        plain = generate.Generator(models.without_kernels(self.generator.model), self.codebook)
        runs = (self.generator, plan), (plain, with_implementation(plan, "xla"))
        for generator, which in runs:
            copy = jax.tree.map(jnp.copy, state)
            _, output = generator.decode_scale(
                which, last, condition, copy, self.controls, keys, capture=True
            )
            logits.append(np.asarray(output.captured["guided_logits"], np.float64))
            del output, copy
        ours, reference = logits
        return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def build(preset: str, batch: int, arguments: argparse.Namespace) -> Bench:
    """The benchmark of a preset with random weights; VAR presets have one size and ratio."""
    if preset.startswith("var_"):
        return _build_var(preset, batch, arguments)
    dtype = arguments.dtype
    transformer = models.infinity(preset, dtype=dtype, fused=arguments.fused)
    tokenizer = models.tokenizer(preset, dtype=dtype)
    schedule = schedule_of(arguments.ratio, arguments.size)
    embed = jax.jit(lambda model, text, lengths: model.embed_condition(text, lengths, "learned"))
    return Bench(
        generate.Generator(transformer),
        _bind_decode(tokenizer),
        functools.partial(embed, transformer),
        models.text_features(batch, transformer.config.text_width),
        schedule,
        (3.0,) * len(schedule),
    )


def _build_var(preset: str, batch: int, arguments: argparse.Namespace) -> Bench:
    transformer = models.var(preset, dtype=arguments.dtype, fused=arguments.fused)
    tokenizer = models.vqvae(dtype=arguments.dtype)
    schedule = transformer.config.schedule
    embed = jax.jit(lambda model, labels: model.embed_condition(labels, True))
    return Bench(
        generate.Generator(transformer, tokenizer.codebook),
        _bind_decode(tokenizer),
        functools.partial(embed, transformer),
        (jnp.arange(batch) % transformer.config.classes,),
        schedule,
        guidance_ramp(1.5, len(schedule)),
        tokenizer.codebook,
    )


def _bind_decode(tokenizer: Any) -> Callable[[Any], Any]:
    decode = jax.jit(lambda vae, codes: bsq_vae.to_uint8(vae.decode(codes)))
    return functools.partial(decode, tokenizer)


def measure(bench: Bench, plan: Plan, repeats: int) -> dict[str, Any]:
    """One row's timings: cold, warm median and spread, by part and by scale."""
    start = time.perf_counter()
    bench.generator.compile(plan, bench.embed(*bench.inputs), bench.batch)
    compiled = time.perf_counter()
    picture = bench.draw(plan)
    cold = time.perf_counter() - start
    if picture.std() < 1:
        raise RuntimeError("the picture is constant: the generation did not run")
    totals = []
    for _ in range(repeats):
        before = time.perf_counter()
        bench.draw(plan)
        totals.append(time.perf_counter() - before)
    clock: list[tuple[str, float]] = []
    bench.draw(plan, clock)
    parts = {name: after - before for (_, before), (name, after) in itertools.pairwise(clock)}
    scales = [seconds for name, seconds in parts.items() if name.startswith("scale")]
    return {
        "seconds_median": float(np.median(totals)),
        "seconds_spread": float(np.ptp(totals)),
        "seconds_all": totals,
        "seconds_by_part": {
            "text": parts["text"],
            "transformer": sum(scales),
            "decode": parts["decode"],
        },
        "seconds_by_scale": scales,
        "compile_seconds": compiled - start,
        "cold_seconds": cold,
        "repeats": repeats,
    }


def kernels_used(bench: Bench, plan: Plan) -> dict[str, int]:
    """Custom calls of the compiled steps by target, read from the executables themselves."""
    calls: dict[str, int] = {}
    for compiled in bench.generator.compile(plan, bench.embed(*bench.inputs), bench.batch):
        for target in re.findall(r'custom_call_target="([^"]+)"', compiled.as_text()):
            calls[target] = calls.get(target, 0) + 1
    return calls


def matmul_ceiling() -> float:
    """Measured bfloat16 TFLOP/s of a square product on random data: 8192^3, on a CPU 1024^3."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    product(a).block_until_ready()
    before = time.perf_counter()
    out = a
    for _ in range(20):
        out = product(a)
    out.block_until_ready()
    return 20 * 2 * side**3 / (time.perf_counter() - before) / 1e12


def peak_gib() -> float | None:
    """Peak bytes in use on the first device since this process started, in GiB."""
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats["peak_bytes_in_use"] / 2**30


def measure_row(bench: Bench, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything measured of one plan, checked and printed."""
    plan = bench.plan(name)
    row = {
        "weights": "random",
        "density": plan.density(),
        "density_all": plan.density(None),
        **measure(bench, plan, arguments.repeats),
        "peak_gib": peak_gib(),
        "kernels": kernels_used(bench, plan),
    }
    if arguments.trace:
        row["kernel_ms"] = kernel_times(functools.partial(bench.draw, plan))
        for kernel, spent in list(row["kernel_ms"].items())[:30]:
            print(f"  {spent['ms']:9.2f} ms  {spent['launches']:6d}x  {kernel[:100]}")
    if not arguments.no_check:
        row["logit_error"] = bench.check(plan)
        if not row["logit_error"] <= LOGIT_TOLERANCE:
            raise RuntimeError(f"{name}: logits differ from XLA by {row['logit_error']:.3g}")
    print(
        f"{arguments.model} x{bench.batch} {name}: {row['seconds_median']:.4f} s (spread "
        f"{row['seconds_spread']:.4f}), cold {row['cold_seconds']:.1f} s, by part "
        + ", ".join(f"{k} {v:.4f}" for k, v in row["seconds_by_part"].items())
        + f", logit error {row.get('logit_error')}",
        flush=True,
    )
    return row


def main() -> None:
    """Measure the asked plans of one model and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="infinity_2b")
    parser.add_argument("--plans", nargs="+", default=["dense"])
    parser.add_argument("--size", default="1M")
    parser.add_argument("--ratio", type=float, default=1.0, help="height over width")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--fused", default=None, help="implementation of the fused operations")
    parser.add_argument("--name", default=None, help="file name, default generate-MODEL")
    parser.add_argument("--out", default=None, help="folder, default benchmarks/results/DEVICE")
    parser.add_argument("--trace", action="store_true", help="also sum GPU time by kernel")
    parser.add_argument("--no-check", action="store_true", help="profile only: write no file")
    arguments = parser.parse_args()
    ceiling = matmul_ceiling()
    rows = []
    for batch in arguments.batch:
        bench = build(arguments.model, batch, arguments)
        for name in arguments.plans:
            row = {"model": arguments.model, "plan": name, "batch": batch}
            row |= {"size": arguments.size, "ratio": arguments.ratio, "dtype": arguments.dtype}
            row |= {"fused": arguments.fused or "default"}
            row |= measure_row(bench, name, arguments) | {"matmul_ceiling_tflops": ceiling}
            rows.append(row)
        del bench
    if not arguments.no_check:
        record.write(arguments.name or f"generate-{arguments.model}", rows, folder=arguments.out)


if __name__ == "__main__":
    main()
