"""All scales in one pass, for training and as an independent check of the cached loop.

Every token of every scale goes through a block together; only attention is split, so that a scale
sees itself and the scales before it. Differentiable; uses no kernel of this project.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparvar_jax.models.stream import Stream
from sparvar_jax.plans.attend import Attend
from sparvar_jax.plans.rows import Slot
from sparvar_jax.plans.schedule import Scale, ScaleSchedule
from sparvar_jax.plans.stores import Write
from sparvar_jax.plans.strategy import Place

TOGETHER = 128
"""Scales that end within this many tokens share one masked product: a call each would idle."""


def prefix_attention(
    q: Float[Array, "R H T D"],
    k: Float[Array, "R H T D"],
    v: Float[Array, "R H T D"],
    schedule: ScaleSchedule,
) -> Float[Array, "R H T D"]:
    """Block-causal attention, softmax scale 1: each scale sees all tokens up to its own end."""
    scales = [scale for scale in schedule.scales if scale.end <= q.shape[2]]
    first = [scale for scale in scales if scale.end <= TOGETHER]
    parts = [_masked(q, k, v, first)]
    for scale in scales[len(first) :]:
        parts.append(
            _fused(q[:, :, scale.offset : scale.end], k[:, :, : scale.end], v[:, :, : scale.end])
        )
    return jnp.concatenate(parts, axis=2)


def _masked(q: Array, k: Array, v: Array, scales: list[Scale]) -> Array:
    end = scales[-1].end
    owner = np.repeat(np.arange(len(scales)), [scale.tokens for scale in scales])
    exact = jax.lax.Precision.HIGHEST if v.dtype == jnp.float32 else None
    scores = jnp.einsum(
        "rhtd,rhsd->rhts",
        q[:, :, :end],
        k[:, :, :end],
        precision=exact,
        preferred_element_type=jnp.float32,
    )
    scores = jnp.where(owner[:, None] >= owner[None, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("rhts,rhsd->rhtd", weights, v[:, :, :end], precision=exact)


def _fused(q: Array, k: Array, v: Array) -> Array:
    """One scale against its prefix: cuDNN for 16-bit operands on a GPU, else XLA.

    Keys are padded to an even number and masked, because jax refuses odd numbers of keys in the
    backward pass of its cuDNN attention.
    """
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    keys = k.shape[1]
    k, v = (jnp.pad(x, ((0, 0), (0, keys % 2), (0, 0), (0, 0))) for x in (k, v))
    cudnn = jax.default_backend() == "gpu" and q.dtype != jnp.float32
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=1.0,
        key_value_seq_lengths=jnp.full((len(k),), keys, jnp.int32) if keys % 2 else None,
        implementation="cudnn" if cudnn else "xla",
    )
    return out.transpose(0, 2, 1, 3)


def teacher_forced_logits(
    model: Any,
    condition: Any,
    codes: tuple[Float[Array, "B _ N"], ...],
    schedule: ScaleSchedule,
    *,
    scan: bool = False,
    remat: bool = False,
) -> tuple[Float[Array, "R _ logits"], ...]:
    """Raw logits of the first `len(codes) + 1` scales, one array a scale.

    codes: input codes of every scale but the first, [B, tokens, N]. scan: stack the layers and
    scan over them, which compiles several times faster (training) but runs slower than unrolled
    layers. remat: keep only the residual stream of every block for the backward pass.
    """
    places = [Place(schedule, "packed", index) for index in range(len(codes) + 1)]
    inputs = zip((None, *codes), places, strict=True)
    entering = [model.add_level(model.embed_codes(c, condition), place) for c, place in inputs]
    x = jnp.concatenate(entering, axis=1)
    rotary = [model.positions(condition, place) for place in places]
    positions = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-2), *rotary)
    config = model.config
    if hasattr(config, "fused"):  # kernels have no derivative
        config = dataclasses.replace(config, fused="xla")
    buffer = jnp.zeros((x.shape[0], config.heads, x.shape[1], config.head_dim), config.dtype)

    def attend(write: Write) -> Array:
        q, k, v = write(buffer, buffer, Slot(0, x.shape[1], x.shape[1]))
        return prefix_attention(q.astype(k.dtype), k, v, schedule)

    layers = [
        (block, model.block_inputs(layer, condition)) for layer, block in enumerate(model.blocks)
    ]

    def apply(x: Array, layer: tuple[Any, Any]) -> tuple[Array, None]:
        block, inputs = layer
        stream = block(Stream(x), inputs, positions, Attend(attend), config)
        return stream.settled(), None

    apply = jax.checkpoint(apply) if remat else apply
    if scan:
        x, _ = jax.lax.scan(apply, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))
    else:
        for layer in layers:
            x, _ = apply(x, layer)
    logits = model.head_logits(x, condition)
    ends = [place.scale.end for place in places]
    return tuple(jnp.split(logits, ends[:-1], axis=1))
