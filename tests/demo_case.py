"""One fixed drawing of the demo model, and the file of what it should give.

`python -m tests.demo_case` writes the file after the demo checkpoint has changed. Its logits come
from the one-pass forward, which shares neither cache nor loop nor kernels with what is tested.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int8

from sparvar_jax.models import quantizer
from sparvar_jax.pipelines import loading
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.study.teacher import teacher_forced_logits

FOLDER = Path(os.environ.get("SPARVAR_DEMO_DIR", loading.DEMO))
STORED = Path(__file__).parent / "fixtures" / "demo_expected.npz"
PROMPT = "a rocket above a red apple on a dark green background"
SIZE = "0.06M"  # the first seven scales, 64x64 pixels
SEED = 0
PLAN = "dense"  # whatever the model's own default is

Tokens = list[Int8[np.ndarray, "1 T N"]]


def sampled_tokens(pipe: Pipeline) -> Tokens:
    """The bits of every scale, drawn densely with the model's defaults."""
    request = pipe.request(PROMPT, size=SIZE, seed=SEED, plan=PLAN)
    steps = pipe.generator.steps(request.plan, request.condition, request.controls, request.keys)
    return [np.asarray(output.tokens) for _, output in steps]


def loop_logits(pipe: Pipeline, tokens: Tokens) -> list[Float[np.ndarray, "T logits"]]:
    """Conditional raw logits of the cached loop with these tokens fed back."""
    request = pipe.request(PROMPT, size=SIZE, seed=SEED, plan=PLAN)
    steps = pipe.generator.steps(
        request.plan,
        request.condition,
        request.controls,
        request.keys,
        forced=tuple(jnp.asarray(t) for t in tokens),
        capture=True,
    )
    return [np.asarray(output.captured["raw_logits"][0]) for _, output in steps]


def one_pass_logits(pipe: Pipeline, tokens: Tokens) -> list[Float[np.ndarray, "T logits"]]:
    """The same logits from the one-pass forward."""
    request = pipe.request(PROMPT, size=SIZE, seed=SEED, plan=PLAN)
    schedule = request.plan.schedule
    total, codes = None, []
    for scale, following, labels in zip(
        schedule.scales[:-1], schedule.scales[1:], tokens, strict=False
    ):
        grid = labels.reshape(1, scale.height, scale.width, -1)
        total = quantizer.accumulate(total, quantizer.labels_to_codes(grid), schedule.final)
        size = (following.height, following.width)
        codes.append(quantizer.next_input(total, size, False).reshape(1, following.tokens, -1))
    text, lengths = pipe.encode_text([PROMPT])
    condition = pipe.model.transformer.embed_condition(text, jnp.asarray(lengths))
    logits = teacher_forced_logits(pipe.model.transformer, condition, tuple(codes), schedule)
    return [np.asarray(part[0]) for part in logits]


def main() -> None:
    """Write the file, from float32 on a CPU."""
    if jax.default_backend() != "cpu":
        raise SystemExit("write it on a CPU: JAX_PLATFORMS=cpu python -m tests.demo_case")
    pipe = Pipeline.from_checkpoint(FOLDER)
    tokens = sampled_tokens(pipe)
    arrays = {f"tokens.{i}": t for i, t in enumerate(tokens)}
    arrays |= {f"logits.{i}": t for i, t in enumerate(one_pass_logits(pipe, tokens))}
    np.savez_compressed(STORED, **arrays)
    print(f"{STORED}: {STORED.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
