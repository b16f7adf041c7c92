"""How far a plan's logits are off when the dense picture's bits are fed back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparvar_jax.models import sampling
from sparvar_jax.pipelines.pipeline import Request
from sparvar_jax.plans.plan import Plan
from sparvar_jax.runtime.generate import Generator


class LogitComparison:
    """Guided logits of plans beside the dense ones, on some prompts of a drawing's first batch.

    tokens: the dense tokens of that batch, which all plans are fed. Every n-th prompt is used, so
    that `prompts` prompts from all of the list take part. Bits are drawn with the same keys.
    """

    def __init__(self, drawing: Any, tokens: list[np.ndarray], prompts: int):
        self._drawing = drawing
        request: Request = drawing.requests[0]
        batch = request.keys.shape[0]
        chosen = np.arange(0, batch, max(batch // prompts, 1))[:prompts]
        self._request = _some(request, chosen)
        self._forced = tuple(jnp.asarray(token[chosen]) for token in tokens)
        self._dense = self._run(drawing.plan("dense"))

    def figures(self, plan: Plan) -> dict[str, Any]:
        """Relative logit error and share of equal bits of every scale that the plan runs.

        `bit_agreement` is the mean of the last three scales, None for a plan that skips some.
        """
        errors, agreement = [], []
        for (ours, our_bits), (theirs, their_bits) in zip(
            self._run(plan), self._dense, strict=False
        ):
            errors.append(float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)))
            agreement.append(float((our_bits == their_bits).mean()))
        whole = len(agreement) == len(self._dense)
        return {
            "bit_agreement": float(np.mean(agreement[-3:])) if whole else None,
            "bit_agreement_by_scale": agreement,
            "logit_error_by_scale": errors,
        }

    def _run(self, plan: Plan) -> list[tuple[np.ndarray, np.ndarray]]:
        generator = self._drawing.pipe.generator
        return logits_and_bits(generator, plan, self._request, self._forced)


def _some(request: Request, chosen: np.ndarray) -> Request:
    """The request of some of its prompts: rows are conditional first, then unconditional."""
    batch = request.keys.shape[0]
    rows = jax.tree.leaves(request.condition)[0].shape[0]
    index = np.concatenate([chosen + start for start in range(0, rows, batch)])
    condition = jax.tree.map(lambda x: x[index], request.condition)
    return dataclasses.replace(request, condition=condition, keys=request.keys[chosen])


def logits_and_bits(
    generator: Generator, plan: Plan, request: Request, forced: tuple[jax.Array, ...]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(guided logits, bits drawn from them) of every scale under forced bits."""
    model, found = generator.model, []
    steps = generator.steps(
        plan, request.condition, request.controls, request.keys, forced=forced, capture=True
    )
    for index, (_, output) in enumerate(steps):
        logits = output.captured["guided_logits"]
        keys = jax.vmap(jax.random.fold_in, (0, None))(request.keys, index)
        pairs = logits.reshape(*logits.shape[:2], model.config.bits, 2)
        bits = sampling.sample_bits(pairs, request.controls.top_p, keys)
        found.append((np.asarray(logits, np.float32), np.asarray(bits)))
    return found
