"""The teacher-forced forward of training: all scales at once through the package's own blocks."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparvar_jax.models.infinity import Infinity
from sparvar_jax.schedule import ScaleSchedule
from sparvar_jax.strategy import Place

TOGETHER = 5
"""The first scales (121 tokens) share one masked product: a kernel for each would be idle time."""


def _first_scales_mask(schedule: ScaleSchedule, scales: int) -> np.ndarray:
    level = np.concatenate([np.full(s.tokens, s.index) for s in schedule.scales[:scales]])
    return level[:, None] >= level[None, :]


def _fused(q: Array, k: Array, v: Array) -> Array:
    """Attention with scale 1 over [R, H, T, D], by cuDNN on a GPU.

    Keys are padded to an even number and masked, because jax refuses odd numbers of keys in the
    backward pass of its cuDNN attention.
    """
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    keys = k.shape[1]
    k, v = (jnp.pad(x, ((0, 0), (0, keys % 2), (0, 0), (0, 0))) for x in (k, v))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=1.0,
        key_value_seq_lengths=jnp.full((len(k),), keys, jnp.int32) if keys % 2 else None,
        implementation="cudnn" if jax.default_backend() == "gpu" else "xla",
    )
    return out.transpose(0, 2, 1, 3)


def block_causal_attention(
    q: Float[Array, "R H T D"],
    k: Float[Array, "R H T D"],
    v: Float[Array, "R H T D"],
    schedule: ScaleSchedule,
) -> Float[Array, "R H T D"]:
    """Every token sees its own and all earlier scales: one call a scale over its key prefix."""
    scales = [s for s in schedule.scales if s.end <= q.shape[2]]
    head = scales[: min(TOGETHER, len(scales))]
    end = head[-1].end
    scores = jnp.einsum(
        "rhtd,rhsd->rhts", q[:, :, :end], k[:, :, :end], preferred_element_type=jnp.float32
    )
    scores = jnp.where(_first_scales_mask(schedule, len(head)), scores, -1e9)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    parts = [jnp.einsum("rhts,rhsd->rhtd", weights, v[:, :, :end])]
    for s in scales[len(head) :]:
        parts.append(_fused(q[:, :, s.offset : s.end], k[:, :, : s.end], v[:, :, : s.end]))
    return jnp.concatenate(parts, axis=2)


def teacher_forced(
    model: Infinity,
    text: Float[Array, "B M Ct"],
    lengths: Int[Array, "B"],
    inputs: tuple[Float[Array, "B _ _ N"], ...],
    schedule: ScaleSchedule,
    *,
    remat: bool = False,
) -> Float[Array, "B T logits"]:
    """Conditional logits of the first `len(inputs) + 1` scales, float32.

    inputs: the code sums resized to every scale but the first, as `quantise` gives them. `remat`
    keeps only the residual stream of every block for the backward pass.
    """
    condition = model.embed_condition(text, lengths)
    places = [Place(schedule, "packed", index) for index in range(len(inputs) + 1)]
    parts = [model.add_level(model.embed_codes(None, condition), places[0])]
    for place, codes in zip(places[1:], inputs, strict=True):
        codes = codes.reshape(codes.shape[0], -1, codes.shape[-1])
        parts.append(model.add_level(model.embed_codes(codes, condition), place))
    x = jnp.concatenate(parts, axis=1)
    tables = [model.positions(place) for place in places]
    rotary = tuple(jnp.concatenate(table) for table in zip(*tables, strict=True))

    attend = partial(block_causal_attention, schedule=schedule)

    def layer(x: Array, weights: Any) -> tuple[Array, None]:
        block, keys, values = weights
        inputs = (condition.modulation, (keys, values), condition.text_mask)
        return model.apply_block(model.config, block, x, inputs, rotary, attend), None

    # Training scans over stacked layers: it compiles several times faster than unrolled layers,
    # which generation prefers for speed.
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *model.blocks)
    stacked = (layers, jnp.stack(condition.text_keys), jnp.stack(condition.text_values))
    x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, stacked)
    return model.head_logits(x, condition)
