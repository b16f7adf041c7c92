"""Encoded pictures on the accelerator: latents and captions from which every batch is drawn.

Bitwise self-correction quantises a latent anew for every batch, so the pool holds latents, not
bits. A part of it is replaced at every training step by freshly drawn and encoded pictures.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, UInt8

from examples.train_demo import parallel
from examples.train_demo.compose import compose
from examples.train_demo.feed import Chunk
from examples.train_demo.models import Network
from examples.train_demo.vocabulary import MAX_LENGTH

Pool = dict[str, Array]


def empty(size: int, grid: tuple[int, int], code_width: int) -> Pool:
    """Room for `size` pictures: bfloat16 latents, token ids, lengths."""
    return {
        "latents": jnp.zeros((size, *grid, code_width), jnp.bfloat16),
        "ids": jnp.zeros((size, MAX_LENGTH), jnp.int32),
        "lengths": jnp.ones((size,), jnp.int32),
    }


def make_refill(network: Network, mesh: Any) -> Callable[..., Pool]:
    """`refill(pool, params, sprites, chunk, start)`: draw, encode and store a chunk of pictures.

    Every device holds its share of the pool and fills it from its share of the chunk, so `start`
    counts in shares.
    """

    def refill(
        pool: Pool, params: Any, sprites: UInt8[Array, "P h w 4"], chunk: Chunk, start: Array
    ) -> Pool:
        latents = network.assemble(params).encode(compose(sprites, chunk["recipes"]))
        new = {"latents": latents, "ids": chunk["ids"], "lengths": chunk["lengths"]}
        return {
            name: jax.lax.dynamic_update_slice_in_dim(
                array, jnp.asarray(new[name]).astype(array.dtype), start, 0
            )
            for name, array in pool.items()
        }

    whole, split = parallel.WHOLE, parallel.SPLIT
    return parallel.spread(refill, mesh, (split, whole, whole, split, whole), split)


def draw(pool: Pool, key: PRNGKeyArray, batch: int) -> Pool:
    """A random batch."""
    index = jax.random.randint(key, (batch,), 0, pool["lengths"].shape[0])
    return {name: array[index] for name, array in pool.items()}
