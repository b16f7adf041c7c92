"""The archive as pixels: 256 x 256 RGBA sprites in memory, and the train / held-out split."""

import io
import json
import multiprocessing
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from examples.train_demo.build_archive import ARCHIVE, DATA
from examples.train_demo.captions import Picture

SIDE = 256
HELD_OUT_SHARE = 0.03
# Emojibase subgroups of people, hands, faces and hearts: hundreds of drawings that differ by a few
# pixels, which a model of this size does not tell apart.
ALIKE = re.compile("face|cat-face|monkey-face|person|family|hand|body|emotion|heart")


@dataclass(frozen=True)
class Collection:
    """All pictures of the archive with the indices of both splits."""

    pictures: list[Picture]
    train: Int[np.ndarray, "train"]
    held_out: Int[np.ndarray, "held_out"]

    def distinct(self, indices: Int[np.ndarray, "some"]) -> Int[np.ndarray, "fewer"]:
        """Those of the given indices whose things are no people, faces, hands or hearts."""
        return np.array([i for i in indices if not ALIKE.match(self.pictures[i].group)], np.int64)

    def by_style(self, indices: Int[np.ndarray, "some"]) -> dict[str, np.ndarray]:
        """The given indices, grouped by style."""
        styles = np.array([p.style for p in self.pictures])[indices]
        return {str(s): indices[styles == s] for s in np.unique(styles)}


def split(pictures: list[Picture], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and held-out pictures: 3 % of the (thing, style) pairs.

    A held-out thing stays in training in at least one other style, so the held-out set asks for
    a known thing in a style it was not seen in.
    """
    rng = np.random.default_rng(seed)
    left: dict[str, int] = {}
    for picture in pictures:
        left[picture.code_point] = left.get(picture.code_point, 0) + 1
    held: list[int] = []
    for index in rng.permutation(len(pictures)):
        point = pictures[index].code_point
        if left[point] == 4 and len(held) < HELD_OUT_SHARE * len(pictures):
            held.append(int(index))
            left[point] = 0
    train = np.setdiff1d(np.arange(len(pictures)), held)
    return train, np.sort(np.array(held))


def _rasterise(drawing: str | bytes) -> UInt8[np.ndarray, "side side 4"]:
    if isinstance(drawing, str):
        import resvg_py

        png = resvg_py.svg_to_bytes(svg_string=drawing, width=SIDE, height=SIDE)
        image = Image.open(io.BytesIO(bytes(png)))
    else:
        image = Image.open(io.BytesIO(drawing))
    image = image.convert("RGBA")
    if image.size != (SIDE, SIDE):
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        canvas = Image.new("RGBA", (SIDE, SIDE))
        canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
        image = canvas
    return np.asarray(image)


def load(archive: Path = ARCHIVE, limit: int | None = None) -> tuple[Collection, list[str | bytes]]:
    """Read the archive: names and splits, and the undrawn drawings (SVG text or WebP bytes).

    `limit` keeps only pictures of the first so many things (for rehearsals).
    """
    with tarfile.open(archive) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    rows = [json.loads(line) for line in files["pictures.jsonl"].decode().splitlines()]
    if limit is not None:
        points = sorted({row["code_point"] for row in rows})
        kept = set(points[:: max(1, len(points) // limit)])
        rows = [row for row in rows if row["code_point"] in kept]
    drawings = [
        row["svg"] if "svg" in row else files[f"{row['style']}/{row['code_point']}.webp"]
        for row in rows
    ]
    pictures = [
        Picture(row["style"], row["code_point"], row["name"], tuple(row["tags"]), row["group"])
        for row in rows
    ]
    train, held_out = split(pictures)
    return Collection(pictures, train, held_out), drawings


def render(drawings: list[str | bytes]) -> UInt8[np.ndarray, "pictures side side 4"]:
    """Rasterise all drawings on every core of the machine."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count()) as pool:
        return np.stack(pool.map(_rasterise, drawings, chunksize=16))


def load_sprites(
    limit: int | None = None,
) -> tuple[Collection, UInt8[np.ndarray, "P side side 4"]]:
    """The collection and its sprites; rendered once, then kept in `.data`."""
    collection, drawings = load(limit=limit)
    cache = DATA / f"sprites-{len(drawings)}.npy"
    if not cache.exists():
        np.save(cache, render(drawings))
    return collection, np.load(cache)
