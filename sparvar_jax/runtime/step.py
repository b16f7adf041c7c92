"""One compiled step: the pure function that draws one scale, and everything static about it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparvar_jax.models import sampling
from sparvar_jax.models.family import Draw, How
from sparvar_jax.models.stream import Stream, updated
from sparvar_jax.plans.attend import Attend, HeadSplit
from sparvar_jax.plans.branch_rules import BranchRule
from sparvar_jax.plans.plan import Plan, Step
from sparvar_jax.plans.stores import Store, Write
from sparvar_jax.plans.strategy import KEPT, AllTokens, DrawsSome, Place, Watches
from sparvar_jax.runtime.branches import Around, by_row
from sparvar_jax.runtime.state import ScaleOutput, State, pools


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """Everything static about one compiled step. Equal specs share one executable.

    places, stores: of every layer. keep: the state entries of every layer that are read later.
    pools: the stores that share buffers, each once.
    """

    step: Step
    places: tuple[Place, ...]
    stores: tuple[Store, ...]
    pools: tuple[Store, ...]
    keep: tuple[frozenset[str], ...]
    following: int | None
    how: How = "sample"
    capture: bool = False
    forced: bool = False

    @functools.cached_property
    def _hash(self) -> int:
        named = (self.following, self.how, self.capture, self.forced)
        return hash((self.step, self.places[0], self.keep[0], *named))

    def __hash__(self) -> int:
        return self._hash


def step_spec(
    plan: Plan, index: int, *, logit_bound: float | None = None, **options: Any
) -> StepSpec:
    """The static part of step `index` of a plan. options: `how`, `capture`, `forced`."""
    layers = range(plan.depth)
    # Cache buffers begin as zeros, and every scale clears the rows after its own.
    known = {"logit_bound": logit_bound, "hidden_finite": True}
    unique: dict[Place, Place] = {}
    places = tuple(
        unique.setdefault(place, place)
        for place in (dataclasses.replace(plan.place(index, layer), **known) for layer in layers)
    )
    return StepSpec(
        plan.steps[index],
        places,
        tuple(plan.store(layer) for layer in layers),
        pools(plan),
        tuple(plan.live_after(index, layer) for layer in layers),
        None if index + 1 == len(plan.steps) else index + 1,
        **options,
    )


@functools.partial(jax.jit, static_argnames=("config", "place", "segment", "store", "heads"))
def _layer(
    block, stream, inputs, positions, kept, shared, state, *, config, place, segment, store, heads
):
    """One block with its cache and strategy; jitted so that equal layers are traced once.

    segment: with layers (0, 0), so that layers of different segments share a trace.
    """
    left: list[Any] = []
    around = Around.of(segment, place, state)

    def attend(write: Write) -> jax.Array:
        q, held = store.write(kept, shared, write, place)
        view = store.view(held, place)
        output = _attend(q, view, state, attention=segment.attention, place=place)
        out, found = output.out, output.state
        if jax.tree.leaves(shared):
            # What is read of the view for later scales is read before the next layer's rows replace
            # it; left to a scheduler, it is read whenever, from a copy of the scratch a layer.
            out, found = jax.lax.optimization_barrier((out, found))
        left.extend((*store.keep(held, q, place), {**state, **found}, dict(output.report)))
        return out

    stream = block(stream, inputs, positions, Attend(attend, heads, around), config)
    if around is not None:
        around.leave(left[2], left[3])
    return stream, left


@functools.partial(jax.jit, static_argnames=("attention", "place"))
def _attend(q, view, state, *, attention, place):
    """A strategy's attention; jitted so that layers of different structure lower it once."""
    return attention(view, q.astype(view.k.dtype), place, state)


def draw_scale(
    parameters, condition, donated, read, controls, keys, forced, *, treedef, spec, heads, guidance
):
    """Pure body of one compiled step; see `Generator.decode_scale`.

    heads: with `tokens` set, devices divide the tokens of the blocks. guidance: the mesh axis along
    which a device has either the conditional or the unconditional rows, see `Plan.apart`.
    """
    model, codebook = jax.tree.unflatten(treedef, parameters)
    (cache, shared, code_sum), (strategies, codes) = donated, read
    step, place, batch = spec.step, spec.places[0], code_sum.shape[0]
    rows = batch * (step.row_factor if guidance is None else 1)
    body = _Body(model, condition, spec, heads, controls.guidance[place.index], codes)
    x = model.embed_codes(codes, condition)[:rows]
    left = _Left(list(cache), list(shared), [dict(state) for state in strategies])
    captured, x = {"input": x}, model.add_level(x, place)
    stream = Stream(heads.own_tokens(x))
    for segment in step.segments:
        stream = body.segment(segment, stream, left, captured)
    # The head and the draws of all tokens are a thousandth of the work: every device makes all.
    x = heads.all_tokens(stream.settled())
    if guidance is not None:  # of the condition only what the head reads is gathered
        x, condition, captured = _all_rows((x, condition, captured), guidance)
    drawn_keys = None
    if spec.how != "greedy":
        drawn_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, place.index)
    guided = step.merge_at == step.depth
    asked = (drawn_keys, spec.how, guided, spec.capture, forced, codebook)
    draw = Draw(controls, place.index, batch, *asked)
    drawn = model.finish(x, condition, place, draw)
    if left.counted is not None:
        drawn = drawn._replace(counted=left.counted)
    scales = place.schedule.scales
    following = None if spec.following is None else scales[spec.following]
    code_sum, codes = model.accumulate(drawn, code_sum, place.scale, following, codebook)
    state = State(tuple(left.cache), tuple(left.shared), tuple(left.states), code_sum, codes)
    shown = captured | drawn.captured if spec.capture else {}
    return state, ScaleOutput(drawn.tokens, shown, tuple(left.reports))


@dataclasses.dataclass
class _Left:
    """What the layers of a step leave behind, filled while it is traced.

    counted: the tokens whose codes count, None for all of them.
    """

    cache: list[Any]
    shared: list[Any]
    states: list[dict[str, jax.Array]]
    reports: list[dict[str, jax.Array]] = dataclasses.field(default_factory=list)
    counted: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class _Body:
    """The layers of one step."""

    model: Any
    condition: Any
    spec: StepSpec
    heads: HeadSplit
    guidance: Float[Array, ""]
    codes: Float[Array, "B T N"] | None

    def segment(self, segment: Any, stream: Stream, left: _Left, captured: dict) -> Stream:
        """The residual stream after a segment: its tokens are selected, run, and restored."""
        last = segment.layers[1] - 1
        if segment.rows == "cond":
            before = stream.settled()
            batch = len(before) // 2
            x = self.tokens(segment, Stream(before[:batch]), left, captured).settled()
            update = x.astype(jnp.float32) - before[:batch]
            stream = Stream(jnp.concatenate([x, updated(before[batch:], update)]))
        else:
            stream = self.tokens(segment, stream, left, captured)
        if last == self.spec.step.merge_at:
            mixed = sampling.mix(stream.settled(), self.guidance).astype(stream.x.dtype)
            stream = Stream(jnp.concatenate([mixed, mixed]))
        if self.spec.capture:
            captured[f"hidden.{last}"] = self.heads.all_tokens(stream.settled())
        return stream

    def tokens(self, segment: Any, stream: Stream, left: _Left, captured: dict) -> Stream:
        """The stream after a segment's layers, of the tokens that its rule runs and the others."""
        first, last = segment.layers[0], segment.layers[1] - 1
        place, entry = self.spec.places[first], left.states[first]
        rule = segment.tokens
        positions = self.model.positions(self.condition, place)
        kept, before, heads = None, stream.x, self.heads
        if isinstance(rule, BranchRule):
            # It looks at all tokens in every branch, so every device has them here.
            stream, heads = Stream(heads.all_tokens(stream.settled())), heads.over(None)
        elif not isinstance(rule, AllTokens):
            before = heads.all_tokens(stream.settled())
            kept = rule.select(before, self.codes, place, entry)
            if isinstance(rule, Watches):
                seen = rule.watch(before, self.codes, place)
                left.states[first] |= {n: seen[n] for n in seen if n in self.spec.keep[first]}
        if kept is not None:
            heads = heads if heads.tokens is None else heads.over(kept.shape[1])
            stream = Stream(heads.own_tokens(_take(before, kept)))
            rows = len(before)
            positions = jax.tree.map(lambda table: _take(by_row(table)[:rows], kept), positions)
        for layer in range(first, last + 1):
            stream = self.layer(layer, segment, stream, positions, heads, left, kept)
            if self.spec.capture and layer != last:
                captured[f"hidden.{layer}"] = heads.all_tokens(stream.settled())
        if kept is None:
            return (
                stream if heads == self.heads else Stream(self.heads.own_tokens(stream.settled()))
            )
        after = heads.all_tokens(stream.settled())
        x, more = segment.tokens.restore(before, after, kept, place, entry)
        left.states[first] |= {n: more[n] for n in more if n in self.spec.keep[first]}
        if isinstance(rule, DrawsSome):
            halves = 1 if "cond" in (segment.rows, self.spec.step.rows) else 2
            left.counted = rule.drawn(kept, place, len(before) // halves)
        return Stream(self.heads.own_tokens(x))

    def layer(
        self,
        layer: int,
        segment: Any,
        stream: Stream,
        positions: Any,
        heads: HeadSplit,
        left: _Left,
        kept: Any,
    ) -> Stream:
        """The residual stream after one block. kept: the tokens that run, None for all."""
        store = self.spec.stores[layer]
        pool = self.spec.pools.index(store)
        chosen = {} if kept is None else {KEPT: kept}
        stream, (kept, shared, state, report) = _layer(
            self.model.blocks[layer],
            stream,
            self.model.block_inputs(layer, self.condition),
            positions,
            left.cache[layer],
            left.shared[pool],
            {**left.states[layer], **chosen},
            config=self.model.config,
            place=self.spec.places[layer],
            segment=dataclasses.replace(segment, layers=(0, 0)),
            store=store,
            heads=heads,
        )
        left.cache[layer], left.shared[pool] = kept, shared
        keep = sorted(self.spec.keep[layer])
        left.states[layer] = {name: state[name] for name in keep if name in state}
        left.reports.append(report)
        return stream


def _all_rows(tree: Any, axis: str) -> Any:
    """Arrays with the rows of all devices along an axis: the conditional ones come first."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis, axis=0, tiled=True), tree)


def _take(x: Float[Array, "... T C"], kept: Int[Array, "R T2"]) -> Float[Array, "R T2 C"]:
    """The kept tokens of every row."""
    return jnp.take_along_axis(x, kept[..., None], axis=1)
