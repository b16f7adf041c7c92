"""What an 8-bit key/value cache costs, by which values share a scale.

    python -m benchmarks.cache_error --size 0.25M

The demo model, or one of `--model`, draws with the exact cache; its tokens are then fed to every
form of the 8-bit cache. Told are, of every form, the relative error of the guided logits of every
scale, the share of equal tokens where both draw with the same keys, and PSNR between pictures that
are drawn freely with the same seed. `--write` keeps the table in `cache-error.json`.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import _record as record
from benchmarks._options import parser_of
from benchmarks.demo_pictures import psnr
from sparvar_jax.cli import console
from sparvar_jax.pipelines.memory import cache_bytes
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.pipelines.requests import Request
from sparvar_jax.plans.eight_bits import EightBits
from sparvar_jax.plans.plan import Plan, with_store
from sparvar_jax.plans.stores import CacheShape

FORMS = tuple(itertools.product(("token", "channel"), repeat=2))
PROMPTS = (
    "a red circle above a blue square",
    "a rocket above a red apple on a dark green background",
    "a smiling cat",
    "a yellow star to the left of a green car",
)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Exact:
    """A request, and what the exact cache draws of it."""

    pipe: Pipeline
    request: Request
    tokens: tuple[jax.Array, ...]
    logits: list[np.ndarray]
    pictures: np.ndarray

    @classmethod
    def of(cls, pipe: Pipeline, subject: Any, **options: Any) -> Exact:
        request = pipe.request(subject, **options)
        code_sum, outputs = _run(pipe, request, request.plan)
        tokens = tuple(output.tokens for output in outputs)
        logits = [np.asarray(output.captured["guided_logits"]) for output in outputs]
        return cls(pipe, request, tokens, logits, np.asarray(pipe.decode(code_sum)))

    def row(self, plan: Plan) -> Row:
        """How far a plan is off."""
        _, outputs = _run(self.pipe, self.request, plan, forced=self.tokens)
        errors = [
            float(np.linalg.norm(output.captured["guided_logits"] - exact) / np.linalg.norm(exact))
            for output, exact in zip(outputs, self.logits, strict=True)
        ]
        likelier = [
            _agreement(np.asarray(output.captured["guided_logits"]), exact)
            for output, exact in zip(outputs, self.logits, strict=True)
        ]
        code_sum, _ = _run(self.pipe, self.request, plan)
        pictures = np.asarray(self.pipe.decode(code_sum))
        free = [float(psnr(a, b)) for a, b in zip(pictures, self.pictures, strict=True)]
        return {
            "logit_error_by_scale": errors,
            "token_agreement_by_scale": likelier,
            "psnr": [value if np.isfinite(value) else None for value in free],
        }


def _run(pipe: Pipeline, request: Request, plan: Plan, **options: Any) -> Any:
    return pipe.generator.run(
        plan, request.condition, request.controls, request.keys, capture=True, **options
    )


def _agreement(ours: np.ndarray, exact: np.ndarray) -> float:
    """Share of tokens (bits, where logits are of bits) whose likeliest value is the same."""
    width = 2 if exact.shape[-1] % 2 == 0 and exact.shape[-1] <= 512 else exact.shape[-1]
    likeliest = (x.reshape(*x.shape[:2], -1, width).argmax(-1) for x in (ours, exact))
    return float(np.mean(next(likeliest) == next(likeliest)))


def line(row: Row) -> str:
    """One row in one line of text."""
    last = row["logit_error_by_scale"][-3:]
    agreement = row["token_agreement_by_scale"][-3:]
    free = ", ".join("same" if value is None else f"{value:.1f}" for value in row["psnr"])
    return (
        f"keys by {row['keys']}, values by {row['values']}: logits of the last scales off by "
        f"{', '.join(f'{100 * e:.3f} %' for e in last)}; same likeliest values "
        f"{', '.join(f'{a:.5f}' for a in agreement)}; PSNR {free} dB; cache {row['cache_mib']:.1f} "
        f"MiB, exact {row['exact_mib']:.1f}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure every form and print it."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, help="model directory, by default the demo model")
    parser.add_argument("--plan", default="dense")
    parser.add_argument("--size", default="0.25M")
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    asked = parser.parse_args(arguments)
    console.use_compilation_cache()
    pipe = Pipeline.from_checkpoint(asked.model, cache="full")
    exact = Exact.of(pipe, list(PROMPTS), plan=asked.plan, size=asked.size)
    config, rows = pipe.model.transformer.config, []
    whole = exact.request.plan
    shape = CacheShape(
        len(PROMPTS) * whole.row_factor, config.heads, config.head_dim, config.precision.compute
    )
    for keys, values in FORMS:
        plan = with_store(whole, EightBits(keys=keys, values=values))
        held = {"cache_mib": cache_bytes(plan, shape), "exact_mib": cache_bytes(whole, shape)}
        row = {"model": pipe.model.name, "plan": whole.name, "size": asked.size, "keys": keys}
        row |= {"values": values, **{name: count / 2**20 for name, count in held.items()}}
        rows.append(row | exact.row(plan))
        print(line(rows[-1]), flush=True)
    if asked.write:
        record.write("cache-error", rows)


if __name__ == "__main__":
    main()
