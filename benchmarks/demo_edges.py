"""What melts the edges of the demo's pictures: the tokenizer, or the transformer's last scales?

    python -m benchmarks.demo_edges

Training pictures, single things and scenes, are encoded to bits. These are decoded as they are;
with the last three scales left out; and with the last three scales drawn by the model, which is
given the right bits before every scale (forced: the likelier bits, and bits drawn as in
generation), or draws the last three one after the other. Beside them stands what the model draws
from the caption alone. PSNR is against the true picture. Sharpness is the mean slope of brightness
at the steepest fiftieth of the pixels, relative to the true picture's: there where the true picture
is steep ("in place"), or wherever it is steepest itself ("anywhere"). Writes `demo_edges.json` and
a sheet whose columns are the ways, in the order of the file.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from benchmarks import _record as record
from benchmarks._options import add_out, parser_of
from benchmarks.demo_pictures import psnr
from benchmarks.demo_training import draw, encode_pictures, to_uint8
from examples.gallery import contact_sheet
from examples.train_demo.captions import draw_example
from examples.train_demo.captions import stack as stacked
from examples.train_demo.pictures import load_sprites
from sparvar_jax.models import sampling
from sparvar_jax.models.quantizer import quantise, sum_codes
from sparvar_jax.pipelines.pipeline import Pipeline

LAST = 3
STEEP = 0.02
SHOWN = 6  # pictures on the sheet


def slopes(picture: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w"]:
    """How fast brightness changes from a pixel to the next, 0..255 a pixel."""
    luma = picture.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    down, right = np.diff(luma, axis=0)[:, :-1], np.diff(luma, axis=1)[:-1]
    return np.hypot(down, right)


def sharpness(picture: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Mean slope at the steepest pixels relative to the true picture's, in place and anywhere."""
    ours, theirs = slopes(picture), slopes(truth)
    count = max(1, round(STEEP * theirs.size))
    where = np.argpartition(theirs.ravel(), -count)[-count:]
    steepest = np.partition(ours.ravel(), -count)[-count:]
    scale = float(theirs.ravel()[where].mean())
    return {
        "sharpness_in_place": float(ours.ravel()[where].mean()) / scale,
        "sharpness_anywhere": float(steepest.mean()) / scale,
    }


class Ways:
    """Bits of a picture, whole or with the last scales in the hands of the model."""

    def __init__(self, pipe: Pipeline):
        self._pipe = pipe
        self.model: Any = pipe.model
        self._sizes = pipe.request("a", size="1M", plan="dense").plan.schedule.sizes
        self._decode = jax.jit(
            lambda tokenizer, labels: tokenizer.decode(sum_codes(labels, self._sizes[-1]))
        )

    def picture(self, labels: Any) -> UInt8[np.ndarray, "h w 3"]:
        """What the tokenizer decodes; fewer scales are the sum of the first ones."""
        grids = tuple(
            jnp.asarray(label).reshape(1, *size, -1)
            for label, size in zip(labels, self._sizes, strict=False)
        )
        return to_uint8(self._decode(self.model.tokenizer, grids))[0]

    def truth(self, latents: Any) -> list[np.ndarray]:
        """The right bits of every scale, [1, tokens, bits]."""
        labels = quantise(latents, self._sizes).labels
        return [np.asarray(label).reshape(1, -1, label.shape[-1]) for label in labels]

    def drawn(
        self, request: Any, forced: list[np.ndarray]
    ) -> tuple[list[np.ndarray], list[dict[str, np.ndarray]]]:
        """Bits of all scales, the first ones forced, and the logits [1, tokens, bits, 2]."""
        generator = self._pipe.generator
        state, bits, logits = generator.start(request.plan, 1), [], []
        for index in range(len(self._sizes)):
            tokens = jnp.asarray(forced[index]) if index < len(forced) else None
            state, output = generator.decode_scale(
                request.plan, index, request.condition, state, request.controls, request.keys,
                forced=tokens, capture=True,
            )  # fmt: skip
            bits.append(np.asarray(output.tokens))
            shape = (*bits[-1].shape, 2)
            logits.append(
                {
                    name: np.asarray(output.captured[f"{name}_logits"][:1], np.float32).reshape(
                        shape
                    )
                    for name in ("raw", "guided")
                }
            )
        return bits, logits

    def all_of(self, caption: str, seed: int, truth: list[np.ndarray]) -> dict[str, Any]:
        """Bits by way of drawing."""
        request = self._pipe.request(caption, size="1M", seed=seed, plan="dense")
        early, split = truth[:-LAST], len(truth) - LAST
        logits = self.drawn(request, truth)[1][split:]
        keys, top_p = jax.vmap(jax.random.fold_in, (0, None)), request.controls.top_p
        sampled = [
            np.asarray(
                sampling.sample_bits(jnp.asarray(pair["guided"]), top_p, keys(request.keys, index))
            )
            for index, pair in enumerate(logits, split)
        ]
        likelier = {
            name: [
                np.asarray(sampling.sample_bits(jnp.asarray(pair[name]), top_p, None))
                for pair in logits
            ]
            for name in ("raw", "guided")
        }
        return {
            "right bits": truth,
            "last three left out": early,
            "last three forced, likelier bits": early + likelier["guided"],
            "last three forced, likelier bits without guidance": early + likelier["raw"],
            "last three forced, drawn bits": early + sampled,
            "last three drawn": self.drawn(request, early)[0],
            "all drawn": self.drawn(request, [])[0],
        }


def examples(count: int, things: int | None, seed: int) -> tuple[list[str], Any, Any]:
    """Captions, recipes and sprites of training pictures, single things and scenes in turn."""
    collection, sprites = load_sprites(things)
    rng = np.random.default_rng(seed)
    styles = {
        style: found
        for style, found in collection.by_style(collection.distinct(collection.train)).items()
        if len(found) >= 3
    }
    drawn = [
        draw_example(collection.pictures, styles, rng, scenes=float(number % 2))
        for number in range(count)
    ]
    return [words for words, _ in drawn], [recipe for _, recipe in drawn], sprites


def main() -> None:
    """Measure, print and write."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", help="model directory, default the demo")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--things", type=int, help="only so many things (rehearsal)")
    add_out(parser)
    asked = parser.parse_args()
    ways = Ways(Pipeline.from_checkpoint(asked.model))
    captions, recipes, sprites = examples(asked.count, asked.things, seed=11)
    found: dict[str, list[dict[str, Any]]] = {}
    sheet: list[np.ndarray] = []
    for number, (caption, recipe) in enumerate(zip(captions, recipes, strict=True)):
        one = stacked([recipe])
        true = to_uint8(draw(sprites, one))[0]
        truth = ways.truth(encode_pictures(ways.model.tokenizer, sprites, one))
        row = [true]
        for name, bits in ways.all_of(caption, number, truth).items():
            picture = ways.picture(bits)
            row.append(picture)
            right = [float((a == b).mean()) for a, b in zip(bits, truth, strict=False)][-LAST:]
            found.setdefault(name, []).append(
                {
                    "psnr": psnr(picture, true),
                    **sharpness(picture, true),
                    "bits_right": right if len(bits) == len(truth) else None,
                }
            )
        sheet += row if number < SHOWN else []
        print(f"{number + 1} of {asked.count}: {caption}", flush=True)
        # After every picture: what is there counts, should the rest not come.
        rows = [summary(name, figures) for name, figures in found.items()]
        file = record.write_entries(
            "demo_edges", {"captions": captions[: number + 1], "rows": rows}, folder=asked.out
        )
        contact_sheet(sheet, len(found) + 1).save(file.with_suffix(".webp"), quality=85)
    for row in rows:
        print(row)


def summary(way: str, figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the pictures of single things and of scenes."""
    row: dict[str, Any] = {"way": way, "pictures": len(figures)}
    for kind, part in (("single", figures[::2]), ("scenes", figures[1::2])):
        if not part:
            continue
        for name in ("psnr", "sharpness_in_place", "sharpness_anywhere"):
            row[f"{kind}_{name}"] = round(float(np.mean([f[name] for f in part])), 3)
        bits = [f["bits_right"] for f in part if f["bits_right"] is not None]
        row[f"{kind}_bits_right"] = np.mean(bits, axis=0).round(4).tolist() if bits else None
    return row


if __name__ == "__main__":
    main()
