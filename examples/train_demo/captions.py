"""Captions and recipes: what stands where in a training picture, said in words and in numbers.

A `Recipe` is a handful of numbers from which `compose.py` draws a picture on the accelerator, so
the host sends bytes instead of pixels and every step can see new pictures. The caption is written
at the same moment from the same draws: it names the things, their places, the style and the
background, and never says what is not in the picture.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

LAYERS = 3
# Sizes and places vary little: every drawing has to be learnt anew at each of them.

STYLE_PREFIX = {
    "fluent-3d": ("a glossy 3d render of ", "a 3d icon of "),
    "fluent-flat": ("a flat icon of ", "a flat drawing of "),
    "noto": ("a noto drawing of ", "a noto icon of "),
    "noto-classic": ("a classic drawing of ", "a classic icon of "),
}
STYLE_SUFFIX = {
    "fluent-3d": ", 3d style",
    "fluent-flat": ", flat style",
    "noto": ", noto style",
    "noto-classic": ", classic style",
}

COLOURS = {
    "white": (250, 250, 250),
    "light gray": (200, 200, 205),
    "gray": (128, 128, 132),
    "black": (22, 22, 26),
    "red": (205, 40, 45),
    "dark red": (110, 18, 26),
    "orange": (240, 140, 40),
    "yellow": (248, 212, 70),
    "beige": (232, 215, 182),
    "brown": (118, 76, 46),
    "light green": (160, 220, 140),
    "green": (60, 165, 75),
    "dark green": (18, 80, 44),
    "teal": (24, 138, 138),
    "light blue": (150, 205, 245),
    "blue": (45, 105, 215),
    "dark blue": (20, 36, 98),
    "purple": (125, 65, 175),
    "lavender": (200, 180, 235),
    "pink": (245, 150, 185),
}
PLURAL_LOOKING = ("ss", "us", "is", "lens", "bus", "gas")


@dataclass
class Recipe:
    """One picture in numbers (arrays gain a leading batch axis when stacked).

    `centre` and `size` are in units of the picture's side, (y, x); `sprite` is -1 for an empty
    layer; colours are 0..1 RGB at both ends of the gradient; `angle` in radians; `noise` is the
    standard deviation of the smooth background noise; `paint` is the RGB that a layer's coloured
    parts take, -1 where they stay as they are.
    """

    sprite: Int[np.ndarray, "layers"]
    centre: Float[np.ndarray, "layers 2"]
    size: Float[np.ndarray, "layers"]
    colours: Float[np.ndarray, "2 3"]
    paint: Float[np.ndarray, "layers 3"]
    angle: float = 0.0
    noise: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Picture:
    """One drawing of the archive: its style, code point, name, tags and group of things."""

    style: str
    code_point: str
    name: str
    tags: tuple[str, ...] = field(default=())
    group: str = ""


def article(name: str) -> str:
    """The name with "a" or "an", or bare when it is a plural."""
    last = name.split()[-1]
    if last.endswith("s") and not last.endswith(PLURAL_LOOKING):
        return name
    return ("an " if name[0] in "aeiou" else "a ") + name


def colour(name: str, rng: np.random.Generator, jitter: float = 0.035) -> np.ndarray:
    """A shade of the named colour, RGB in 0..1."""
    return np.clip(np.array(COLOURS[name]) / 255 + rng.normal(0, jitter, 3), 0, 1)


def draw_background(rng: np.random.Generator) -> tuple[str, np.ndarray, float]:
    """Words, gradient colours [2, 3] and noise strength of a coloured background."""
    names = list(COLOURS)
    first = names[rng.integers(len(names))]
    noise = rng.uniform(0.0, 0.06)
    if rng.random() < 0.2:
        second = names[rng.integers(len(names))]
        if second != first:
            words = f" on a {first} to {second} gradient"
            return words, np.stack([colour(first, rng), colour(second, rng)]), noise
    shade = colour(first, rng)
    return f" on {article(first)} background", np.stack([shade, shade * rng.uniform(0.7, 1)]), noise


def empty_recipe(rng: np.random.Generator) -> Recipe:
    """A white picture with no layers, to be filled."""
    return Recipe(
        sprite=np.full(LAYERS, -1, np.int32),
        centre=np.full((LAYERS, 2), 0.5, np.float32),
        size=np.full(LAYERS, 0.5, np.float32),
        colours=np.ones((2, 3), np.float32),
        paint=np.full((LAYERS, 3), -1, np.float32),
        angle=float(rng.uniform(0, 2 * np.pi)),
        seed=int(rng.integers(2**31)),
    )


def style_said(style: str, plain: str, rng: np.random.Generator) -> str:
    """Whether a caption of one thing says its style before it, after it, or not: ""

    plain: the one style that may go unsaid. A caption that says none means four drawings where
    there is none such, and a model that draws the bits of a scale each for itself mixes them.
    """
    chance = rng.random()
    before, after = (0.5, 0.8) if not plain else (0.25, 0.4) if style == plain else (0.6, 1.0)
    return "before" if chance < before else "after" if chance < after else ""


def single(
    index: int, picture: Picture, rng: np.random.Generator, plain: str = "", paint: str = ""
) -> tuple[str, Recipe]:
    """One large thing, on white (unsaid or said) or on a coloured background (always said).

    plain: see `style_said`. paint: the colour that it is painted in, said before its name.
    """
    recipe = empty_recipe(rng)
    recipe.sprite[0] = index
    recipe.size[0] = rng.uniform(0.84, 0.92)
    recipe.centre[0] = 0.5 + rng.uniform(-0.25, 0.25, 2) * (1 - recipe.size[0])
    name = f"{paint} {picture.name}".strip()
    if paint:
        recipe.paint[0] = colour(paint, rng)
    words = name if rng.random() < 0.15 else article(name)
    told = style_said(picture.style, plain, rng)
    if told == "before":
        words = STYLE_PREFIX[picture.style][rng.integers(2)] + words
    chance = rng.random()
    if chance < 0.1:
        words += " on a white background"
    elif chance > 0.45:
        phrase, recipe.colours, recipe.noise = draw_background(rng)
        words += phrase
    if told == "after":
        words += STYLE_SUFFIX[picture.style]
    if picture.tags and rng.random() < 0.12:
        words += ", " + ", ".join(rng.permutation(picture.tags)[:2])
    return words, recipe


@dataclass(frozen=True)
class Layout:
    """Centres (y, x) of the things of a scene, give or take `jitter`, and range of their sizes."""

    spots: tuple[tuple[float, float], ...]
    size: tuple[float, float]
    jitter: tuple[float, float]


ABOVE = Layout(((0.27, 0.5), (0.73, 0.5)), (0.43, 0.49), (0.015, 0.05))
BESIDE = Layout(((0.5, 0.27), (0.5, 0.73)), (0.43, 0.49), (0.05, 0.015))
ROW = Layout(((0.5, 0.2), (0.5, 0.5), (0.5, 0.8)), (0.3, 0.34), (0.05, 0.015))
ABOVE_TWO = Layout(((0.27, 0.5), (0.73, 0.27), (0.73, 0.73)), (0.41, 0.45), (0.015, 0.015))


def alone(vertical: int, horizontal: int) -> Layout:
    """One thing of a scene at one of nine places: 0 is the top or the left, 1 the middle."""
    return Layout(((0.3 + 0.2 * vertical, 0.3 + 0.2 * horizontal),), (0.44, 0.52), (0.02, 0.02))


def lay_out(recipe: Recipe, layout: Layout, rng: np.random.Generator) -> None:
    """Give the first layers of a recipe their places and sizes."""
    for layer, spot in enumerate(layout.spots):
        recipe.size[layer] = rng.uniform(*layout.size)
        recipe.centre[layer] = np.array(spot) + rng.uniform(-1, 1, 2) * np.array(layout.jitter)


def arrange(words: list[str], recipe: Recipe, rng: np.random.Generator) -> str:
    """Place one to three named things and say how they stand to each other."""
    if len(words) == 1:
        vertical, horizontal = rng.integers(3, size=2)
        lay_out(recipe, alone(vertical, horizontal), rng)
        place = f"{('top', '', 'bottom')[vertical]} {('left', '', 'right')[horizontal]}".strip()
        return f"{words[0]} at the {place}" if place else f"{words[0]} in the middle"
    if len(words) == 2:
        first, second = words
        if rng.random() < 0.5:
            lay_out(recipe, ABOVE, rng)
            return f"{first} above {second}" if rng.random() < 0.7 else f"{second} below {first}"
        lay_out(recipe, BESIDE, rng)
        chance = rng.random()
        if chance < 0.4:
            return f"{first} to the left of {second}"
        if chance < 0.6:
            return f"{second} to the right of {first}"
        return f"{first} next to {second}" if chance < 0.8 else f"{first} and {second}"
    first, second, third = words
    if rng.random() < 0.5:
        lay_out(recipe, ROW, rng)
        return f"{first}, {second} and {third} in a row"
    lay_out(recipe, ABOVE_TWO, rng)
    return f"{first} above {second} and {third}"


def scene(
    indices: list[int], pictures: list[Picture], rng: np.random.Generator, plain: str = ""
) -> tuple[str, Recipe]:
    """One to three cut-outs of one style on a coloured background."""
    recipe = empty_recipe(rng)
    recipe.sprite[: len(indices)] = indices
    words = arrange([article(pictures[i].name) for i in indices], recipe, rng)
    return words + surroundings(recipe, pictures[indices[0]].style, rng, plain), recipe


def surroundings(recipe: Recipe, style: str, rng: np.random.Generator, plain: str = "") -> str:
    """Give a scene its background; what a caption says of it, and often of the style."""
    phrase, recipe.colours, recipe.noise = draw_background(rng)
    said = 0.6 if not plain else 0.4 if style == plain else 1.0
    return phrase + STYLE_SUFFIX[style] if rng.random() < said else phrase


def draw_style(by_style: dict[str, np.ndarray], rng: np.random.Generator) -> str:
    """A style, by how many pictures it has."""
    weights = np.array([len(v) for v in by_style.values()], float)
    return list(by_style)[rng.choice(len(by_style), p=weights / weights.sum())]


def draw_example(
    pictures: list[Picture],
    by_style: dict[str, np.ndarray],
    rng: np.random.Generator,
    scenes: float = 0.5,
    plain: str = "",
) -> tuple[str, Recipe]:
    """A random caption and its recipe; `scenes` is the share of composed scenes.

    plain: the one style that may go unsaid, see `style_said`; none: all may.
    """
    style = draw_style(by_style, rng)
    if rng.random() >= scenes:
        index = int(rng.choice(by_style[style]))
        return single(index, pictures[index], rng, plain)
    count = int(rng.choice(3, p=(0.2, 0.5, 0.3))) + 1
    chosen = [int(i) for i in rng.choice(by_style[style], count, replace=False)]
    return scene(chosen, pictures, rng, plain)


def stack(recipes: list[Recipe]) -> dict[str, np.ndarray]:
    """A batch of recipes as arrays (the argument of `compose.compose`)."""
    return {
        "sprite": np.stack([r.sprite for r in recipes]).astype(np.int32),
        "centre": np.stack([r.centre for r in recipes]).astype(np.float32),
        "size": np.stack([r.size for r in recipes]).astype(np.float32),
        "colours": np.stack([r.colours for r in recipes]).astype(np.float32),
        "paint": np.stack([r.paint for r in recipes]).astype(np.float32),
        "angle": np.array([r.angle for r in recipes], np.float32),
        "noise": np.array([r.noise for r in recipes], np.float32),
        "seed": np.array([r.seed for r in recipes], np.uint32),
    }
