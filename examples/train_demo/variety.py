"""Examples that the plain ones lack: a thing in another colour, in several, or several times."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt8

from examples.train_demo.captions import (
    ABOVE,
    BESIDE,
    LAYERS,
    ROW,
    Picture,
    Recipe,
    arrange,
    article,
    colour,
    draw_example,
    draw_style,
    empty_recipe,
    lay_out,
    single,
    surroundings,
)

PAINTS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown")
# A thing that says its own colour is not painted in another one.
SAYS_COLOUR = re.compile(
    rf"\b({'|'.join(PAINTS)}|black|white|gray|golden|polar|rainbow|blue\w+|orange\w*)\b"
)
# Emojibase subgroups of things that come in many colours, and of things that can be counted.
COLOURFUL = re.compile(
    "transport|clothing|household|plant-flower|event|game|tool|place-building|music|book|"
    "dishware|animal-(bird|marine|bug)|office|writing"
)
COUNTABLE = re.compile(
    "animal|food-(fruit|vegetable|sweet)|plant-flower|transport-(ground|water)|music|tool|"
    "household|clothing|place-building|drink|game"
)
COLOURED, SHADOW, ENOUGH = 0.35, 0.2, 0.5
# Names that say more than one thing ("bowl with spoon") have no plural made by rule.
JOINING = {"with", "of", "in", "on", "at", "and", "behind", "without", "over", "not"}
SAME = {"fish", "sheep", "deer", "moose", "bison", "shrimp", "squid", "bread", "rice", "garlic"}
IRREGULAR = {
    "mouse": "mice",
    "goose": "geese",
    "ox": "oxen",
    "wolf": "wolves",
    "leaf": "leaves",
    "knife": "knives",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "mango": "mangoes",
}


def several(name: str) -> str | None:
    """The plural of a thing's name, or None where it has none that is made by rule."""
    words = name.split()
    last = words[-1]
    if article(name) == name or JOINING & set(words) or last in SAME or not last.isalpha():
        return None
    start = name.removesuffix(last)
    if last in IRREGULAR:
        return start + IRREGULAR[last]
    if last.endswith(("s", "x", "sh", "ch")):
        return f"{name}es"
    if last.endswith("y") and last[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


def can_count(picture: Picture) -> bool:
    """Whether there can be two or three of a thing, and a word for them."""
    return bool(COUNTABLE.match(picture.group)) and several(picture.name) is not None


def paintable(
    pictures: list[Picture], sprites: UInt8[np.ndarray, "pictures side side 4"]
) -> Bool[np.ndarray, "pictures"]:
    """Whether most of each picture is coloured, of a kind that comes in other colours too."""
    found = np.zeros(len(pictures), bool)
    for index, (picture, sprite) in enumerate(zip(pictures, sprites, strict=True)):
        small = sprite[::8, ::8].astype(np.float32) / 255
        high, low = small[..., :3].max(-1), small[..., :3].min(-1)
        coloured = ((high - low) / np.maximum(high, 1e-3) > COLOURED) & (high > SHADOW)
        there = small[..., 3] > 0.5
        share = (coloured & there).sum() / max(there.sum(), 1)
        told = SAYS_COLOUR.search(picture.name) or not COLOURFUL.match(picture.group)
        found[index] = share > ENOUGH and not told
    return found


@dataclass(frozen=True)
class Variety:
    """A share of the examples, and which pictures can be painted (see `paintable`)."""

    share: float
    paintable: Bool[np.ndarray, "pictures"]

    def can_paint(self, index: int) -> bool:
        """Whether this picture can be painted."""
        return bool(self.paintable[index])

    def draw(
        self,
        pictures: list[Picture],
        by_style: dict[str, Int[np.ndarray, "some"]],
        rng: np.random.Generator,
        scenes: float,
        plain: str = "",
    ) -> tuple[str, Recipe]:
        """A caption and its recipe, of one style as `captions.draw_example`."""
        indices = by_style[draw_style(by_style, rng)]
        in_scene = rng.random() < scenes
        number = in_scene and rng.random() < 0.5
        fits = (lambda i: can_count(pictures[i])) if number else self.can_paint
        index = _one_of(indices, fits, rng)
        if index is None:
            return draw_example(pictures, by_style, rng, scenes, plain)
        if number:
            return counted(index, pictures[index], rng, plain)
        if in_scene:
            return in_colours(index, pictures[index], rng, plain)
        return single(index, pictures[index], rng, plain, str(rng.choice(PAINTS)))


def _one_of(
    indices: np.ndarray, fits: Callable[[int], bool], rng: np.random.Generator
) -> int | None:
    """A random index that fits, or None where none of 30 tries does."""
    return next((int(index) for index in rng.choice(indices, 30) if fits(int(index))), None)


def in_colours(
    index: int, picture: Picture, rng: np.random.Generator, plain: str = ""
) -> tuple[str, Recipe]:
    """The same thing in two or three colours: "a red car above a blue car"."""
    recipe, count = empty_recipe(rng), int(rng.integers(2, LAYERS + 1))
    paints = [str(paint) for paint in rng.choice(PAINTS, count, replace=False)]
    recipe.sprite[:count] = index
    recipe.paint[:count] = [colour(paint, rng) for paint in paints]
    words = arrange([article(f"{paint} {picture.name}") for paint in paints], recipe, rng)
    return words + surroundings(recipe, picture.style, rng, plain), recipe


def counted(
    index: int, picture: Picture, rng: np.random.Generator, plain: str = ""
) -> tuple[str, Recipe]:
    """The same thing two or three times: "three cats in a row", "two cars above each other"."""
    recipe, count = empty_recipe(rng), int(rng.integers(2, LAYERS + 1))
    recipe.sprite[:count] = index
    things = f"{('two', 'three')[count - 2]} {several(picture.name)}"
    if count == 3:
        lay_out(recipe, ROW, rng)
        things += " in a row" if rng.random() < 0.7 else ""
    elif rng.random() < 0.4:
        lay_out(recipe, ABOVE, rng)
        things += " above each other"
    else:
        lay_out(recipe, BESIDE, rng)
        things += " next to each other" if rng.random() < 0.5 else ""
    return things + surroundings(recipe, picture.style, rng, plain), recipe
