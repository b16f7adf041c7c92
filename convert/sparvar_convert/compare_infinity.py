"""Infinity side by side: the twin draws, the production loop replays its bits, layer by layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

from sparvar_convert.side_by_side import Options, Row, Sides, fill_twin, row, with_bits
from sparvar_convert.torch_twin.infinity import Infinity as Twin
from sparvar_convert.torch_twin.infinity_loop import ScaleTrace, Settings, run
from sparvar_jax.models import sampling
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.plans.schedule import ScaleSchedule, infinity_schedule
from sparvar_jax.runtime import generate

TEXT_LENGTHS = (5, 9)
"""Tokens of the two made-up prompts: unequal, so that masks of text matter."""


def compare(sides: Sides, options: Options) -> tuple[Row, ...]:
    """Inputs, hidden states after every block, raw and guided logits and bits of every scale."""
    schedule = infinity_schedule(1 / options.aspect_ratio, options.size)
    draw = np.random.default_rng(options.seed)
    width = sides.config.text_width
    texts = [draw.standard_normal((n, width)).astype(np.float32) for n in TEXT_LENGTHS]
    traces, total = _run_twin(sides, options, schedule, texts)
    rows, code_sum = _replay(sides, options, schedule, texts, traces)
    return (*rows, row(None, "code sum", total, code_sum))


def _run_twin(
    sides: Sides, options: Options, schedule: ScaleSchedule, texts: list[np.ndarray]
) -> tuple[list[ScaleTrace], np.ndarray]:
    with torch.device("meta"):
        twin = Twin(sides.config)
    settings = Settings(
        schedule.sizes,
        schedule.rotary_grid,
        (options.guidance,) * len(schedule),
        options.temperature,
        generator=torch.Generator().manual_seed(options.seed),
    )
    filled = fill_twin(twin, sides)
    assert isinstance(filled, Twin)
    traces, total = run(filled, settings, [torch.from_numpy(text) for text in texts])
    return traces, total.permute(0, 2, 3, 1).numpy()


def _replay(
    sides: Sides,
    options: Options,
    schedule: ScaleSchedule,
    texts: list[np.ndarray],
    traces: list[ScaleTrace],
) -> tuple[list[Row], np.ndarray]:
    """Rows of all scales, and the summed codes at the end."""
    generator = generate.Generator(sides.load())
    guided = options.guidance != 1
    lengths = jnp.asarray([len(text) for text in texts], jnp.int32)
    padded = np.zeros((len(texts), max(map(len, texts)), texts[0].shape[1]), np.float32)
    for place, text in zip(padded, texts, strict=True):
        place[: len(text)] = text
    kind = "learned" if guided else None
    condition = jax.jit(lambda model, text: model.embed_condition(text, lengths, kind))(
        generator.model, jnp.asarray(padded)
    )
    controls = generate.controls(
        len(schedule), guidance=options.guidance, temperature=options.temperature
    )
    steps = generator.steps(
        dense_plan(schedule, sides.config.depth, guidance=guided),
        condition,
        controls,
        sampling.image_keys(0, len(texts)),
        forced=tuple(jnp.asarray(trace.labels.numpy(), jnp.int8) for trace in traces),
        capture=True,
    )
    rows: list[Row] = []
    code_sum = np.zeros(0)
    for index, ((state, output), trace) in enumerate(zip(steps, traces, strict=True)):
        rows += _scale_rows(index, trace, output.captured, options.tolerance)
        code_sum = np.asarray(state.code_sum)
    return rows, code_sum


def _scale_rows(index: int, trace: ScaleTrace, captured: dict, tolerance: float) -> list[Row]:
    raw = trace.raw_logits.numpy()
    guided = trace.guided_logits.numpy()
    rows = [row(index, "input", trace.block_input.numpy(), captured["input"])]
    for layer, hidden in enumerate(trace.hidden):
        rows.append(row(index, f"block {layer}", hidden.numpy(), captured[f"hidden.{layer}"]))
    rows.append(row(index, "raw logits", raw, np.asarray(captured["raw_logits"])[: len(raw)]))
    ours = np.asarray(captured["guided_logits"]).reshape(guided.shape)
    gaps = np.abs(guided[..., 1] - guided[..., 0])
    equal = (guided[..., 1] > guided[..., 0]) == (ours[..., 1] > ours[..., 0])
    slack = 2 * tolerance * float(np.abs(guided).max())
    return [*rows, with_bits(row(index, "guided logits", guided, ours), gaps, equal, slack)]
