"""HART: hybrid autoregressive transformer, text to image (arXiv 2410.10812).

Scale 0 is the text itself: 300 tokens whose keys and values every later scale reads; at the last of
them the first token is drawn. Further scales are those of VAR, but the last one adds to every code
a residual that a diffusion head denoises. The loop over scales lives in `runtime.generate`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped

from sparvar_jax.models import hart_parts, layers, quantizer, residual_head, vocabulary
from sparvar_jax.models.family import Draw, Drawn
from sparvar_jax.models.hart_parts import Block, HartConfig, Rotary, guidance_ramp
from sparvar_jax.models.residual_head import Denoised, NumberEmbed, ResidualHead
from sparvar_jax.models.vqvae import Codebook
from sparvar_jax.plans.schedule import Scale, ScaleSchedule
from sparvar_jax.plans.strategy import Place

__all__ = ["Condition", "Hart", "HartConfig", "guidance_ramp", "residual_noise", "token_keys"]

_IDS, _MIXTURE, _RESIDUAL = range(3)


class Condition(NamedTuple):
    """What prompts mean to every step; rows lead every array.

    text: what enters scale 0, before its level. positions: of its tokens, repeated over the
    padding. head: scale and shift of the head.
    """

    text: Float[Array, "R P C"]
    positions: Int[Array, "R P"]
    head: Float[Array, "R 2 C"]


class Hart(nnx.Module):
    """Parameters of a HART transformer and the pure functions of one scale."""

    captures_rows = False
    """Of the residual head, steps and groups lead what is captured, not pictures."""

    def __init__(self, config: HartConfig, *, rngs: nnx.Rngs):
        width, precision, single = config.width, config.precision, jnp.float32
        self.config = config
        self.context_norm: layers.Scale | None = nnx.data(None)
        if config.context_norm:
            self.context_norm = layers.Scale(config.text_width, bias=False, dtype=single)
        self.context_embed = layers.linear(
            config.text_width, width, precision, rngs, weights=single
        )
        self.word_embed = layers.linear(config.code_width, width, precision, rngs, weights=single)
        if config.sinusoidal:
            self.level_embed: NumberEmbed | nnx.Param = NumberEmbed(width, precision, rngs)
        else:
            shape = (len(config.sides), width)
            self.level_embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, single))
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.depth)])
        self.head_norm = layers.Scale(width, bias=False, dtype=single)
        self.head_ada = layers.linear(
            width, 2 * width, precision, rngs, weights=single, compute=single
        )
        self.head = layers.linear(
            width, config.vocab, precision, rngs, weights=single, compute=single
        )
        self.residual_norm = layers.Scale(width, bias=False, dtype=single)
        self.residual = ResidualHead(config.residual, precision, rngs)

    def embed_condition(
        self,
        text: Float[Array, "B P Ct"],
        positions: Int[Array, "B P"],
        guidance: tuple[jax.Array, jax.Array] | str | None = None,
    ) -> Condition:
        """Everything the steps need of the prompts, for conditional then unconditional rows.

        text: features of every token, padding included. guidance: None for conditional rows only,
        else (features, positions) of negative prompts, or "learned" for "no text" as the model
        learned it: zero features, all at position zero.
        """
        if guidance is not None:
            other = guidance
            if isinstance(other, str):
                other = (jnp.zeros_like(text), jnp.zeros_like(positions))
            text = jnp.concatenate([text, other[0]])
            positions = jnp.concatenate([positions, other[1]])
        if self.context_norm is not None:
            text = layers.rms_norm(text, self.context_norm.scale[...])
        memory = self.context_embed(text).astype(jnp.float32)
        pooled = jax.nn.silu(jnp.max(memory, axis=1))
        head = self.head_ada(pooled).reshape(len(text), 2, self.config.width)
        return Condition(memory, positions, head)

    def embed_codes(
        self, codes: Float[Array, "B T N"] | None, condition: Condition
    ) -> Float[Array, "R T C"]:
        """The sequence entering a scale, before its level; None starts with the text."""
        if codes is None:
            return condition.text
        x = self.word_embed(codes).astype(jnp.float32)
        return x if len(condition.text) == len(codes) else jnp.concatenate([x, x])

    def levels(self) -> Float[Array, "S C"]:
        """What is added to every token of each scale."""
        if isinstance(self.level_embed, NumberEmbed):
            return self.level_embed(jnp.arange(len(self.config.sides)))
        return self.level_embed[...]

    def add_level(self, x: Float[Array, "R T C"], place: Place) -> Float[Array, "R T C"]:
        """The residual stream before block 0."""
        return (x + self.levels()[place.index]).astype(self.config.stream)

    def positions(self, condition: Condition, place: Place) -> Rotary:
        """Rotary (cos, sin) of a scale's tokens in every row."""
        return hart_parts.rotary(self.config, condition.positions, place.scale)

    def block_inputs(self, layer: int, condition: Condition) -> tuple[()]:
        """Nothing: blocks see the text in the cache."""
        del layer, condition
        return ()

    def head_logits(
        self, x: Float[Array, "R T C"], condition: Condition
    ) -> Float[Array, "R T vocab"]:
        """Raw logits over the codebook, float32."""
        scale, shift = (condition.head[: len(x), part, None] for part in range(2))
        return self.head(layers.rms_norm(x, self.head_norm.scale[...]) * (1 + scale) + shift)

    def finish(
        self, x: Float[Array, "R T C"], condition: Condition, place: Place, draw: Draw
    ) -> Drawn:
        """Token ids from guided logits, or mixtures [B, T, vocab]; residuals at the last scale.

        Without keys the likeliest ids, and residuals denoised from zeros.
        """
        x = draw.rows(x)
        if not place.scale.grid:
            x = x[:, -1:]

        def finish(x: Float[Array, "R2 T C"], head: Float[Array, "R2 2 C"], draw: Draw) -> Drawn:
            return self._drawn(x, condition._replace(head=head), place, draw)

        return draw.by_pictures(finish, x, condition.head[: len(x)])

    def _drawn(
        self, x: Float[Array, "R T C"], condition: Condition, place: Place, draw: Draw
    ) -> Drawn:
        raw = self.head_logits(x, condition)
        guided, controls = draw.guide(raw), draw.controls
        limit = jnp.int32(hart_parts.top_k(place.index))
        removed = vocabulary.removed(guided, limit, controls.top_p)
        kept = jnp.where(removed, -jnp.inf, guided)
        captured = {"raw_logits": raw, "guided_logits": guided, "removed": removed}

        def ids() -> Int[Array, "B T"]:
            if draw.keys is None:
                return jnp.argmax(guided, axis=-1).astype(jnp.int32)
            chosen = jax.vmap(jax.random.categorical)(token_keys(draw.keys, _IDS), kept)
            return chosen.astype(jnp.int32)

        def mixture() -> Float[Array, "B T vocab"]:
            assert draw.keys is not None
            shape, keys = kept.shape[1:], token_keys(draw.keys, _MIXTURE)
            noise = jax.vmap(lambda key: jax.random.gumbel(key, shape, jnp.float32))(keys)
            return vocabulary.mixed(kept, noise, self.progress(place))

        drawn = ids()
        hard = draw.settle(lambda: drawn)
        smooth = draw.how == "smooth" and draw.keys is not None
        tokens = draw.settle(mixture) if smooth else hard
        if place.index + 1 < len(self.config.sides):
            return Drawn(tokens, captured=captured)
        return self._with_residual(x, hard, tokens, draw, captured)

    def progress(self, place: Place) -> float:
        """How far a scale has come, see `hart_parts.progress`."""
        return hart_parts.progress(place.index, len(self.config.sides))

    def _with_residual(
        self,
        x: Float[Array, "R T C"],
        ids: Int[Array, "B T"],
        tokens: Shaped[Array, "B T ..."],
        draw: Draw,
        captured: dict[str, jax.Array],
    ) -> Drawn:
        """The residuals are made for the codes of `ids`, even where mixtures of codes are drawn."""
        groups = 2 if draw.guided else 1
        hidden = self.residual_condition(x[: groups * draw.batch], draw.codebook.lookup(ids))
        flat = hidden.reshape(groups, -1, hidden.shape[-1])
        noise = self._noise(draw, x.shape[1])
        guidance = draw.controls.guidance[draw.index] - 1
        found = self.denoise(flat, guidance, noise)
        residual = found.residual.reshape(draw.batch, -1, self.config.code_width)
        captured |= {"residual_condition": flat, "residual_noise": noise, "residual": residual}
        return Drawn(tokens, residual, captured)

    def residual_condition(
        self, x: Float[Array, "R T C"], codes: Float[Array, "B T N"]
    ) -> Float[Array, "R T C"]:
        """What the residual head sees of the hidden states after the last block and the codes."""
        words = self.word_embed(codes).astype(jnp.float32)
        words = jnp.concatenate([words] * (len(x) // len(codes)))
        return layers.rms_norm(x + words, self.residual_norm.scale[...])

    def denoise(
        self,
        hidden: Float[Array, "G M C"],
        guidance: Float[Array, ""],
        noise: Float[Array, "K1 M N"],
    ) -> Denoised:
        """See `residual_head.sample`."""
        return residual_head.sample(self.residual, hidden, guidance, noise)

    def _noise(self, draw: Draw, tokens: int) -> Float[Array, "K1 M N"]:
        shape = (self.config.residual_steps + 1, tokens, self.config.code_width)
        if draw.keys is None:
            return jnp.zeros((shape[0], draw.batch * tokens, shape[2]), jnp.float32)
        return residual_noise(draw.keys, shape)

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
        """The code sum with one scale added, and the input codes of the following scale.

        The codes of the last scale are added as they are, with their residuals.
        """
        side, scales = self.config.grid(scale), len(self.config.sides)
        codes = codebook.lookup(drawn.tokens)
        if drawn.codes is not None:
            codes = codes + drawn.codes
        grid = codes.reshape(-1, side, side, self.config.code_width)
        if scale.index + 1 == scales:
            return code_sum + grid, None
        code_sum = codebook.add(code_sum, grid, scale.index, scales)
        if following is None:
            return code_sum, None
        size = (following.height, following.width)
        codes = quantizer.next_input(code_sum, size, mode="area")
        return code_sum, codes.reshape(len(codes), following.tokens, self.config.code_width)


def token_keys(keys: Key[Array, "B"], purpose: int) -> Key[Array, "B"]:
    """The keys of one purpose of a scale: 0 ids, 1 mixtures, 2 residuals."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, purpose)


def residual_noise(keys: Key[Array, "B"], shape: tuple[int, ...]) -> Float[Array, "K1 M N"]:
    """Normal noise of `shape` (steps + 1, tokens, channels) for every image, images side by side.

    keys: one an image, already of the last scale.
    """
    draw = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))
    noise = draw(token_keys(keys, _RESIDUAL))
    return noise.transpose(1, 0, 2, 3).reshape(shape[0], -1, shape[2])
