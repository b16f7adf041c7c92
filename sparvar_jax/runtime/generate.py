"""The generation loop: one compiled step per scale, dispatched asynchronously.

A step takes the model, the condition and a donated state to the next state. Steps are traced once,
compiled ahead of time in parallel threads, and shared by every plan that contains an equal step.
`Generator.decode_scale` is the unit; `Generator.run` is a Python loop over it.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparvar_jax.models import sampling
from sparvar_jax.models.sampling import Controls
from sparvar_jax.plans import cache as kv_cache
from sparvar_jax.plans.plan import Plan
from sparvar_jax.runtime import programs
from sparvar_jax.runtime.compiling import compile_traced
from sparvar_jax.runtime.step import (
    ScaleOutput,
    State,
    StepSpec,
    draw_scale,
    empty_state,
    split_state,
    step_spec,
)

Progress = Callable[[str, int, int], None]
"""(stage, done, total): called while steps compile and while scales are dispatched."""


class Generator:
    """Compiles and runs the steps of plans for one model.

    model: an nnx transformer with Infinity's small surface. codebook: what turns tokens into codes
    where that needs weights (class-conditional VAR), else None.
    """

    def __init__(self, model: Any, codebook: Any = None):
        self.model = model
        self._leaves, self._treedef = jax.tree.flatten((model, codebook))
        self._outline = programs.outline(*filter(None, (model, codebook)))
        self._compiled: dict[Any, Future[Any]] = {}
        self._claiming = threading.Lock()
        self._programs: dict[Any, tuple[Any, ...]] = {}
        self._spare: dict[Any, tuple[kv_cache.LayerCache, ...]] = {}

    def start(self, plan: Plan, batch: int) -> State:
        """The state before the first scale.

        Cache buffers of an earlier generation of the same shape are used again. Nothing clears
        them: a step reads rows only after writing them.
        """
        spare = self._spare.pop(self._cache_shape(plan, batch), None)
        self.release()
        return empty_state(self.model, plan, batch, spare)

    def release(self) -> None:
        """Free the cache buffers kept for the next generation: one set, of the last shape drawn."""
        self._spare.clear()

    def compile(
        self,
        plan: Plan,
        condition: Any,
        batch: int,
        *,
        greedy: bool = False,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> tuple[Any, ...]:
        """The executables of a plan's steps; new ones are compiled in parallel threads.

        Plans may be compiled at once in several threads: a step they share is compiled once.
        """
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(condition))
        name = (plan, batch, greedy, shapes)
        if name not in self._programs:
            self._programs[name] = self._compile(
                plan, condition, batch, greedy=greedy, threads=threads, progress=progress
            )
        return self._programs[name]

    def _compile(
        self,
        plan: Plan,
        condition: Any,
        batch: int,
        *,
        greedy: bool,
        threads: int | None,
        progress: Progress | None,
    ) -> tuple[Any, ...]:
        controls, keys = _abstract_controls(len(plan.schedule), batch)
        state = jax.eval_shape(lambda: empty_state(self.model, plan, batch))
        condition = jax.tree.map(_abstract, condition)
        program, new = [], []
        with ThreadPoolExecutor(threads) as pool:
            for index in range(len(plan.steps)):
                spec = self._spec(plan, index, greedy=greedy)
                traced = self._trace(spec, condition, state, controls, keys, None)
                key = _signature(spec, condition, state)
                program.append(key)
                with self._claiming:
                    known = self._compiled.get(key)
                    if not _usable(known):
                        self._compiled[key] = pool.submit(self._compiling(spec, traced))
                        new.append(key)
                state = jax.tree.map(_abstract, traced.out_info[0])
            for done, key in enumerate(new, 1):
                self._compiled[key].result()
                if progress:
                    progress("compile", done, len(new))
        return tuple(self._compiled[key].result() for key in program)

    def decode_scale(
        self,
        plan: Plan,
        index: int,
        condition: Any,
        state: State,
        controls: Controls,
        keys: PRNGKeyArray,
        *,
        forced: Int[Array, "B T ..."] | None = None,
        greedy: bool = False,
        capture: bool = False,
    ) -> tuple[State, ScaleOutput]:
        """Draw one scale: the unit of generation and of every parity check. Donates `state`.

        forced: tokens to take instead of sampling. capture: also return the input, the hidden
        state after every block, raw and guided logits.
        """
        spec = self._spec(plan, index, greedy=greedy, capture=capture, forced=forced is not None)
        key = _signature(spec, condition, state, forced)
        known = self._compiled.get(key)
        if not _usable(known):
            traced = self._trace(spec, condition, state, controls, keys, forced)
            known = Future()
            known.set_result(self._compiling(spec, traced)())
            self._compiled[key] = known
        return self._call(known.result(), condition, state, controls, keys, forced)

    def steps(
        self,
        plan: Plan,
        condition: Any,
        controls: Controls,
        keys: PRNGKeyArray,
        *,
        greedy: bool = False,
        forced: tuple[jax.Array, ...] | None = None,
        capture: bool = False,
    ) -> Iterator[tuple[State, ScaleOutput]]:
        """Draw scale after scale.

        Read a yielded state before asking for the next one, and the last before the next
        generation: buffers are handed on.
        """
        batch = keys.shape[0]
        state = self.start(plan, batch)
        if forced is None and not capture:
            for compiled in self.compile(plan, condition, batch, greedy=greedy):
                state, output = self._call(compiled, condition, state, controls, keys, None)
                yield state, output
            self._keep_spare(plan, batch, state)
            return
        for index in range(len(plan.steps)):
            tokens = None if forced is None else forced[index]
            state, output = self.decode_scale(
                plan,
                index,
                condition,
                state,
                controls,
                keys,
                forced=tokens,
                greedy=greedy,
                capture=capture,
            )
            yield state, output
        self._keep_spare(plan, batch, state)

    def run(
        self, plan: Plan, condition: Any, controls: Controls, keys: PRNGKeyArray, **options
    ) -> tuple[Float[Array, "B height width Cd"], tuple[ScaleOutput, ...]]:
        """The final code sum and the output of every scale. Options as in `steps`."""
        outputs, code_sum = [], None
        for state, output in self.steps(plan, condition, controls, keys, **options):
            outputs.append(output)
            code_sum = state.code_sum
        assert code_sum is not None
        return code_sum, tuple(outputs)

    def _keep_spare(self, plan: Plan, batch: int, state: State) -> None:
        self._spare = {self._cache_shape(plan, batch): state.cache}

    def _cache_shape(self, plan: Plan, batch: int) -> tuple[int, int]:
        rows = 2 * batch if plan.steps[0].rows == "both" else batch
        return rows, plan.schedule.layout(plan.layout).total

    def _spec(self, plan: Plan, index: int, **options: bool) -> StepSpec:
        return step_spec(plan, index, logit_bound=self.model.config.logit_bound, **options)

    def _compiling(self, spec: StepSpec, traced: Any) -> Callable[[], Any]:
        """What makes the executable, in any thread: jax's settings here are in its key already."""
        file = programs.place(self._outline, spec, traced)
        return functools.partial(compile_traced, traced, file)

    def _call(self, compiled, condition, state, controls, keys, forced):
        donated, read = split_state(state)
        return compiled(self._leaves, condition, donated, read, controls, keys, forced)

    def _trace(self, spec, condition, state, controls, keys, forced):
        body = functools.partial(draw_scale, treedef=self._treedef, spec=spec)
        leaves = [_abstract(leaf) for leaf in self._leaves]
        donated, read = split_state(state)
        return jax.jit(body, donate_argnums=(2,)).trace(
            leaves, condition, donated, read, controls, keys, forced
        )


def controls(
    scales: int,
    *,
    guidance: float | tuple[float, ...] = 3.0,
    temperature: float | tuple[float, ...] = 0.5,
    top_p: float = 0.97,
    top_k: int = 0,
) -> Controls:
    """Sampling controls from Python numbers: one value for all scales, or one a scale.

    Raises ValueError for a wrong count or values out of range.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0 (0 keeps everything), got {top_k}")
    guide = _per_scale("guidance", guidance, scales)
    temper = _per_scale("temperature", temperature, scales)
    if min(temper) <= 0:
        raise ValueError(f"temperature must be positive, got {min(temper)}")
    return Controls(
        jnp.asarray(guide, jnp.float32),
        jnp.asarray(temper, jnp.float32),
        jnp.asarray(top_p, jnp.float32),
        jnp.asarray(top_k, jnp.int32),
    )


def _per_scale(name: str, value: float | tuple[float, ...], scales: int) -> tuple[float, ...]:
    listed = isinstance(value, tuple | list) or np.ndim(value)
    values = tuple(float(v) for v in value) if listed else (float(value),) * scales  # type: ignore
    if len(values) != scales:
        raise ValueError(f"{name} needs one value or {scales} (one a scale), got {len(values)}")
    if not all(math.isfinite(v) for v in values):
        raise ValueError(f"{name} must be finite, got {values}")
    return values


def _usable(job: Future[Any] | None) -> TypeGuard[Future[Any]]:
    """Whether a step is compiled or being compiled: one that failed is tried again."""
    return job is not None and not (job.done() and job.exception())


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _abstract_controls(scales: int, batch: int) -> tuple[Any, Any]:
    return (
        jax.eval_shape(lambda: controls(scales)),
        jax.eval_shape(lambda: sampling.image_keys(0, batch)),
    )


def _signature(spec: StepSpec, condition: Any, state: State, forced: Any = None) -> tuple:
    leaves = jax.tree.leaves((condition, state, forced))
    return spec, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
