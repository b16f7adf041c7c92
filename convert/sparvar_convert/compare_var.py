"""Class-conditional VAR side by side: both replay the same random tokens, layer by layer.

The codebook lives in another file; a random one stands in for it on both sides.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from sparvar_convert.side_by_side import Options, Row, Sides, fill_twin, row, with_bits
from sparvar_convert.torch_twin.var import VarTwin
from sparvar_convert.torch_twin.vqvae import Quantize
from sparvar_jax.models import sampling
from sparvar_jax.models.var import guidance_ramp
from sparvar_jax.models.vqvae import Codebook, VqvaeConfig
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.runtime import generate

Trace = list[dict[str, torch.Tensor]]


def compare(sides: Sides, options: Options) -> tuple[Row, ...]:
    """Inputs, hidden states after every block, raw and guided logits and ids of every scale."""
    config = sides.config
    draw = np.random.default_rng(options.seed)
    labels = draw.integers(0, config.classes, 2)
    ids = [draw.integers(0, config.vocab, (2, side * side)) for side in config.sides]
    codebook = Codebook(VqvaeConfig(config.vocab, config.code_width), rngs=nnx.Rngs(options.seed))
    trace, total = _run_twin(sides, options, labels, ids, codebook)
    rows, code_sum = _replay(sides, options, labels, ids, codebook, trace)
    return (*rows, row(None, "code sum", total, code_sum))


def _run_twin(
    sides: Sides,
    options: Options,
    labels: np.ndarray,
    ids: list[np.ndarray],
    codebook: Codebook,
) -> tuple[Trace, np.ndarray]:
    with torch.device("meta"):
        twin = VarTwin(sides.config)
    filled = fill_twin(twin, sides)
    assert isinstance(filled, VarTwin)
    quantize = random_quantize(codebook, len(sides.config.sides))
    with torch.no_grad():
        tokens = [torch.tensor(part) for part in ids]
        trace, total = filled.replay(torch.tensor(labels), tokens, quantize, options.guidance)
    return trace, total.permute(0, 2, 3, 1).numpy()


def random_quantize(codebook: Codebook, scales: int) -> Quantize:
    """The twin's quantiser with the weights of a codebook that stands in for a file's."""
    quantize = Quantize(codebook.config, scales)
    state = {"embedding.weight": codebook.codes[...]}
    for index, phi in enumerate(codebook.phi):
        state[f"quant_resi.qresi_ls.{index}.weight"] = phi.kernel[...].transpose(3, 2, 0, 1)
        state[f"quant_resi.qresi_ls.{index}.bias"] = phi.bias[...]
    tensors = {name: torch.tensor(np.asarray(value)) for name, value in state.items()}
    quantize.load_state_dict(tensors, strict=False)  # its statistics have no effect
    return quantize


def _replay(
    sides: Sides,
    options: Options,
    labels: np.ndarray,
    ids: list[np.ndarray],
    codebook: Codebook,
    trace: Trace,
) -> tuple[list[Row], np.ndarray]:
    """Rows of all scales, and the summed codes at the end."""
    generator = generate.Generator(sides.load(), codebook)
    schedule = sides.config.schedule
    weights = guidance_ramp(options.guidance, len(schedule))
    steps = generator.steps(
        dense_plan(schedule, sides.config.depth),
        jax.jit(lambda model: model.embed_condition(jnp.asarray(labels)))(generator.model),
        generate.controls(len(schedule), guidance=weights, temperature=1.0),
        sampling.image_keys(0, len(labels)),
        forced=tuple(jnp.asarray(part, jnp.int32) for part in ids),
        capture=True,
    )
    rows: list[Row] = []
    code_sum = np.zeros(0)
    plan = dense_plan(schedule, sides.config.depth)
    for index, ((state, output), theirs) in enumerate(zip(steps, trace, strict=True)):
        entering = generator.model.add_level(output.captured["input"], plan.place(index))
        captured = {**output.captured, "transformer_input": entering}
        rows += _scale_rows(index, theirs, captured, options.tolerance)
        code_sum = np.asarray(state.code_sum)
    return rows, code_sum


def _scale_rows(
    index: int, theirs: dict[str, torch.Tensor], captured: dict, tolerance: float
) -> list[Row]:
    def of(name: str, layer: str) -> Row:
        return row(index, layer, theirs[name].numpy(), np.asarray(captured[name]))

    depth = sum(name.startswith("hidden.") for name in theirs)
    rows = [of("transformer_input", "input")]
    rows += [of(f"hidden.{layer}", f"block {layer}") for layer in range(depth)]
    rows.append(of("raw_logits", "raw logits"))
    guided = theirs["guided_logits"].numpy()
    ours = np.asarray(captured["guided_logits"])
    best = np.partition(guided, -2, axis=-1)
    equal = guided.argmax(-1) == ours.argmax(-1)
    slack = 2 * tolerance * float(np.abs(guided).max())
    likeliest = with_bits(
        of("guided_logits", "guided logits"), best[..., -1] - best[..., -2], equal, slack
    )
    return [*rows, likeliest]
