"""One compiled step: the pure function that draws one scale, and everything static about it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparvar_jax.models import sampling
from sparvar_jax.models.layers import Stream
from sparvar_jax.plans import cache as kv_cache
from sparvar_jax.plans.plan import Plan, Step
from sparvar_jax.plans.strategy import Attention, Place


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What one scale hands to the next; its buffers are updated in place, so use it once.

    cache: keys and values of every layer. strategies: the layer state of every layer.
    code_sum: accumulated codes on the final latent grid. codes: the next scale's input codes.
    """

    cache: tuple[kv_cache.LayerCache, ...]
    strategies: tuple[dict[str, jax.Array], ...]
    code_sum: Float[Array, "B height width Cd"]
    codes: Float[Array, "B T N"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaleOutput:
    """What one scale drew. tokens: labels or ids. captured: inner arrays, if asked for."""

    tokens: Int[Array, "B T ..."]
    captured: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """Everything static about one compiled step. Equal specs share one executable."""

    step: Step
    place: Place
    following: int | None
    live: tuple[frozenset[str], ...]
    greedy: bool
    capture: bool
    forced: bool


def step_spec(
    plan: Plan,
    index: int,
    *,
    logit_bound: float | None = None,
    greedy: bool = False,
    capture: bool = False,
    forced: bool = False,
) -> StepSpec:
    """The static part of step `index` of a plan."""
    # Cache buffers begin as zeros, and every scale clears the rows after its own.
    place = dataclasses.replace(plan.place(index), logit_bound=logit_bound, hidden_finite=True)
    last = index + 1 == len(plan.steps)
    live = tuple(plan.live_after(index, layer) for layer in range(plan.depth))
    following = None if last else index + 1
    return StepSpec(plan.steps[index], place, following, live, greedy, capture, forced)


def empty_state(
    model: Any, plan: Plan, batch: int, cache: tuple[kv_cache.LayerCache, ...] | None = None
) -> State:
    """The state before the first scale: cache buffers, zeroed unless given; an empty code sum."""
    config = model.config
    rows = 2 * batch if plan.steps[0].rows == "both" else batch
    if cache is None:
        layout = plan.schedule.layout(plan.layout)
        dtype = config.precision.compute
        cache = kv_cache.allocate(config.depth, rows, config.heads, config.head_dim, layout, dtype)
    code_sum = type(model).start_codes(config, batch, plan.schedule)
    return State(cache, tuple({} for _ in range(config.depth)), code_sum, None)


@functools.partial(jax.jit, static_argnames=("apply_block", "config", "place", "attention"))
def _layer(
    block, stream, inputs, positions, cache, state, *, apply_block, config, place, attention
):
    """One block with its cache and strategy; jitted so that equal layers are traced once."""
    left: dict[str, Any] = {}

    def attend(write: kv_cache.Write) -> jax.Array:
        q, keys, values = write(cache[0], cache[1], place.layout.slot(place.index))
        out, update = _attend(q, keys, values, state, attention=attention, place=place)
        left.update(cache=(keys, values), state={**state, **update})
        return out

    stream = apply_block(config, block, stream, inputs, positions, attend)
    return stream, left["cache"], left["state"]


@functools.partial(jax.jit, static_argnames=("attention", "place"))
def _attend(q, keys, values, state, *, attention, place):
    """A strategy's attention; jitted so that layers of different structure lower it once."""
    return attention(q.astype(keys.dtype), keys, values, place, state)


def split_state(state: State) -> tuple[Any, Any]:
    """The buffers a step updates in place, to be donated, and what it only reads."""
    return (state.cache, state.code_sum), (state.strategies, state.codes)


def draw_scale(leaves, condition, donated, read, controls, keys, forced, *, treedef, spec):
    """Pure body of one compiled step; see `Generator.decode_scale`."""
    model, codebook = jax.tree.unflatten(treedef, leaves)
    (cache, code_sum), (strategies, codes) = donated, read
    state = State(cache, strategies, code_sum, codes)
    place, step, config = spec.place, spec.step, model.config
    batch = state.code_sum.shape[0]
    rows = 2 * batch if step.rows == "both" else batch
    captured: dict[str, jax.Array] = {}
    x = model.embed_codes(state.codes, condition)[:rows]
    captured["input"] = x
    stream = Stream(model.add_level(x, place))
    positions = model.positions(place)
    guidance = controls.guidance[place.index]
    caches, kept = [], []
    for layer in range(step.depth):
        attention: Attention = step.segment(layer).attention
        stream, cache, left = _layer(
            model.blocks[layer],
            stream,
            model.block_inputs(layer, condition),
            positions,
            state.cache[layer],
            state.strategies[layer],
            apply_block=type(model).apply_block,
            config=config,
            place=place,
            attention=attention,
        )
        caches.append(cache)
        kept.append({name: left[name] for name in sorted(spec.live[layer])})
        if layer == step.merge_at:
            mixed = sampling.mix(stream.settled(), guidance)
            stream = Stream(jnp.concatenate([mixed, mixed]))
        if spec.capture:
            captured[f"hidden.{layer}"] = stream.settled()
    x = stream.settled()
    on_logits = step.merge_at == step.depth
    raw = model.head_logits(x if on_logits or spec.capture else x[:batch], condition)
    tempered = raw / controls.temperature[place.index]
    guided = sampling.mix(tempered, guidance) if on_logits else tempered[:batch]
    captured |= {"raw_logits": raw, "guided_logits": guided}
    if spec.forced:
        tokens = forced
    else:
        drawn = None if spec.greedy else jax.vmap(jax.random.fold_in, (0, None))(keys, place.index)
        tokens = type(model).sample(config, guided, controls, drawn)
    scales = place.schedule.scales
    following = None if spec.following is None else scales[spec.following]
    code_sum, codes = type(model).accumulate(
        config, tokens, state.code_sum, place.scale, following, codebook
    )
    left_state = State(tuple(caches), tuple(kept), code_sum, codes)
    return left_state, ScaleOutput(tokens, captured if spec.capture else {})
