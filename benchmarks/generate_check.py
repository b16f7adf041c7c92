"""Is what was timed right? The last scale again, layer by layer, without any kernel of ours.

The timed programs draw all scales. Before the last one, their state (the real cache, codes and
strategy state) is read for one image, and a second statement of the step, one plain XLA program a
kind of layer, computes what the timed program must then leave behind: the keys and values that
every layer writes, which depend on the attention of all layers before, and the tokens, which depend
on all of it. Pictures of a batch do not depend on each other, so the last image stands for all.
"""

from __future__ import annotations

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from benchmarks.generate_bench import Bench
from benchmarks.models import without_kernels
from benchmarks.tolerances import Tolerance, tolerance
from sparvar_jax.models import sampling
from sparvar_jax.models.family import Draw
from sparvar_jax.models.stream import Stream
from sparvar_jax.plans.attend import Attend
from sparvar_jax.plans.lean import Lean
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.served import with_implementation
from sparvar_jax.plans.stores import CacheShape, Full
from sparvar_jax.plans.strategy import AllTokens, View
from sparvar_jax.policies.per_head import PerHead
from sparvar_jax.runtime.state import pools

MISREAD_ROWS = 8


LayerRows = tuple[jax.Array, jax.Array]
"""Keys and values [R, H, rows, D] that one layer writes at one scale."""


@dataclasses.dataclass(frozen=True)
class Check:
    """How far the timed programs are from the reference.

    cache_error: largest relative error (Frobenius) of a layer's new keys or values. control_error:
    the same where the reference read cached keys 8 rows off: what the check would say of a step
    that misreads its cache. token_agreement: share of equal tokens.
    """

    cache_error: float
    control_error: float
    token_agreement: float
    tolerance: Tolerance

    @property
    def problem(self) -> str | None:
        """Why a row must not be believed, None where it may."""
        if not self.cache_error <= self.tolerance.cache:
            return f"keys and values differ from XLA by {self.cache_error:.3g}"
        if not self.token_agreement >= 1 - self.tolerance.tokens:
            return f"only {self.token_agreement:.3f} of the tokens equal those of XLA"
        if not self.control_error > self.tolerance.cache:
            return f"a misread cache would go unnoticed (error {self.control_error:.3g})"
        return None


def check(bench: Bench, plan: Plan) -> Check:
    """Compare the last scale of the programs that `bench.draw` runs with the reference.

    Raises ValueError for a plan of one scale, which reads no cache. Of a plan with a route the
    first one is checked: the others are its steps and those of plans that can be named.
    """
    plan = dataclasses.replace(plan, route=None)
    last, image = len(plan.steps) - 1, bench.batch - 1
    if not last:
        raise ValueError(f"the check needs a plan of at least two scales, got {plan.name}")
    reference = Reference(bench, plan, image)
    condition, plain, before = bench.condition(), bench.plain_condition, None
    for index, (state, output) in enumerate(bench.steps(plan, condition)):
        if index == last - 1:
            # The next step takes the state's buffers, so everything is computed before it.
            before = reference.both(image_of(plain, image, bench.batch), state)
        if index == last and before is not None:
            (expected, tokens), control = before
            written = reference.written(state)
            return Check(
                _difference(list(written.values()), [expected[layer] for layer in written]),
                _difference(control, expected),
                agreement(output.tokens[image], tokens[0]),
                tolerance(bench.parts),
            )
    raise AssertionError("the last step was not drawn")


def checkable(plan: Plan) -> bool:
    """Whether the reference can compute the last scale: all its tokens and rows, stored whole."""
    return all(
        (segment.tokens, segment.rows) == (AllTokens(), "all")
        and (segment.store == Full() or isinstance(segment.store, Lean))
        and not isinstance(segment.attention, PerHead)
        for segment in plan.steps[-1].segments
    )


def image_of(tree: Any, image: int, batch: int) -> Any:
    """The rows of one image in arrays that are led by images or by pairs of rows."""

    def rows(leaf: jax.Array) -> jax.Array:
        if leaf.shape[0] == batch:
            return leaf[image : image + 1]
        if leaf.shape[0] == 2 * batch:
            return leaf if batch == 1 else leaf[np.asarray([image, batch + image])]
        raise ValueError(f"an array of shape {leaf.shape} is not led by {batch} images")

    return jax.tree.map(rows, tree)


class Reference:
    """The last scale of a plan in plain XLA, for one image of a batch.

    It takes the state of the whole batch and reads that image's rows layer by layer: a copy of all
    of them does not fit beside the largest caches.
    """

    def __init__(self, bench: Bench, plan: Plan, image: int):
        self._index = index = len(plan.steps) - 1
        self._image_of = functools.partial(image_of, image=image, batch=bench.batch)
        self._stores, self._pools = [plan.store(n) for n in range(plan.depth)], pools(plan)
        plan = with_implementation(plan, "xla")
        self._model = model = without_kernels(bench.parts.transformer)
        self._step = plan.steps[index]
        bound = model.config.logit_bound
        self._place = dataclasses.replace(plan.place(index), logit_bound=bound)
        self._rows = self._step.row_factor
        self._controls, self._keys = bench.setting.controls, bench.keys[image : image + 1]
        self._codebook, self._how = bench.parts.codebook, bench.how
        self._layers: dict[Any, Any] = {}

    def both(self, condition: Any, state: Any) -> tuple[tuple[Any, jax.Array], list[LayerRows]]:
        """(new keys and values, tokens); and new keys and values where keys are misread."""
        codes = self._image_of(state.codes)
        x = _enter(self._model, codes, condition, place=self._place, rows=self._rows)
        self._compile(x, condition, state)
        written, x_out = self._run(x, condition, state, 0)
        control, _ = self._run(x, condition, state, MISREAD_ROWS)
        guided = self._step.merge_at == self._step.depth
        tokens = _leave(
            self._model, x_out, condition, self._controls, self._keys, self._codebook,
            place=self._place, guided=guided, how=self._how,
        )  # fmt: skip
        return (written, tokens), control

    def written(self, state: Any) -> dict[int, LayerRows]:
        """Layer -> what a program wrote at this scale, in the reference's shape.

        Of the layers that share a scratch the last one's rows are there; they depend on all layers.
        """
        pairs = {}
        for layer, store in enumerate(self._stores):
            lean = isinstance(store, Lean) and not store.in_place(self._place)
            if not lean or store not in self._stores[layer + 1 :]:
                held = state.shared[self._pools.index(store)] if lean else state.cache[layer]
                pairs[layer] = self._image_of(held)
        return {
            layer: (_rows(keys, self._place, self._rows), _rows(values, self._place, self._rows))
            for layer, (keys, values) in pairs.items()
        }

    def _arguments(self, layer: int, x: Any, condition: Any, state: Any, shift: int) -> tuple:
        kept, strategy = self._image_of((state.cache[layer], state.strategies[layer]))
        keys, values = _whole(
            kept, config=self._model.config, place=self._place, store=self._stores[layer]
        )
        inputs = self._model.block_inputs(layer, condition)
        cache = (jnp.roll(keys, shift, 2) if shift else keys), values
        positions = self._model.positions(condition, self._place)
        return self._model.blocks[layer], x, inputs, positions, cache, strategy

    def _compile(self, x: Any, condition: Any, state: Any) -> None:
        """One program a segment, in parallel: on a GPU each takes seconds."""
        with ThreadPoolExecutor() as pool:
            for segment in self._step.segments:
                arguments = self._arguments(segment.layers[0], x, condition, state, 0)
                lowered = _layer.lower(
                    *arguments, config=self._model.config, place=self._place,
                    attention=segment.attention,
                )  # fmt: skip
                self._layers[segment.layers] = pool.submit(lowered.compile)

    def _run(self, x: Any, condition: Any, state: Any, shift: int) -> tuple[list[LayerRows], Any]:
        written = []
        for layer in range(self._step.depth):
            program = self._layers[self._step.segment(layer).layers].result()
            x, new = program(*self._arguments(layer, x, condition, state, shift))
            written.append(new)
            if layer == self._step.merge_at and layer + 1 < self._step.depth:
                guidance = self._controls.guidance[self._index]
                x = jnp.concatenate([sampling.mix(x, guidance)] * 2)
        return written, x


@functools.partial(jax.jit, static_argnames=("config", "place", "store"))
def _whole(kept, *, config, place, store) -> View:
    """A layer's rows of earlier scales where attention looks for them."""
    if not isinstance(store, Lean):
        return View(*kept)
    rows = jax.tree.leaves(kept)[0].shape[0]
    shape = CacheShape(rows, config.heads, config.head_dim, config.precision.compute)
    return store.load(kept, store.shared(shape, (place.rows,)), rows, place)


@functools.partial(jax.jit, static_argnames=("place", "rows"))
def _enter(model, codes, condition, *, place, rows) -> Float[Array, "R T C"]:
    return model.add_level(model.embed_codes(codes, condition)[:rows], place)


@functools.partial(jax.jit, static_argnames=("config", "place", "attention"))
def _layer(block, x, inputs, positions, cache, state, *, config, place, attention):
    """The residual stream after one block, and the rows it writes into the cache."""
    written = []

    def attend(write):
        q, keys, values = write(*cache, place.rows.slot(place.index))
        written.extend((keys, values))
        return attention(View(keys, values), q.astype(keys.dtype), place, state).out

    x = block(Stream(x), inputs, positions, Attend(attend), config).settled()
    return x, tuple(_rows(array, place, x.shape[0]) for array in written)


@functools.partial(jax.jit, static_argnames=("place", "guided", "how"))
def _leave(
    model, x, condition, controls, keys, codebook, *, place, guided, how
) -> Shaped[Array, "B T ..."]:
    drawn = jax.vmap(jax.random.fold_in, (0, None))(keys, place.index)
    draw = Draw(controls, place.index, 1, drawn, how, guided, codebook=codebook)
    return model.finish(x, condition, place, draw).tokens


def agreement(ours: Shaped[Array, "T ..."], reference: Shaped[Array, "T ..."]) -> float:
    """Share of equal labels or ids; of mixtures the share whose heaviest code is the same."""
    if jnp.issubdtype(ours.dtype, jnp.floating):
        ours, reference = ours.argmax(-1), reference.argmax(-1)
    return float(jnp.mean(ours == reference))


def _rows(array: Float[Array, "Rk H S D"], place: Any, rows: int) -> Float[Array, "R H T D"]:
    return array[:rows, :, place.rows.rows(place.index)]


@jax.jit
def _relative(ours: Float[Array, "..."], reference: Float[Array, "..."]) -> Float[Array, ""]:
    ours, reference = ours.astype(jnp.float32), reference.astype(jnp.float32)
    return jnp.linalg.norm((ours - reference).ravel()) / jnp.linalg.norm(reference.ravel())


def _difference(ours: list[LayerRows], reference: list[LayerRows]) -> float:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)
    return float(np.max(np.asarray([_relative(a, b) for a, b in pairs])))
