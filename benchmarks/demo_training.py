"""How well the shipped demo model fits pictures it was not trained on.

Run `python -m benchmarks.demo_training`. Two figures, both of the shipped int8
weights and of held-out (thing, style) pairs: PSNR of the tokenizer on single pictures and scenes
with the worst five, and the bit loss of every scale with the right text and with none.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks import _record as record
from benchmarks._record import RESULTS, device_folder
from examples.gallery import contact_sheet
from examples.train_demo.compose import compose
from examples.train_demo.feed import make_chunk
from examples.train_demo.forward import teacher_forced
from examples.train_demo.pictures import load_sprites
from examples.train_demo.programs import bit_losses
from examples.train_demo.train_tokenizer import psnr
from sparvar_jax.models.quantizer import quantise
from sparvar_jax.models.t5 import encode
from sparvar_jax.pipelines.loading import Model, load_model
from sparvar_jax.plans.schedule import infinity_schedule

SCHEDULE = infinity_schedule(1.0, "1M")


draw = jax.jit(compose)


@jax.jit
def encode_pictures(tokenizer: Any, sprites: Array, recipes: Any) -> Float[Array, "B h w C"]:
    """Latents of drawn recipes."""
    return tokenizer.encode(compose(sprites, recipes))


@jax.jit
def reconstruct(tokenizer: Any, images: Float[Array, "B h w 3"]) -> Float[Array, "B h w 3"]:
    """Pictures encoded to bits and decoded."""
    return tokenizer.decode(quantise(tokenizer.encode(images), SCHEDULE.sizes).code_sum)


def to_uint8(images: Array) -> np.ndarray:
    """Pictures of -1..1 as bytes."""
    return np.asarray((images + 1) * 127.5).clip(0, 255).astype(np.uint8)


def tokenizer_figures(model: Model, sprites: Any, chunk: Any, sheet: Path) -> dict[str, Any]:
    """PSNR of a chunk; the worst five and their reconstructions go to `sheet`."""
    errors, pairs = [], []
    for start in range(0, len(chunk["lengths"]), 8):
        recipes = jax.tree.map(lambda a, s=start: a[s : s + 8], chunk["recipes"])
        images = draw(sprites, recipes)
        decoded = reconstruct(model.tokenizer, images)
        errors += list(np.asarray(jnp.mean((images - decoded) ** 2, axis=(1, 2, 3))))
        pairs += list(zip(to_uint8(images), to_uint8(decoded), strict=True))
    values = np.array([psnr(float(e)) for e in errors])
    worst = np.argsort(values)[:5]
    contact_sheet([p for i in worst for p in pairs[i]], 2).save(sheet)
    return {
        "pictures": len(values),
        "psnr_mean": float(values.mean()),
        "psnr_worst_5": [float(v) for v in values[worst]],
    }


@functools.partial(jax.jit, static_argnames="scales")
def losses(
    model: Any, latents: Array, text: Array, lengths: Array, *, scales: int = len(SCHEDULE)
) -> Float[Array, "scales"]:
    """Bit loss of every scale, or of the first ones alone, in nats a bit."""
    found = quantise(latents, SCHEDULE.sizes)
    logits = teacher_forced(model, text, lengths, found.inputs[: scales - 1], SCHEDULE)
    return bit_losses(logits, found.labels[:scales])[0]


def loss_figures(model: Model, sprites: Any, chunk: Any) -> dict[str, Any]:
    """Mean bit losses of a chunk with its captions and with the learned "no text"."""
    sums = {"with_text": [], "without_text": []}
    none = model.transformer.uncond_text[...]
    for index in range(len(chunk["lengths"])):
        part = jax.tree.map(lambda a, i=index: a[i : i + 1], chunk)
        latents = encode_pictures(model.tokenizer, sprites, part["recipes"])
        text = encode(model.text_encoder, jnp.asarray(part["ids"]), jnp.asarray(part["lengths"]))
        empty = none[None, : text.shape[1]]
        for name, features in (("with_text", text), ("without_text", empty)):
            sums[name].append(losses(model.transformer, latents, features, part["lengths"]))
    return {
        "pictures": len(chunk["lengths"]),
        **{name: np.mean(rows, axis=0).tolist() for name, rows in sums.items()},
    }


def main() -> None:
    """Write `results/<device>/demo_training.json` and the sheets of the worst pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", default=device_folder())
    parser.add_argument("--count", type=int, default=64, help="pictures for PSNR")
    parser.add_argument("--loss-count", type=int, default=16, help="pictures for the bit loss")
    parser.add_argument("--things", type=int, help="only so many things (rehearsal)")
    args = parser.parse_args()
    folder = args.results / args.device
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model(args.model)
    collection, sprites = load_sprites(args.things)
    # Once, so that a GPU does not receive a gigabyte at every call.
    sprites = jax.device_put(sprites)
    found = {}
    for name, scenes in (("single", 0.0), ("scenes", 1.0)):
        chunk = make_chunk(collection, collection.held_out, args.count, 1, scenes)
        sheet = folder / f"demo_worst_{name}.webp"
        found[f"tokenizer_{name}"] = tokenizer_figures(model, sprites, chunk, sheet)
        part = jax.tree.map(lambda a: a[: args.loss_count], chunk)
        found[f"bit_loss_{name}"] = loss_figures(model, sprites, part)
        print(json.dumps(found, indent=1), flush=True)
    record.write_entries("demo_training", found, folder=folder)


if __name__ == "__main__":
    main()
