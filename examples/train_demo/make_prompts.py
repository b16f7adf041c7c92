"""The fixed prompt lists: 32 single things, 32 scenes, and 200 single things for retrieval.

Run `python -m examples.train_demo.make_prompts` once; `prompts.json` is committed, so figures of
different versions stay comparable. Every entry names the code points it asks for.
"""

import json

import numpy as np

from examples.train_demo.build_archive import HERE
from examples.train_demo.captions import STYLE_PREFIX, STYLE_SUFFIX, article
from examples.train_demo.pictures import load

PROMPTS = HERE / "prompts.json"
SHOWN = (
    "rocket",
    "red apple",
    "tiger face",
    "strawberry",
    "teddy bear",
    "guitar",
    "hamburger",
    "octopus",
    "sunflower",
    "fire engine",
    "penguin",
    "umbrella",
    "avocado",
    "sailboat",
    "rose",
    "hot beverage",
    "fox",
    "soccer ball",
    "christmas tree",
    "pizza",
    "butterfly",
    "crown",
    "watermelon",
    "dolphin",
    "house",
    "cactus",
    "bicycle",
    "wrapped gift",
    "hatching chick",
    "lemon",
    "trophy",
    "jack-o-lantern",
)
BACKGROUNDS = (
    "dark green",
    "light blue",
    "pink",
    "dark blue",
    "yellow",
    "lavender",
    "teal",
    "beige",
)
PATTERNS = (
    "{} above {}",
    "{} to the left of {}",
    "{} next to {}",
    "{} below {}",
    "{} above {} and {}",
    "{}, {} and {} in a row",
    "{} to the right of {}",
    "{} in the middle",
)


def scenes(points: dict[str, str], rng: np.random.Generator) -> list[dict]:
    """32 scenes of the shown things, the four styles in turn, every third without a style."""
    found = []
    for number in range(32):
        pattern = PATTERNS[number % len(PATTERNS)]
        names = [str(n) for n in rng.choice(SHOWN, pattern.count("{}"), replace=False)]
        if number == 0:
            names = ["rocket", "red apple"]
        background = BACKGROUNDS[(number // 4 + number) % len(BACKGROUNDS)]
        text = pattern.format(*map(article, names)) + f" on {article(background)} background"
        if number % 3:
            text += list(STYLE_SUFFIX.values())[number % 4]
        found.append({"prompt": text, "code_points": [points[name] for name in names]})
    found[0]["prompt"] = "a rocket above a red apple on a dark green background"
    return found


def main() -> None:
    """Write `prompts.json`."""
    collection, _ = load()
    pictures = [
        collection.pictures[i] for i in collection.distinct(np.arange(len(collection.pictures)))
    ]
    rng = np.random.default_rng(7)
    points = {p.name: p.code_point for p in pictures}
    styles = list(STYLE_PREFIX)
    single = [
        {
            "prompt": STYLE_PREFIX[styles[i % 4]][i // 4 % 2] + article(name),
            "code_points": [points[name]],
            "style": styles[i % 4],
        }
        for i, name in enumerate(SHOWN)
    ]
    names = sorted(name for name in points if sum(p.name == name for p in pictures) == 4)
    retrieval = [
        {
            "prompt": STYLE_PREFIX[styles[i % 4]][0] + article(str(name)),
            "code_points": [points[str(name)]],
            "style": styles[i % 4],
        }
        for i, name in enumerate(rng.choice(names, 200, replace=False))
    ]
    lists = {"single": single, "scenes": scenes(points, rng), "retrieval": retrieval}
    PROMPTS.write_text(json.dumps(lists, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
