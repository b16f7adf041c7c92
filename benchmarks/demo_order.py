"""Does the demo model know which thing a caption puts where? Losses of captions that say it wrong.

    python -m benchmarks.demo_order

Scenes of one thing above another are read with their own caption, with the two things exchanged,
and with another background's words. A model that reads word order finds the exchanged captions
worse; one that takes a caption for a bag of words does not. Writes `demo_order.json`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _record as record
from benchmarks._options import add_out, parser_of
from benchmarks.demo_training import encode_pictures, losses
from examples.train_demo import vocabulary
from examples.train_demo.captions import (
    ABOVE,
    STYLE_SUFFIX,
    Recipe,
    article,
    draw_background,
    empty_recipe,
    lay_out,
    stack,
)
from examples.train_demo.pictures import Collection, load_sprites
from sparvar_jax.models.t5 import encode
from sparvar_jax.pipelines.loading import load_model

SCALES = 6  # places are decided by then
AT_ONCE = 16


def scenes(collection: Collection, count: int, seed: int) -> tuple[list[Recipe], dict[str, Any]]:
    """Recipes of training things, one above the other, and captions by what they say wrong."""
    rng = np.random.default_rng(seed)
    things = collection.by_style(collection.distinct(collection.train))
    styles = [style for style, pictures in things.items() if len(pictures) >= 2]
    captions: dict[str, list[str]] = {"right": [], "things exchanged": [], "other background": []}
    recipes = []
    for number in range(count):
        style = styles[number % len(styles)]
        pair = rng.choice(things[style], 2, replace=False)
        upper, lower = (article(collection.pictures[int(index)].name) for index in pair)
        recipe = empty_recipe(rng)
        recipe.sprite[:2] = pair
        lay_out(recipe, ABOVE, rng)
        words, recipe.colours, recipe.noise = draw_background(rng)
        end = STYLE_SUFFIX[style]  # unsaid, a caption means the one plain style
        captions["right"].append(f"{upper} above {lower}{words}{end}")
        captions["things exchanged"].append(f"{lower} above {upper}{words}{end}")
        other = draw_background(rng)[0]
        captions["other background"].append(f"{upper} above {lower}{other}{end}")
        recipes.append(recipe)
    return recipes, captions


def main() -> None:
    """Print the losses and write them."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", help="model directory, default the demo")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--things", type=int, help="only so many things (rehearsal)")
    add_out(parser)
    asked = parser.parse_args()
    model = load_model(asked.model)
    collection, sprites = load_sprites(asked.things)
    sprites = jax.device_put(sprites)
    recipes, captions = scenes(collection, asked.count, seed=5)
    latents = jnp.concatenate(
        [
            encode_pictures(model.tokenizer, sprites, stack(recipes[start : start + AT_ONCE]))
            for start in range(0, len(recipes), AT_ONCE)
        ]
    )
    rows = []
    for name, words in captions.items():
        ids, lengths = vocabulary.tokenise(vocabulary.read(), words)
        text = encode(model.text_encoder, ids, lengths)
        loss = losses(model.transformer, latents, text, lengths, scales=SCALES)
        rows.append(
            {"caption": name, "pictures": len(words), "bit_loss": np.asarray(loss).tolist()}
        )
        print(f"{name:18}", *(f"{value:.4f}" for value in rows[-1]["bit_loss"]), flush=True)
    record.write("demo_order", rows, folder=asked.out)


if __name__ == "__main__":
    main()
