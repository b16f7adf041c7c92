"""Steps of plans, traced once and compiled ahead of time; weights are arguments of every call."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from sparvar_jax.models import sampling
from sparvar_jax.models.family import Forced, How
from sparvar_jax.models.sampling import Controls
from sparvar_jax.plans.attend import HeadSplit
from sparvar_jax.plans.plan import Plan
from sparvar_jax.runtime import programs
from sparvar_jax.runtime.compiling import compile_traced
from sparvar_jax.runtime.controls import controls
from sparvar_jax.runtime.devices import PlacedWeights
from sparvar_jax.runtime.placement import Placement
from sparvar_jax.runtime.progress import Progress
from sparvar_jax.runtime.settings import fixed
from sparvar_jax.runtime.state import ScaleOutput, State, empty_state, split_state
from sparvar_jax.runtime.step import StepSpec, draw_scale, step_spec


@dataclasses.dataclass(frozen=True)
class _Job:
    """A step that was traced: its executable, soon, and the state it leaves, as shapes."""

    executable: Future[Any]
    left: Any

    @property
    def usable(self) -> bool:
        """Whether it is compiled or being compiled: one that failed is tried again."""
        return not (self.executable.done() and self.executable.exception())


class Steps:
    """Compiles the steps of plans for models of one structure, and runs them.

    outline: (model, codebook), of which only structure and shapes are kept. Plans that share a
    step share its trace and its executable.
    """

    def __init__(self, outline: Any, placement: Placement | None = None):
        shapes, self._treedef = jax.tree.flatten(shapes_of(outline))
        self.model, _ = outline = jax.tree.unflatten(self._treedef, shapes)
        self.placement = placement
        self._shapes = placement.parameters(shapes) if placement else shapes
        self._text = programs.outline(*(part for part in outline if part is not None))
        self._jobs: dict[Any, _Job] = {}
        self._plans: dict[Any, tuple[Any, ...]] = {}
        self._blanks: dict[Any, Callable[[], jax.Array]] = {}
        self._controls = placement and PlacedWeights(placement)
        self._tracing = threading.RLock()

    def compile(
        self,
        plan: Plan,
        condition: Any,
        batch: int,
        *,
        how: How = "sample",
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> tuple[Any, ...]:
        """The executables of a plan's steps; new ones are compiled in parallel threads.

        condition: arrays or shapes. Plans may be compiled at once in several threads.
        """
        if self.placement:
            self.placement.check(batch, self.model.config.heads)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(condition))
        name = (plan, batch, how, shapes)
        if name not in self._plans:
            jobs, new = self._start_jobs(plan, condition, batch, how, threads)
            for done, job in enumerate(new, 1):
                job.executable.result()
                if progress:
                    progress("compile", done, len(new))
            self._plans[name] = tuple(job.executable.result() for job in jobs)
        return self._plans[name]

    def _start_jobs(
        self, plan: Plan, condition: Any, batch: int, how: How, threads: int | None
    ) -> tuple[list[_Job], list[_Job]]:
        """(jobs of all steps, those that are new), which go on in threads."""
        state = self._placed(jax.eval_shape(lambda: empty_state(self.model, plan, batch)))
        inputs = self._inputs(condition, *_abstract_controls(len(plan.schedule), batch), None)
        jobs, new, pool = [], [], ThreadPoolExecutor(threads)
        for index in range(len(plan.steps)):
            spec = self.spec(plan, index, how=how)
            job, known = self._job(spec, inputs, state, pool.submit)
            jobs.append(job)
            new += [] if known else [job]
            state = job.left
        pool.shutdown(wait=False)
        return jobs, new

    def executable(
        self,
        spec: StepSpec,
        condition: Any,
        state: State,
        controls: Controls,
        keys: jax.Array,
        forced: Forced | None = None,
    ) -> Any:
        """The executable of one step for arguments like these; compiled here if it is new."""
        inputs = self._inputs(condition, controls, keys, forced)

        def at_once(work: Callable[[], Any]) -> Future[Any]:
            done: Future[Any] = Future()
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)
            return done

        job, _ = self._job(spec, inputs, self._placed(state), at_once)
        return job.executable.result()

    def run(
        self,
        executable: Any,
        parameters: Any,
        condition: Any,
        state: State,
        controls: Controls,
        keys: jax.Array,
        forced: Forced | None = None,
    ) -> tuple[State, ScaleOutput]:
        """Draw one scale with the weights given. Donates `state`."""
        donated, read = split_state(state)
        state, output = executable(parameters, condition, donated, read, controls, keys, forced)
        return state, self.placement.ordered(output, len(keys)) if self.placement else output

    def spec(self, plan: Plan, index: int, **options: Any) -> StepSpec:
        """The static part of a step for this model. options: as in `step_spec`.

        Raises ValueError where a mesh cannot put together what the model captures.
        """
        parts = self.placement.row_parts if self.placement else 1
        if options.get("capture") and parts > 1 and not getattr(self.model, "captures_rows", True):
            raise ValueError(
                f"inner arrays of {type(self.model).__name__} are not all led by pictures, which "
                f"{parts} devices divide: they can be captured on one device, or on a mesh that "
                "leaves pictures whole"
            )
        return step_spec(plan, index, logit_bound=self.model.config.logit_bound, **options)

    def again(self, plan: Plan, batch: int, buffers: tuple[Any, Any]) -> State:
        """The state before the first scale, in the buffers of an earlier generation."""
        name = batch, plan.schedule
        if name not in self._blanks:
            start = functools.partial(self.model.start_codes, *name)
            shape: Any = jax.eval_shape(start)
            where = self.placement.by_rows(shape).sharding if self.placement else None
            self._blanks[name] = jax.jit(start, out_shardings=where)
        return empty_state(self.model, plan, batch, buffers, self._blanks[name]())

    def placed(self, condition: Any, controls: Controls, keys: jax.Array) -> tuple[Any, ...]:
        """What a generation is given, where steps expect it; controls as before are there."""
        if self.placement is None or self._controls is None:
            return condition, controls, keys
        with self._tracing:
            leaves, treedef = jax.tree.flatten(controls)
            controls = jax.tree.unflatten(treedef, self._controls.of(leaves))
        groups = jax.tree.leaves(condition)[0].shape[0] // len(keys)
        put = self.placement.put_rows
        return put(condition, groups), controls, put(keys)

    def _job(self, spec: StepSpec, inputs: Any, state: Any, submit: Any) -> tuple[_Job, bool]:
        """(the job of a step, whether it was there). One is traced at a time."""
        key = (spec, _names((inputs, state)))
        with self._tracing:
            known = self._jobs.get(key)
            if known is not None and known.usable:
                return known, True
            traced = self._trace(spec, inputs, state)
            file = None if self.placement else programs.place(self._text, spec, traced)
            left = self._placed(traced.out_info[0])
            # jax's settings of this thread are in the trace already.
            job = _Job(submit(functools.partial(compile_traced, traced, file)), left)
            self._jobs[key] = job
            return job, False

    def _trace(self, spec: StepSpec, inputs: Any, state: Any) -> Any:
        condition, controls, keys, forced = inputs
        heads = self._heads(spec, len(keys))
        guidance = self.placement.guidance if self.placement else None
        body = functools.partial(
            draw_scale, treedef=self._treedef, spec=spec, heads=heads, guidance=guidance
        )
        if self.placement:
            body = self.placement.wrap(body)
        donated, read = split_state(state)
        with fixed():
            return jax.jit(body, donate_argnums=(2,)).trace(
                self._shapes, condition, donated, read, controls, keys, forced
            )

    def _heads(self, spec: StepSpec, batch: int) -> HeadSplit:
        """How heads, and tokens where that pays, lie over devices in a step."""
        if not self.placement:
            return HeadSplit()
        tokens, heads = spec.step.scale.tokens, self.placement.head_split
        divided = self.placement.divides(self.model, tokens, batch * spec.step.row_factor)
        return heads.over(tokens) if divided else heads

    def _placed(self, state: State) -> State:
        """A state as shapes, on the devices where steps expect it."""
        return self.placement.state(state) if self.placement else shapes_of(state)

    def _inputs(self, condition: Any, controls: Any, keys: Any, forced: Any) -> tuple[Any, ...]:
        """What a step takes besides weights and state, as shapes where steps expect it."""
        if self.placement:
            condition = self.placement.conditions(condition)
            return (
                condition,
                self.placement.parameters(controls),
                *self.placement.by_rows((keys, forced)),
            )
        return shapes_of((condition, controls, keys, forced))


def shapes_of(tree: Any) -> Any:
    """Shapes and dtypes in place of arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _abstract_controls(scales: int, batch: int) -> tuple[Any, Any]:
    return (
        jax.eval_shape(lambda: controls(scales)),
        jax.eval_shape(lambda: sampling.image_keys(0, batch)),
    )


def _names(tree: Any) -> tuple[Any, ...]:
    """Tells apart what must not share an executable."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
