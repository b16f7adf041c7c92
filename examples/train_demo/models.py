"""The three networks of the demo, at their shipped size or at a toy size for rehearsals.

Training keeps float32 master parameters as nested dicts; `Network.assemble` casts them to the
dtypes that the package's modules compute in.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sparvar_jax.models.bsq_vae import BsqVae, BsqVaeConfig
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.models.t5 import T5Config, T5Encoder
from sparvar_jax.plans.schedule import ScaleSchedule, infinity_schedule

SCHEDULE: ScaleSchedule = infinity_schedule(1.0, "1M")
NEIGHBOUR, OUT_OF_SIGHT = 4.0, 8.0  # of the first relative biases; scores start at order one


@dataclass(frozen=True)
class DemoConfig:
    """The configurations of the demo's tokenizer, text encoder and transformer."""

    tokenizer: BsqVaeConfig
    text: T5Config
    transformer: InfinityConfig


SHIPPED = DemoConfig(
    BsqVaeConfig(
        16,
        4,
        (1, 2, 4),
        (1, 2, 4),
        base_width=32,
        encoder_blocks=1,
        decoder_blocks=2,
        dtype="bfloat16",
    ),
    T5Config(3072, 256, head_dim=64, mlp_width=512, depth=4, heads=4, dtype="bfloat16"),
    InfinityConfig(
        depth=8, width=384, heads=6, text_width=256, bits=16, text_max_length=32, chunks=2
    ),
)
TOY = DemoConfig(
    replace(
        SHIPPED.tokenizer,
        encoder_multipliers=(1, 1, 1),
        decoder_multipliers=(1, 1, 1),
        encoder_blocks=1,
        decoder_blocks=1,
        dtype="float32",
    ),
    T5Config(3072, 128, head_dim=32, mlp_width=256, depth=2, heads=4, dtype="float32"),
    replace(
        SHIPPED.transformer,
        depth=4,
        width=128,
        heads=2,
        text_width=128,
        mlp_width=0,
        dtype="float32",
    ),
)
FIRST = replace(SHIPPED, transformer=replace(SHIPPED.transformer, depth=6))
SIZES = {"shipped": SHIPPED, "first": FIRST, "toy": TOY}
"""What most runs of the training had is `first`; two layers came with the last one."""


@dataclass(frozen=True)
class Network:
    """A module's structure without its numbers."""

    config: Any
    graph: Any
    abstract: Any

    @classmethod
    def of(cls, module: type, config: Any) -> "Network":
        """The structure of `module(config)`; allocates nothing."""
        shape = nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))
        return cls(config, *nnx.split(shape))

    @property
    def like(self) -> Any:
        """Shapes of the float32 master parameters, a nested dict."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
            nnx.to_pure_dict(self.abstract),
        )

    def assemble(self, params: Any) -> Any:
        """The module with these parameters, cast to its own dtypes."""
        cast = jax.tree.map(
            lambda leaf, value: value.astype(leaf.dtype), nnx.to_pure_dict(self.abstract), params
        )
        state = jax.tree.map(lambda leaf: leaf, self.abstract)
        nnx.replace_by_pure_dict(state, cast)
        return nnx.merge(self.graph, state)


def initial(module: type, config: Any, seed: int) -> Any:
    """Fresh float32 master parameters of `module(config)`."""
    state = nnx.split(module(config, rngs=nnx.Rngs(seed)))[1]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.to_pure_dict(state))
    for block in params["blocks"].values() if module is Infinity else ():
        # Residual branches start at half strength, not at the near zero of a deep model.
        block["ada_gss"] = block["ada_gss"].at[:2].add(0.5)
    if module is T5Encoder:
        params["relative_bias"] = ordered_bias(config)
    return params


def ordered_bias(config: T5Config) -> Float[Array, "buckets H"]:
    """Relative biases with which heads tell before from after, and neighbours, from the start.

    Drawn near zero, as T5's are, they leave the encoder nearly blind to the order of words, and
    while nothing uses the order, they get hardly any gradient. Heads look, in turn: at the word
    before, at the word after, at all up to their own, at all from their own on.
    """
    half = config.buckets // 2
    bias = np.zeros((config.buckets, config.heads), np.float32)
    for head in range(config.heads):
        kind = head % 4
        if kind < 2:
            bias[1 + half * kind, head] = NEIGHBOUR
        else:
            after = slice(half + 1, None) if kind == 2 else slice(1, half)
            bias[after, head] = -OUT_OF_SIGHT
    return jnp.asarray(bias)


def networks(config: DemoConfig) -> dict[str, Network]:
    """All three structures by part name."""
    return {
        "tokenizer": Network.of(BsqVae, config.tokenizer),
        "text": Network.of(T5Encoder, config.text),
        "transformer": Network.of(Infinity, config.transformer),
    }
