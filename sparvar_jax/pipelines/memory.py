"""How much device memory a generation needs, from shapes alone."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from sparvar_jax.pipelines.loading import Model
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.stores import CacheShape
from sparvar_jax.runtime.step import empty_buffers
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


def estimate(model: Model, plan: Plan, batch: int, parts: tuple[int, int] = (1, 1)) -> Estimate:
    """What drawing `batch` pictures with a plan holds at once; `model` may be abstract.

    parts: of the pictures, and of the heads with their tokens, where several devices draw; the
    estimate is that of one of them, which holds all weights.

    step: the widest activations of the largest scale. decode: the tokenizer's maps at full size.
    XLA's own workspace is not counted.
    """
    batch, heads = batch // parts[0], parts[1]
    config, picture = model.transformer.config, model.tokenizer.config
    item = np.dtype(config.precision.compute).itemsize
    shape = CacheShape(
        batch * plan.row_factor, config.heads // heads, config.head_dim, config.precision.compute
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
        batch * tokens * widest // heads,
        _DECODER_MAPS * 4 * batch * pixels * picture.full_width,
    )


def cache_bytes(plan: Plan, shape: CacheShape) -> int:
    """Bytes of the key/value caches before the first scale, shared buffers once.

    The buffers that one generation leaves for the next are the same or are freed first.
    """
    buffers = jax.eval_shape(lambda: empty_buffers(plan, shape))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(buffers))


def parameter_bytes(shapes: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Bytes of all parameters in their dtypes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes.values())
