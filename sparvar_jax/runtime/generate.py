"""The generation loop: one compiled step per scale, dispatched asynchronously.

A step takes weights, the condition and a donated state to the next state. `Generator.decode_scale`
is the unit; `Generator.run` is a Python loop over it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sparvar_jax.models.family import Forced, How, ScaleModel
from sparvar_jax.models.sampling import Controls
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.route import Decode, Route
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.runtime.controls import controls
from sparvar_jax.runtime.devices import Devices, PlacedWeights
from sparvar_jax.runtime.parameters import Parameters
from sparvar_jax.runtime.placement import Placement
from sparvar_jax.runtime.pool import CachePool
from sparvar_jax.runtime.progress import Progress
from sparvar_jax.runtime.state import ScaleOutput, State, empty_state
from sparvar_jax.runtime.steps import Steps

__all__ = ["Generator", "Progress", "ScaleOutput", "State", "controls"]


class Generator:
    """Runs plans with one model.

    model: a transformer, see `ScaleModel`. codebook: what turns tokens into codes where that needs
    weights (class-conditional VAR), else None. Their weights are read when a generation starts:
    what is changed in place, or set as `model`, shows in the next picture.
    placement: a mesh, or devices whose mesh suits every generation; None is the default device.
    decode: what plans with a route look at pictures with, called with arrays.
    """

    def __init__(
        self,
        model: ScaleModel,
        codebook: Any = None,
        placement: Placement | Devices | None = None,
        decode: Decode | None = None,
    ):
        self.model, self.codebook, self.placement = model, codebook, placement
        self.decode = decode
        self._steps: Steps | None = None
        self._on_mesh: dict[Placement | None, Steps] = {}
        self._structure: Any = None
        self._pool, self._parameters = CachePool(), Parameters()
        self._reading = threading.Lock()
        self._weights = None if placement is None else PlacedWeights(placement)

    def start(self, plan: Plan, batch: int) -> State:
        """The state before the first scale.

        Cache buffers of an earlier generation of the same shape are used again. Nothing clears
        them: a step reads rows only after writing them.
        """
        buffers = self._pool.take(self._cache_name(plan, batch))
        if buffers is None:
            return self._fresh(plan, batch)
        return self.current(batch, plan)[0].again(plan, batch, buffers)

    def _fresh(self, plan: Plan, batch: int) -> State:
        """The state before the first scale, in new buffers."""
        placement = self.place(batch, plan)
        if placement is None:
            return empty_state(self.model, plan, batch)
        shapes = jax.eval_shape(lambda: empty_state(self.model, plan, batch))
        where = jax.tree.map(lambda leaf: leaf.sharding, placement.state(shapes))
        return jax.jit(lambda: empty_state(self.model, plan, batch), out_shardings=where)()

    def place(self, batch: int, plan: Plan) -> Placement | None:
        """The mesh on which a plan draws so many pictures; None is the default device.

        Raises ValueError where pictures or heads cannot be divided.
        """
        if self.placement is None:
            return None
        return self.placement.place(batch, self.model.config.heads, plan)

    def release(self) -> None:
        """Free the cache buffers kept for the next generation: one set, of the last shape drawn."""
        self._pool.release()

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

        Of a plan with a route, those of every plan that may go on are compiled too.
        """
        steps, _ = self.current(batch, plan)
        options: Any = {"how": how, "threads": threads, "progress": progress}
        return _compiled(steps, plan, condition, batch, **options)

    def decode_scale(
        self,
        plan: Plan,
        index: int,
        condition: Any,
        state: State,
        controls: Controls,
        keys: Key[Array, "B"],
        *,
        forced: Forced | jax.Array | None = None,
        how: How = "sample",
        capture: bool = False,
    ) -> tuple[State, ScaleOutput]:
        """Draw one scale: the unit of generation and of every parity check. Donates `state`.

        condition, keys, forced: of all pictures, in the order that one device takes; a placement
        lays them out. state: of `start`. forced: tokens to take instead of sampling. capture: also
        return the input, the hidden state after every block, raw and guided logits.
        """
        steps, parameters = self.current(len(keys), plan)
        condition, controls, keys = steps.placed(condition, controls, keys)
        forced = _placed_tokens(steps.placement, forced)
        spec = steps.spec(plan, index, how=how, capture=capture, forced=forced is not None)
        executable = steps.executable(spec, condition, state, controls, keys, forced)
        return steps.run(executable, parameters, condition, state, controls, keys, forced)

    def steps(
        self,
        plan: Plan,
        condition: Any,
        controls: Controls,
        keys: Key[Array, "B"],
        *,
        how: How = "sample",
        forced: Sequence[Forced | jax.Array] | None = None,
        capture: bool = False,
        chosen: Callable[[Plan], None] | None = None,
    ) -> Iterator[tuple[State, ScaleOutput]]:
        """Draw scale after scale.

        Read a yielded state before asking for the next one, and the last before the next
        generation: buffers are handed on. chosen: told which plan a route took.
        """
        batch = keys.shape[0]
        steps, parameters = self.current(batch, plan)
        condition, controls, keys = steps.placed(condition, controls, keys)
        name = self._cache_name(plan, batch)
        spare = self._pool.take(name)
        state = self._fresh(plan, batch) if spare is None else steps.again(plan, batch, spare)
        ahead: Any = None
        if forced is None and not capture:
            ahead = _compiled(steps, plan, condition, batch, how=how)
        route, earlier = plan.route, state.code_sum
        for index in range(len(plan.schedule)):
            if index == len(plan.steps):
                break
            tokens = None if forced is None else _placed_tokens(steps.placement, forced[index])
            if ahead is None:
                spec = steps.spec(plan, index, how=how, capture=capture, forced=tokens is not None)
                executable = steps.executable(spec, condition, state, controls, keys, tokens)
            else:
                executable = ahead[index]
            state, output = steps.run(
                executable, parameters, condition, state, controls, keys, tokens
            )
            if route is not None and index == route.after - 1:
                earlier = jnp.copy(state.code_sum)  # the next step takes the buffer
            if route is not None and index == route.after:
                plan = self._chosen(route, plan.schedule, earlier, state.code_sum)
                ahead = ahead and steps.compile(plan, condition, batch, how=how)
                if chosen is not None:
                    chosen(plan)
            yield state, output
        self._pool.keep(name, (state.cache, state.shared))

    def run(
        self, plan: Plan, condition: Any, controls: Controls, keys: Key[Array, "B"], **options: Any
    ) -> tuple[Float[Array, "B height width Cd"], tuple[ScaleOutput, ...]]:
        """The final code sum and the output of every scale. Options as in `steps`."""
        outputs, code_sum = [], None
        for state, output in self.steps(plan, condition, controls, keys, **options):
            outputs.append(output)
            code_sum = state.code_sum
        assert code_sum is not None
        return code_sum, tuple(outputs)

    def _chosen(
        self, route: Route, schedule: ScaleSchedule, before: jax.Array, now: jax.Array
    ) -> Plan:
        """The plan that goes on, by what is seen of the pictures so far."""
        if self.decode is None:
            raise ValueError(
                f"the plan chooses by {route.chooser.name}, which looks at pictures: give the "
                "generator `decode`, as a pipeline does"
            )
        features = route.chooser.features(before, now, schedule, self.decode)
        return route.plans[route.pick(features)]

    def current(self, batch: int, plan: Plan) -> tuple[Steps, list[Any]]:
        """(steps for the model's structure as it is now, its weights as they are now).

        batch, plan: pictures and what draws them, which decide the mesh.
        """
        placement = self.place(batch, plan)
        with self._reading:
            parameters, structure = self._parameters.read((self.model, self.codebook))
            if structure is not self._structure:
                self._on_mesh, self._structure = {}, structure
            if placement not in self._on_mesh:
                self._on_mesh[placement] = Steps((self.model, self.codebook), placement)
            self._steps = steps = self._on_mesh[placement]
            if self._weights is not None:
                parameters = self._weights.of(parameters)
            return steps, parameters

    def _cache_name(self, plan: Plan, batch: int) -> Any:
        """What tells cache buffers apart that do not fit each other."""
        kept = tuple((plan.whole_rows(layer), plan.store(layer)) for layer in range(plan.depth))
        where = self.place(batch, plan)
        return batch * plan.row_factor, kept, self.model.config.precision, where


def _compiled(steps: Steps, plan: Plan, condition: Any, batch: int, **options: Any) -> Any:
    """The executables of a plan, once those of plans that its route may take are there as well."""
    if plan.route is not None:
        for other in plan.route.plans[1:]:
            steps.compile(other, condition, batch, **options)
    return steps.compile(plan, condition, batch, **options)


def _placed_tokens(placement: Placement | None, tokens: Forced | jax.Array | None) -> Forced | None:
    if tokens is not None and not isinstance(tokens, Forced):
        tokens = Forced(tokens)
    return tokens if placement is None else placement.put_rows(tokens)
