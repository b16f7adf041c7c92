"""How much device memory a generation needs, from shapes alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparvar_jax.pipelines.loading import Model
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.rows import Slot
from sparvar_jax.plans.stores import CacheShape, Store, Writes
from sparvar_jax.plans.strategy import Place
from sparvar_jax.runtime.step import empty_buffers, pools
from sparvar_jax.weights import checkpoint

_DECODER_MAPS = 4  # a residual block holds its input, its branch and two temporaries


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes by use. The largest of `step` and `decode` comes on top of weights and cache."""

    weights: dict[str, int]
    cache: int
    step: int
    decode: int

    @property
    def peak(self) -> int:
        return sum(self.weights.values()) + self.cache + max(self.step, self.decode)

    @property
    def peak_text_freed(self) -> int:
        """The peak where the text encoder runs first and is freed."""
        text = self.weights.get("text", 0)
        return max(text, self.peak - text)


def estimate(model: Model, plan: Plan, batch: int) -> Estimate:
    """What drawing `batch` pictures with a plan holds at once; `model` may be abstract.

    step: the widest activations of the largest scale. decode: the tokenizer's maps at full size.
    XLA's own workspace is not counted.
    """
    config, picture = model.transformer.config, model.tokenizer.config
    item = np.dtype(config.precision.compute).itemsize
    shape = CacheShape(
        batch * plan.row_factor, config.heads, config.head_dim, config.precision.compute
    )
    tokens = max(step.scale.tokens * step.row_factor for step in plan.steps)
    # The residual stream and its norm in float32, and the feed-forward layer beside its input.
    widest = 2 * 4 * config.width + (config.mlp_width + config.width) * item
    pixels = math.prod(plan.schedule.final) * model.stride**2
    weights = {
        part: parameter_bytes(checkpoint.abstract_parameters(module))
        for part, module in model.parts.items()
    }
    return Estimate(
        weights,
        cache_bytes(plan, shape),
        batch * tokens * widest,
        _DECODER_MAPS * 4 * batch * pixels * picture.full_width,
    )


def cache_bytes(plan: Plan, shape: CacheShape) -> int:
    """Most bytes of the key/value caches before the first scale or after any, shared buffers once.

    The buffers that one generation leaves for the next are the same or are freed first.
    """
    kept, shared = jax.eval_shape(lambda: empty_buffers(plan, shape))
    left = {(plan.store(layer), plan.whole_rows(layer)): kept[layer] for layer in range(plan.depth)}
    sizes = [_bytes(kept)]
    for index in range(len(plan.steps)):
        after: dict[Any, Any] = {}
        total = 0
        for layer in range(plan.depth):
            name = plan.store(layer), plan.whole_rows(layer)
            if name not in after:
                pool = shared[pools(plan).index(plan.store(layer))]
                work = functools.partial(_scale, place=plan.place(index, layer), store=name[0])
                after[name] = jax.eval_shape(work, left[name], pool)
            total += _bytes(after[name])
        sizes.append(total)
        left = after
    return max(sizes) + _bytes(shared)


def _scale(kept: Any, shared: Any, *, place: Place, store: Store) -> Any:
    """What a store keeps after a scale of nothing but zeros."""
    found: list[jax.Array] = []

    def write(k: jax.Array, v: jax.Array, slot: Slot) -> tuple[jax.Array, jax.Array, jax.Array]:
        found[:] = [jnp.zeros((*k.shape[:2], place.queries, k.shape[3]), k.dtype)]
        return found[0], k, v

    q, held = store.write(kept, shared, Writes(write, lambda: found[0]), place)
    return store.keep(held, q, place)[0]


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def parameter_bytes(shapes: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Bytes of all parameters in their dtypes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes.values())
