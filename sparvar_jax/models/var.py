"""VAR: class-conditional visual autoregressive transformer (arXiv 2404.02905).

The module owns parameters and the small pure functions of one scale; the loop over scales, caches
and randomness live in `runtime.generate`. It differs from Infinity in its condition (a class), its
positions (learned, no rotary), its tokens (rows of a codebook) and its guidance, which grows with
the scale.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from sparvar_jax.models import layers, quantizer, vocabulary
from sparvar_jax.models.family import Draw, Drawn
from sparvar_jax.models.var_parts import Block, VarConfig, guidance_ramp
from sparvar_jax.models.vqvae import Codebook
from sparvar_jax.plans.schedule import Scale, ScaleSchedule
from sparvar_jax.plans.strategy import Place

__all__ = ["Condition", "Var", "VarConfig", "guidance_ramp"]


class Condition(NamedTuple):
    """What a class means to every step; rows lead every array.

    pooled: the class vector. modulation: adaptive-norm values, one array a layer or a single one
    that all layers share. head: scale and shift of the head.
    """

    pooled: Float[Array, "R C"]
    modulation: tuple[Float[Array, "R 6 C"], ...]
    head: Float[Array, "R 2 C"]


class Var(nnx.Module):
    """Parameters of a VAR transformer and the pure functions of one scale."""

    def __init__(self, config: VarConfig, *, rngs: nnx.Rngs):
        width, precision, single = config.width, config.precision, jnp.float32
        self.config = config
        self.class_embed = nnx.Param(_normal(rngs, config.classes + 1, width))
        self.pos_start = nnx.Param(_normal(rngs, width))
        self.pos_embed = nnx.Param(_normal(rngs, config.tokens, width))
        self.level_embed = nnx.Param(_normal(rngs, len(config.sides), width))
        self.word_embed = layers.linear(config.code_width, width, precision, rngs, weights=single)
        if config.shared_ada:
            self.shared_ada = layers.linear(width, 6 * width, precision, rngs, weights=single)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.depth)])
        self.head_ada = layers.linear(
            width, 2 * width, precision, rngs, weights=single, compute=single
        )
        self.head = layers.linear(
            width, config.vocab, precision, rngs, weights=single, compute=single
        )

    def embed_condition(self, labels: Int[Array, "B"], guidance: bool = True) -> Condition:
        """Everything the steps need of the classes; with guidance unconditional rows follow."""
        config = self.config
        if guidance:
            labels = jnp.concatenate([labels, jnp.full_like(labels, config.classes)])
        pooled = self.class_embed[...][labels]
        active, rows = jax.nn.silu(pooled), labels.shape[0]
        projections = [self.shared_ada] if config.shared_ada else [b.ada for b in self.blocks]
        modulation = tuple(
            project(active).astype(jnp.float32).reshape(rows, 6, config.width)
            for project in projections
        )
        return Condition(pooled, modulation, self.head_ada(active).reshape(rows, 2, config.width))

    def embed_codes(
        self, codes: Float[Array, "B T N"] | None, condition: Condition
    ) -> Float[Array, "R T C"]:
        """The sequence entering a scale, before positions; None starts at scale 0."""
        rows = condition.pooled.shape[0]
        if codes is None:
            return (condition.pooled + self.pos_start[...])[:, None]
        x = self.word_embed(codes).astype(jnp.float32)
        return x if rows == codes.shape[0] else jnp.concatenate([x, x])

    def add_level(self, x: Float[Array, "R T C"], place: Place) -> Float[Array, "R T C"]:
        """The residual stream before block 0: level and learned positions added."""
        scale = place.scale
        positions = self.pos_embed[...][scale.offset : scale.end]
        x = x + (self.level_embed[...][scale.index] + positions)
        return x.astype(self.config.stream)

    def positions(self, condition: Condition, place: Place) -> tuple[()]:
        """Nothing: this family knows positions from its input alone."""
        del condition, place
        return ()

    def head_logits(
        self, x: Float[Array, "R T C"], condition: Condition
    ) -> Float[Array, "R T vocab"]:
        """Raw logits over the codebook, float32."""
        scale, shift = condition.head[: x.shape[0], 0], condition.head[: x.shape[0], 1]
        return self.head(layers.modulate(x, scale, shift))

    def block_inputs(self, layer: int, condition: Condition) -> Float[Array, "R 6 C"]:
        """A block's adaptive-norm values; a stream of fewer rows meets the first of them."""
        return condition.modulation[0 if self.config.shared_ada else layer]

    def finish(
        self, x: Float[Array, "R T C"], condition: Condition, place: Place, draw: Draw
    ) -> Drawn:
        """Token ids from guided logits, or mixtures [B, T, vocab] where smooth ones are asked for.

        Without keys always the likeliest ids.
        """

        def finish(x: Float[Array, "R2 T C"], head: Float[Array, "R2 2 C"], draw: Draw) -> Drawn:
            return self._drawn(x, condition._replace(head=head), place, draw)

        x = draw.rows(x)
        return draw.by_pictures(finish, x, condition.head[: len(x)])

    def _drawn(
        self, x: Float[Array, "R T C"], condition: Condition, place: Place, draw: Draw
    ) -> Drawn:
        raw = self.head_logits(x, condition)
        guided, controls = draw.guide(raw), draw.controls

        def sample() -> Shaped[Array, "B T ..."]:
            if draw.keys is None or draw.how != "smooth":
                return vocabulary.sample(guided, controls.top_k, controls.top_p, draw.keys)
            progress = place.index / (len(self.config.sides) - 1)
            return vocabulary.mixture(guided, controls.top_k, controls.top_p, draw.keys, progress)

        return Drawn(draw.settle(sample), captured={"raw_logits": raw, "guided_logits": guided})

    def start_codes(self, batch: int, schedule: ScaleSchedule) -> Float[Array, "B height width N"]:
        """The empty code sum on the final grid."""
        return jnp.zeros((batch, *schedule.final, self.config.code_width), jnp.float32)

    def accumulate(
        self,
        drawn: Drawn,
        code_sum: Float[Array, "B height width N"],
        scale: Scale,
        following: Scale | None,
        codebook: Codebook,
    ) -> tuple[Float[Array, "B height width N"], Float[Array, "B T2 N"] | None]:
        """The code sum with one scale added, and the input codes of the following scale."""
        config = self.config
        codes = codebook.lookup(drawn.tokens)
        grid = codes.reshape(-1, scale.height, scale.width, config.code_width)
        code_sum = codebook.add(
            code_sum, drawn.silenced(grid, scale), scale.index, len(config.sides)
        )
        if following is None:
            return code_sum, None
        size = (following.height, following.width)
        codes = quantizer.next_input(code_sum, size, mode="area")
        return code_sum, codes.reshape(codes.shape[0], following.tokens, config.code_width)


def _normal(rngs: nnx.Rngs, *shape: int) -> Float[Array, "..."]:
    return 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
