"""Draws a fixed list of prompts with any plan, and counts the work that was kept on the way."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from sparvar_jax.models import bsq_vae
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.pipelines.requests import resolve_plan, resolve_schedule
from sparvar_jax.plans.plan import LAST_SCALES, Plan
from sparvar_jax.plans.served import with_implementation
from sparvar_jax.runtime.bound import Bound


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What one plan drew. work: density and density_all, as row entries."""

    pictures: np.ndarray
    tokens: list[list[np.ndarray]]
    work: dict[str, Any]


class Drawing:
    """Draws a fixed list of prompts with any plan, in batches, and counts kept work on the way."""

    def __init__(self, pipe: Pipeline, prompts: list[str], batch: int, seed: int, **shape: Any):
        self.pipe = pipe
        self.schedule = resolve_schedule(pipe.model, **shape)
        self._decode = Bound(
            lambda: pipe.model.tokenizer,
            lambda model, codes: bsq_vae.to_uint8(model.decode(codes)),
        )
        dense = self.plan("dense")
        self.requests = [
            pipe.request(prompts[start : start + batch], plan=dense, seed=seed + start)
            for start in range(0, len(prompts), batch)
        ]

    def plan(self, text: str) -> Plan:
        """A plan by its text, with the model's guidance; "dense/xla" uses plain XLA attention."""
        name, _, implementation = text.partition("/")
        plan = resolve_plan(self.pipe.model, name, self.schedule)
        return with_implementation(plan, implementation) if implementation else plan

    def compile(self, plan: Plan) -> None:
        """Compile all steps of a plan; plans share those that are equal."""
        for request in {request.keys.shape[0]: request for request in self.requests}.values():
            self.pipe.generator.compile(plan, request.condition, request.keys.shape[0])

    def draw(self, plan: Plan) -> Drawn:
        """Pictures of all prompts, tokens of every scale by batch, and the work they took."""
        pictures, tokens, pairs = [], [], []
        for request in self.requests:
            kept, took = Kept(plan), [plan]
            outputs, code_sum = [], None
            steps = self.pipe.generator.steps(
                plan, request.condition, request.controls, request.keys, chosen=took.append
            )
            for index, (state, output) in enumerate(steps):
                if kept.plan != took[-1]:
                    kept = Kept(took[-1])
                kept.after(index, state.strategies)
                outputs.append(np.asarray(output.tokens))
                code_sum = state.code_sum
            pictures.append(np.asarray(self._decode(code_sum)))
            tokens.append(outputs)
            pairs.append(kept.density())
        density, density_all = np.mean(pairs, 0).tolist()
        work = {"density": density, "density_all": density_all}
        return Drawn(np.concatenate(pictures), tokens, work)

    def seconds(self, plan: Plan) -> dict[str, Any]:
        """Warm seconds of the last batch by scale, the device waited for after every one."""
        request, spent = self.requests[-1], []
        before = time.perf_counter()
        for state, _ in self.pipe.generator.steps(
            plan, request.condition, request.controls, request.keys
        ):
            jax.block_until_ready(state)
            spent.append(time.perf_counter() - before)
            before = time.perf_counter()
        return {"seconds": sum(spent), "seconds_by_scale": spent}


class Kept:
    """Kept pairs of a running plan: counted from the layer states where they depend on the data."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.pairs = {
            (index, layer): step.segment(layer).attention.pairs(plan.place(index, layer))
            * step.cached_rows(step.segment(layer))
            for index, step in enumerate(plan.steps)
            for layer in range(plan.depth)
        }

    def after(self, index: int, states: tuple[dict[str, jax.Array], ...]) -> None:
        """Count the next step's pairs from the state that step `index` left."""
        if index + 1 == len(self.plan.steps):
            return
        step = self.plan.steps[index + 1]
        for layer, state in enumerate(states):
            attention: Any = step.segment(layer).attention
            if hasattr(attention, "kept"):
                place = self.plan.place(index + 1, layer)
                pairs = float(_kept(state, attention=attention, place=place))
                self.pairs[index + 1, layer] = pairs * step.cached_rows(step.segment(layer))

    def density(self) -> tuple[float, float]:
        """Kept over dense pairs, in the last three scales and in all; see `Plan.density`."""
        plan, scales = self.plan, self.plan.schedule.scales
        found = []
        for first in (len(scales) - LAST_SCALES, 0):
            dense = sum(scale.tokens * scale.end for scale in scales[first:]) * plan.depth
            kept = sum(
                pairs
                for (index, _), pairs in self.pairs.items()
                if plan.steps[index].scale.index >= first
            )
            found.append(kept / (dense * plan.row_factor))
        return found[0], found[1]


def _kept_pairs(state, *, attention, place):
    return attention.kept(state, place)


_kept = jax.jit(_kept_pairs, static_argnames=("attention", "place"))
