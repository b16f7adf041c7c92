"""Infinity: text-conditional bitwise visual autoregressive transformer (arXiv 2412.04431).

The module owns parameters and the small pure functions of one scale; the loop over scales, caches
and compilation live in `sparvar_jax.runtime.generate`.
"""

from __future__ import annotations

import dataclasses
import typing

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparvar_jax.models import layers, quantizer, sampling
from sparvar_jax.models.cross_attention import Text
from sparvar_jax.models.family import Draw, Drawn
from sparvar_jax.models.infinity_parts import (
    Block,
    BlockInputs,
    InfinityConfig,
    Rotary,
    TextPool,
    TextProjection,
)
from sparvar_jax.plans.schedule import Scale, ScaleSchedule, rotary_channels
from sparvar_jax.plans.strategy import Place

__all__ = ["Condition", "Infinity", "InfinityConfig"]

Guidance = tuple[jax.Array, jax.Array] | str | None


@typing.no_type_check  # jax rebuilds it with whatever stands for arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """What text means to every step; rows lead every array.

    pooled: pooled text. head: scale and shift of the head. modulation: adaptive-norm values of
    every layer. text: what every layer's cross-attention needs of the prompts.
    """

    pooled: Float[Array, "R C"]
    head: Float[Array, "R 2 C"]
    modulation: tuple[Float[Array, "R 6 C"], ...]
    text: tuple[Text, ...]


class Infinity(nnx.Module):
    """Parameters of an Infinity transformer and the pure functions of one scale."""

    def __init__(self, config: InfinityConfig, *, rngs: nnx.Rngs):
        width, precision, single = config.width, config.precision, jnp.float32
        self.config = config
        self.uncond_text = nnx.Param(
            0.02
            * jax.random.normal(rngs.params(), (config.text_max_length, config.text_width), single)
        )
        self.text_norm = layers.Scale(config.text_width, bias=False, dtype=single)
        self.text_pool = TextPool(config, rngs)
        self.text_proj = TextProjection(config, rngs)
        self.pos_start = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,), single))
        self.level_embed = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (config.levels, width), single)
        )
        self.word_embed = layers.linear(config.bits, width, precision, rngs, weights=single)
        self.shared_ada = layers.linear(width, 6 * width, precision, rngs, weights=single)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.depth)])
        self.head_ada = layers.linear(
            width, 2 * width, precision, rngs, weights=single, compute=single
        )
        self.head = layers.linear(
            width, 2 * config.bits, precision, rngs, weights=single, compute=single
        )

    def embed_condition(
        self, text: Float[Array, "B M Ct"], lengths: Int[Array, "B"], guidance: Guidance = None
    ) -> Condition:
        """Everything the steps need of the prompts, for conditional then unconditional rows.

        text: padded text-encoder states, float32. guidance: None for conditional rows only, else
        (features [B, M, Ct], lengths [B]) of negative prompts, or "learned" for the model's own.
        """
        if guidance is not None:
            if isinstance(guidance, str):
                other = jnp.broadcast_to(self.uncond_text[...][: text.shape[1]], text.shape)
                other_lengths = lengths
            else:
                other, other_lengths = guidance
            text = jnp.concatenate(_pad_to_longest(text, other))
            lengths = jnp.concatenate([lengths, other_lengths])
        config, precision = self.config, self.config.precision
        mask = layers.length_mask(lengths, text.shape[1])
        text = layers.rms_norm(text, self.text_norm.scale[...])
        pooled = self.text_pool(text, mask, precision)
        memory = self.text_proj(text)
        active = jax.nn.silu(pooled)
        rows = pooled.shape[0]
        shared = self.shared_ada(active).astype(jnp.float32).reshape(rows, 6, config.width)
        head = self.head_ada(active).reshape(rows, 2, config.width)
        return Condition(
            pooled,
            head,
            tuple(block.ada_gss[...].astype(jnp.float32) + shared for block in self.blocks),
            tuple(block.cross.text(memory, mask, config.fused) for block in self.blocks),
        )

    def embed_codes(
        self, codes: Float[Array, "B T N"] | None, condition: Condition
    ) -> Float[Array, "R T C"]:
        """The sequence entering a scale, before the level embedding; None starts at scale 0."""
        rows = condition.pooled.shape[0]
        if codes is None:
            return (condition.pooled + self.pos_start[...])[:, None]
        x = self.word_embed(codes).astype(jnp.float32)
        return x if rows == codes.shape[0] else jnp.concatenate([x, x])

    def add_level(self, x: Float[Array, "R T C"], place: Place) -> Float[Array, "R T C"]:
        """The residual stream before block 0: every token of a scale gets its level's vector."""
        levels = self.level_embed[...]
        if place.index >= len(levels):
            raise ValueError(
                f"the plan draws scale {place.index}, the model has embeddings of {len(levels)} "
                "levels: take a schedule of at most so many scales"
            )
        return (x + levels[place.index]).astype(self.config.stream)

    def positions(self, condition: Condition, place: Place) -> Rotary:
        """Rotary (cos, sin) of a scale's tokens, for every channel of a head."""
        del condition
        cos, sin = rotary_channels(place.schedule, place.index, self.config.head_dim)
        return jnp.asarray(cos), jnp.asarray(sin)

    def head_logits(
        self, x: Float[Array, "R T C"], condition: Condition
    ) -> Float[Array, "R T logits"]:
        """Raw logits [R, T, 2N], entry `2 * bit + label`, float32."""
        scale, shift = condition.head[: x.shape[0], 0], condition.head[: x.shape[0], 1]
        return self.head(layers.modulate(x, scale, shift))

    def block_inputs(self, layer: int, condition: Condition) -> BlockInputs:
        """What a block needs of a condition; a stream of fewer rows meets the first of them."""
        return condition.modulation[layer], condition.text[layer]

    def finish(
        self, x: Float[Array, "R T C"], condition: Condition, place: Place, draw: Draw
    ) -> Drawn:
        """Bits from guided logits; without keys the likelier label of every bit."""
        raw = self.head_logits(draw.rows(x), condition)
        guided = draw.guide(raw)
        pairs = guided.reshape(*guided.shape[:2], self.config.bits, 2)
        tokens = draw.settle(lambda: sampling.sample_bits(pairs, draw.controls.top_p, draw.keys))
        return Drawn(tokens, captured={"raw_logits": raw, "guided_logits": guided})

    def start_codes(self, batch: int, schedule: ScaleSchedule) -> Float[Array, "B height width Cd"]:
        """The empty code sum on the final latent grid."""
        size = quantizer.latent_size(schedule.final, self.config.patchify)
        return jnp.zeros((batch, *size, self.config.code_width), jnp.float32)

    def accumulate(
        self,
        drawn: Drawn,
        code_sum: Float[Array, "B height width Cd"],
        scale: Scale,
        following: Scale | None,
        codebook: None,
    ) -> tuple[Float[Array, "B height width Cd"], Float[Array, "B T2 N"] | None]:
        """The code sum with one scale added, and the input codes of the following scale."""
        del codebook
        config = self.config
        grid = drawn.tokens.reshape(-1, scale.height, scale.width, config.bits)
        codes = drawn.silenced(quantizer.labels_to_codes(grid, config.patchify), scale)
        _, final_height, final_width, _ = code_sum.shape
        code_sum = quantizer.accumulate(code_sum, codes, (final_height, final_width))
        if following is None:
            return code_sum, None
        size = (following.height, following.width)
        codes = quantizer.next_input(code_sum, size, config.patchify)
        return code_sum, codes.reshape(codes.shape[0], following.tokens, config.bits)


def _pad_to_longest(
    a: Float[Array, "B M Ct"], b: Float[Array, "B M2 Ct"]
) -> tuple[jax.Array, jax.Array]:
    longest = max(a.shape[1], b.shape[1])
    return (
        jnp.pad(a, ((0, 0), (0, longest - a.shape[1]), (0, 0))),
        jnp.pad(b, ((0, 0), (0, longest - b.shape[1]), (0, 0))),
    )
