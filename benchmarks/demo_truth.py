"""The fixed scenes as training would have drawn them: the most that a judge can find."""

from __future__ import annotations

import re

import jax
import numpy as np
from jaxtyping import UInt8

from examples.train_demo.captions import (
    ABOVE,
    ABOVE_TWO,
    BESIDE,
    COLOURS,
    ROW,
    STYLE_SUFFIX,
    Layout,
    Recipe,
    alone,
    colour,
    empty_recipe,
    lay_out,
    stack,
)
from examples.train_demo.compose import compose
from examples.train_demo.pictures import Collection

UNSAID_STYLE = "noto"  # which training lets a caption leave unsaid
# Words of a caption, its layout, and whether its first thing stands at the layout's first place.
ARRANGED = (
    (" above .+ and ", ABOVE_TWO, True),
    (" in a row", ROW, True),
    (" above ", ABOVE, True),
    (" below ", ABOVE, False),
    (" to the right of ", BESIDE, False),
    (" to the left of | next to ", BESIDE, True),
    (" in the middle", alone(1, 1), True),
)
BACKGROUND = re.compile(rf" on an? ({'|'.join(sorted(COLOURS, key=len, reverse=True))}) background")


def layout_of(prompt: str) -> tuple[Layout, bool]:
    """The layout that a caption of a scene asks for, and whether its things are named in order.

    Raises ValueError for a caption that names none.
    """
    for words, layout, in_order in ARRANGED:
        if re.search(words, prompt):
            return layout, in_order
    raise ValueError(f"no known arrangement of things in {prompt!r}: see captions.arrange")


def scene(prompt: str, code_points: list[str], collection: Collection, seed: int) -> Recipe:
    """A recipe of the scene that a caption describes: its things, places, style and background.

    A thing that its style lacks comes in the style that a caption may leave unsaid. Raises
    ValueError for a caption without an arrangement or a background.
    """
    background = BACKGROUND.search(prompt)
    if background is None:
        raise ValueError(f"no known background in {prompt!r}: see captions.draw_background")
    style = next((s for s, end in STYLE_SUFFIX.items() if prompt.endswith(end)), UNSAID_STYLE)
    drawn = {(p.style, p.code_point): i for i, p in enumerate(collection.pictures)}
    things = [drawn.get((style, point), drawn.get((UNSAID_STYLE, point))) for point in code_points]
    layout, in_order = layout_of(prompt)
    rng = np.random.default_rng(seed)
    recipe = empty_recipe(rng)
    recipe.sprite[: len(things)] = things if in_order else things[::-1]
    lay_out(recipe, layout, rng)
    shade = colour(background[1], rng)
    recipe.colours = np.stack([shade, shade * rng.uniform(0.7, 1)])
    recipe.noise = float(rng.uniform(0.0, 0.06))
    return recipe


def scenes(
    entries: list[dict], collection: Collection, sprites: UInt8[np.ndarray, "P side side 4"]
) -> UInt8[np.ndarray, "B side side 3"]:
    """Training's own pictures of the fixed scenes; picture i has seed i."""
    recipes = [
        scene(entry["prompt"], entry["code_points"], collection, seed)
        for seed, entry in enumerate(entries)
    ]
    used = np.unique(np.concatenate([recipe.sprite for recipe in recipes]))
    used = used[used >= 0]
    for recipe in recipes:
        recipe.sprite = np.where(
            recipe.sprite < 0, -1, np.searchsorted(used, recipe.sprite)
        ).astype(np.int32)
    pictures = np.asarray(jax.jit(compose)(sprites[used], stack(recipes)))
    return np.uint8(np.clip(np.rint((pictures + 1) * 127.5), 0, 255))
