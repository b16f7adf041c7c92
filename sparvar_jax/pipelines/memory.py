"""How much device memory a generation needs, from shapes alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparvar_jax.models.groups import PICTURE, at_once
from sparvar_jax.pipelines.decoding import pictures_at_once
from sparvar_jax.pipelines.loading import Model
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.rows import Slot
from sparvar_jax.plans.stores import CacheShape, Store, Writes
from sparvar_jax.plans.strategy import Place
from sparvar_jax.runtime.state import empty_buffers, pools
from sparvar_jax.weights import checkpoint

_DECODER_MAPS = 4  # a residual block holds its input, its branch and two temporaries
_WIDE = 3  # the norm of the residual stream, a branch and what a product leaves
_ATTENDING = 4  # queries, keys and values as a product leaves them, and queries with their places
_LOGITS = 2 * 4  # bytes: raw float32 logits of a row, guided ones and what filters make of them


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes by use; `step` with `condition`, or `decode`, comes on top of weights and cache.

    condition: what every step reads of prompts or classes; it is freed before the decoder runs.
    """

    weights: dict[str, int]
    cache: int
    condition: int
    step: int
    decode: int

    @property
    def peak(self) -> int:
        late = max(self.condition + self.step, self.decode)
        return sum(self.weights.values()) + self.cache + late

    @property
    def peak_text_freed(self) -> int:
        """The peak where the text encoder runs first and is freed."""
        text = self.weights.get("text", 0)
        return max(text, self.peak - text)


def estimate(model: Model, plan: Plan, batch: int, parts: tuple[int, int] = (1, 1)) -> Estimate:
    """What drawing `batch` pictures with a plan holds at once; `model` may be abstract.

    parts: of the pictures, and of the heads with their tokens, where several devices draw; the
    estimate is that of one of them, which holds all weights.

    step: `step_bytes` of the largest one, and `view_bytes`. decode: the tokenizer's maps at full
    size. XLA's own workspace is not counted, nor are scores where no kernel serves attention.
    Prompts are taken to be short.
    """
    batch, heads = batch // parts[0], parts[1]
    config, picture = model.transformer.config, model.tokenizer.config
    shape = CacheShape(
        batch * plan.row_factor, config.heads // heads, config.head_dim, config.precision.compute
    )
    steps = {(batch * step.row_factor, -(-step.scale.tokens // heads)) for step in plan.steps}
    pixels = math.prod(plan.schedule.final) * model.stride**2
    weights = {
        part: parameter_bytes(checkpoint.abstract_parameters(module))
        for part, module in model.parts.items()
    }
    maps = pictures_at_once(batch, pixels) * pixels * picture.full_width
    return Estimate(
        weights,
        cache_bytes(plan, shape),
        condition_bytes(model, plan, batch),
        max(step_bytes(config, *step) for step in steps) + view_bytes(plan, shape),
        _DECODER_MAPS * np.dtype(picture.dtype).itemsize * maps,
    )


def step_bytes(config: Any, rows: int, tokens: int) -> int:
    """Bytes of the activations of a scale where they are most: attending, feeding or drawing.

    rows, tokens: of one device. Feed-forward layers and the draw of a vocabulary work on groups of
    rows (`models.groups`), so that their widest maps do not grow with the batch.
    """
    item, width = np.dtype(config.precision.compute).itemsize, config.width
    every, together = rows * tokens, at_once(rows, tokens, PICTURE) * tokens
    hidden = config.mlp_width * getattr(config, "mlp_maps", 1)  # gated layers hold more than one
    logits = _LOGITS * getattr(config, "vocab", 0)
    more = (
        every * _ATTENDING * width * item,
        every * _WIDE * width * item + together * hidden * item,
        together * logits,
    )
    return every * np.dtype(config.precision.stream).itemsize * width + max(more)


def condition_bytes(model: Model, plan: Plan, batch: int) -> int:
    """Bytes of what all steps read of a batch of short prompts, or of classes."""
    subject = model.family.subject(lambda: model, text_encoder=True)
    one = subject.listed("a picture" if model.family.draws == "prompts" else 0)
    shapes, _ = subject.shape(subject.repeated(one, batch), model.family.options(), plan)
    return tree_bytes(shapes)


def cache_bytes(plan: Plan, shape: CacheShape) -> int:
    """Most bytes of the key/value caches before the first scale or after any, shared buffers once.

    The buffers that one generation leaves for the next are the same or are freed first.
    """
    return _caching(plan, shape)[0]


def view_bytes(plan: Plan, shape: CacheShape) -> int:
    """Most bytes of keys and values that a layer puts together for attention and does not keep.

    None where attention reads what is kept, or a scratch that all layers share.
    """
    return _caching(plan, shape)[1]


@functools.lru_cache(maxsize=16)
def _caching(plan: Plan, shape: CacheShape) -> tuple[int, int]:
    """`cache_bytes` and `view_bytes`."""
    kept, shared = jax.eval_shape(lambda: empty_buffers(plan, shape))
    left = {(plan.store(layer), plan.whole_rows(layer)): kept[layer] for layer in range(plan.depth)}
    sizes, views = [tree_bytes(kept)], [0]
    for index in range(len(plan.steps)):
        after: dict[Any, Any] = {}
        total = 0
        for layer in range(plan.depth):
            name = plan.store(layer), plan.whole_rows(layer)
            if name not in after:
                pool = shared[pools(plan).index(plan.store(layer))]
                work = functools.partial(_scale, place=plan.place(index, layer), store=name[0])
                after[name], view = jax.eval_shape(work, left[name], pool)
                views.append(tree_bytes(view))
            total += tree_bytes(after[name])
        sizes.append(total)
        left = after
    return max(sizes) + tree_bytes(shared), max(views)


def _scale(kept: Any, shared: Any, *, place: Place, store: Store) -> tuple[Any, list[jax.Array]]:
    """What a store keeps after a scale of nothing but zeros, and what it made to be looked at."""
    found: list[jax.Array] = []

    def write(k: jax.Array, v: jax.Array, slot: Slot) -> tuple[jax.Array, jax.Array, jax.Array]:
        found[:] = [jnp.zeros((*k.shape[:2], place.queries, k.shape[3]), k.dtype)]
        return found[0], k, v

    q, held = store.write(kept, shared, Writes(write, lambda: found[0]), place)
    known = {id(leaf) for leaf in jax.tree.leaves(held)}
    view = [leaf for leaf in store.view(held, place) if id(leaf) not in known]
    return store.keep(held, q, place)[0], view


def tree_bytes(tree: Any) -> int:
    """Bytes of arrays, or of their shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def parameter_bytes(shapes: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Bytes of all parameters in their dtypes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes.values())
