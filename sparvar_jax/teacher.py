"""All scales in one pass, for training and as an independent check of the cached loop.

Every token of every scale goes through a block together; only attention is split, so that a scale
sees itself and the scales before it. Differentiable; uses no kernel of this project.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparvar_jax.schedule import ScaleSchedule
from sparvar_jax.strategy import Place

AttentionImplementation = Literal["xla", "cudnn"] | None
MERGED_TOKENS = 768  # scales that end within this many tokens share one masked call


def prefix_attention(
    q: Float[Array, "R H T D"],
    k: Float[Array, "R H T D"],
    v: Float[Array, "R H T D"],
    schedule: ScaleSchedule,
    scales: int,
    implementation: AttentionImplementation = None,
) -> Float[Array, "R H T D"]:
    """Block-causal attention, softmax scale 1: each scale sees all tokens up to its own end."""
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    ran = schedule.scales[:scales]
    merged = [scale for scale in ran if scale.end <= MERGED_TOKENS]
    parts, start = [], 0
    if len(merged) > 1:
        start = merged[-1].end
        owner = np.repeat(np.arange(len(merged)), [scale.tokens for scale in merged])
        mask = jnp.asarray(owner[:, None] >= owner[None, :])[None, None]
        parts.append(
            jax.nn.dot_product_attention(
                q[:, :start], k[:, :start], v[:, :start], mask=mask, scale=1.0
            )
        )
    for scale in ran:
        if scale.end > start:
            parts.append(
                jax.nn.dot_product_attention(
                    q[:, scale.offset : scale.end],
                    k[:, : scale.end],
                    v[:, : scale.end],
                    scale=1.0,
                    implementation=implementation,
                )
            )
    return jnp.concatenate(parts, axis=1).transpose(0, 2, 1, 3)


def teacher_forced_logits(
    model: Any,
    condition: Any,
    codes: tuple[Float[Array, "B T N"], ...],
    schedule: ScaleSchedule,
    *,
    implementation: AttentionImplementation = None,
    remat: bool = False,
) -> tuple[Float[Array, "R T logits"], ...]:
    """Raw logits of the first `len(codes) + 1` scales, one array a scale.

    codes: input codes of every scale but the first, [B, tokens, N]. remat: recompute blocks in the
    backward pass, trading time for memory.
    """
    scales = len(codes) + 1
    places = [Place(schedule, "packed", index) for index in range(scales)]
    inputs = [model.embed_codes(None, condition)]
    inputs += [model.embed_codes(code, condition) for code in codes]
    x = jnp.concatenate(
        [model.add_level(x, place) for x, place in zip(inputs, places, strict=True)], axis=1
    )
    rotary = zip(*(model.positions(place) for place in places), strict=True)
    positions = tuple(jnp.concatenate(part) for part in rotary)
    attend = functools.partial(
        prefix_attention, schedule=schedule, scales=scales, implementation=implementation
    )
    apply = functools.partial(type(model).apply_block, model.config, attend=attend)
    if remat:
        apply = jax.checkpoint(apply)
    for layer, block in enumerate(model.blocks):
        x = apply(block, x, model.block_inputs(layer, condition, x.shape[0]), positions)
    logits = model.head_logits(x, condition)
    ends = [place.scale.end for place in places]
    return tuple(jnp.split(logits, ends[:-1], axis=1))
