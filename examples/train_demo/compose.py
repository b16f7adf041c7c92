"""Drawing recipes on the accelerator: cut-outs over gradient and smooth noise."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

NOISE_GRIDS = (4, 8, 16, 32)


def _background(recipe: dict[str, Any], side: int) -> Float[Array, "side side 3"]:
    axis = (jnp.arange(side) + 0.5) / side - 0.5
    along = axis[:, None] * jnp.sin(recipe["angle"]) + axis[None, :] * jnp.cos(recipe["angle"])
    mix = jnp.clip(along + 0.5, 0, 1)[..., None]
    plain = recipe["colours"][0] * (1 - mix) + recipe["colours"][1] * mix
    keys = jax.random.split(jax.random.key(recipe["seed"]), len(NOISE_GRIDS))
    noise = jnp.zeros((side, side, 1))
    for octave, (key, grid) in enumerate(zip(keys, NOISE_GRIDS, strict=True), 1):
        cells = jax.random.normal(key, (grid, grid, 1))
        noise = noise + jax.image.resize(cells, noise.shape, "cubic") / octave
    return jnp.clip(plain + recipe["noise"] * noise, 0, 1)


def painted(
    rgb: Float[Array, "side side 3"], paint: Float[Array, "3"]
) -> Float[Array, "side side 3"]:
    """The picture with its coloured parts in shades of `paint`; grey parts stay as they are.

    Darker parts go to black, lighter ones to white. A negative paint changes nothing.
    """
    high, low = jnp.max(rgb, axis=-1, keepdims=True), jnp.min(rgb, axis=-1, keepdims=True)
    coloured = jnp.clip(((high - low) / jnp.maximum(high, 1e-3) - 0.15) / 0.25, 0, 1)
    bright, level = jnp.mean(rgb, axis=-1, keepdims=True), jnp.mean(paint)
    dark = paint * (bright / jnp.maximum(level, 1e-3))
    light = paint + (1 - paint) * ((bright - level) / jnp.maximum(1 - level, 1e-3))
    shade = jnp.clip(jnp.where(bright < level, dark, light), 0, 1)
    return jnp.where(paint[0] < 0, rgb, rgb + coloured * (shade - rgb))


def _layer(
    sprite: UInt8[Array, "side side 4"],
    centre: Float[Array, "2"],
    size: Float[Array, ""],
    paint: Float[Array, "3"],
) -> Float[Array, "side side 4"]:
    """The cut-out with premultiplied alpha, scaled and moved to its place."""
    side = sprite.shape[0]
    image = sprite.astype(jnp.float32) / 255
    rgb = painted(image[..., :3], paint)
    image = jnp.concatenate([rgb * image[..., 3:], image[..., 3:]], axis=-1)
    return jax.image.scale_and_translate(
        image, image.shape, (0, 1), jnp.stack([size, size]), (centre - size / 2) * side, "linear"
    )


def _compose_one(sprites: UInt8[Array, "P side side 4"], recipe: dict[str, Any]) -> Array:
    side = sprites.shape[1]
    canvas = _background(recipe, side)
    for layer in range(recipe["sprite"].shape[0]):
        index = recipe["sprite"][layer]
        place = (recipe[name][layer] for name in ("centre", "size", "paint"))
        cut = _layer(sprites[jnp.maximum(index, 0)], *place)
        cut = jnp.where(index >= 0, cut, 0.0)
        canvas = canvas * (1 - cut[..., 3:]) + cut[..., :3]
    return jnp.clip(canvas, 0, 1) * 2 - 1


def compose(
    sprites: UInt8[Array, "P side side 4"], recipes: dict[str, Any]
) -> Float[Array, "B side side 3"]:
    """Pictures in -1..1 from stacked recipes (see `captions.stack`)."""
    return jax.vmap(_compose_one, in_axes=(None, 0))(sprites, recipes)
