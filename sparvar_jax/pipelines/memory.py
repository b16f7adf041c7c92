"""How much device memory a generation needs, from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from sparvar_jax.pipelines.decoding import pictures_at_once
from sparvar_jax.pipelines.loading import Model
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.stores import CacheShape
from sparvar_jax.runtime.step import empty_buffers
from sparvar_jax.weights import checkpoint

_DECODER_MAPS = 4  # a residual block holds its input, its branch and two temporaries
_STREAM, _WIDE = 4, 3  # bytes of the residual stream; its norm, a branch and what a product leaves


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


def estimate(model: Model, plan: Plan, batch: int) -> Estimate:
    """What drawing `batch` pictures with a plan holds at once; `model` may be abstract.

    step: the widest activations of the largest scale. decode: the tokenizer's maps at full size.
    XLA's own workspace is not counted, nor are scores where no kernel serves attention. Prompts
    are taken to be short.
    """
    config, picture = model.transformer.config, model.tokenizer.config
    item = np.dtype(config.precision.compute).itemsize
    shape = CacheShape(
        batch * plan.row_factor, config.heads, config.head_dim, config.precision.compute
    )
    tokens = max(step.scale.tokens * step.row_factor for step in plan.steps)
    widest = _STREAM * config.width + (config.mlp_width + _WIDE * config.width) * item
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
        batch * tokens * widest,
        _DECODER_MAPS * np.dtype(picture.dtype).itemsize * maps,
    )


def condition_bytes(model: Model, plan: Plan, batch: int) -> int:
    """Bytes of what all steps read of a batch of short prompts, or of classes."""
    subject = model.family.subject(lambda: model, text_encoder=True)
    one = subject.listed("a picture" if model.family.draws == "prompts" else 0)
    shapes, _ = subject.shape(subject.repeated(one, batch), model.family.options(), plan)
    return tree_bytes(shapes)


def cache_bytes(plan: Plan, shape: CacheShape) -> int:
    """Bytes of the key/value caches before the first scale, shared buffers once.

    The buffers that one generation leaves for the next are the same or are freed first.
    """
    return tree_bytes(jax.eval_shape(lambda: empty_buffers(plan, shape)))


def tree_bytes(tree: Any) -> int:
    """Bytes of arrays, or of their shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def parameter_bytes(shapes: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Bytes of all parameters in their dtypes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes.values())
