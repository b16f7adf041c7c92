"""Does the demo draw what it is asked for? Concept retrieval in an independent network's features.

Run `python -m benchmarks.demo_retrieval --pictures runs/pictures` on what `demo_pictures` wrote:
the arrays, or the contact sheets where only these were kept (they are lossy; the result says so). A
picture of one thing counts as right when a training picture of the named thing is among the 10
nearest of all training pictures, drawn alike on white, by cosine of EfficientNet-Lite0 features.
For scenes every named thing counts alone: the best of the crops at the places a scene can put
things is taken. Chance is measured with the prompts shuffled. `true_scenes` is what is found of the
scenes as training itself would draw them: about the most that this judge can find.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from benchmarks import _record as record
from benchmarks import demo_truth
from benchmarks._record import RESULTS, device_folder
from benchmarks.demo_pictures import SHEET_COLUMNS
from examples.gallery import MARGIN, PROMPTS
from examples.train_demo.features import Features
from examples.train_demo.pictures import load_sprites

NEAREST = 10
# Crops of scenes: (top, left, side) as shares of the picture.
CROPS = tuple((y, x, 0.52) for y in (0.0, 0.24, 0.48) for x in (0.0, 0.24, 0.48)) + tuple(
    (y, x, 0.4) for y in (0.0, 0.3, 0.6) for x in (0.0, 0.3, 0.6)
)


def drawn_pictures(folder: Path, name: str, count: int) -> UInt8[np.ndarray, "B h w 3"] | None:
    """The pictures of a list: from the array, else cut out of the contact sheet, else None.

    count: pictures of the whole list. Raises ValueError for a sheet of fewer.
    """
    if (folder / f"{name}.npy").exists():
        return np.load(folder / f"{name}.npy")
    sheet = folder / f"{name}.webp"
    if not sheet.exists():
        return None
    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    columns = min(SHEET_COLUMNS, count)
    side = (pixels.shape[1] + MARGIN) // columns - MARGIN
    step = side + MARGIN
    if pixels.shape[0] != -(-count // columns) * step - MARGIN:
        raise ValueError(
            f"{sheet} does not show {count} pictures in rows of {columns}: draw the whole list"
        )
    corners = [(i // columns * step, i % columns * step) for i in range(count)]
    return np.stack([pixels[top : top + side, left : left + side] for top, left in corners])


def on_white(sprites: UInt8[np.ndarray, "P h w 4"]) -> UInt8[np.ndarray, "P h w 3"]:
    """Every sprite at 7/8 of the picture on white, as training draws single things."""
    pictures = np.full((*sprites.shape[:3], 3), 255, np.uint8)
    for picture, sprite in zip(pictures, sprites, strict=True):
        side = sprite.shape[0]
        image = Image.new("RGBA", (side, side), (255, 255, 255, 255))
        small = Image.fromarray(sprite).resize((side * 7 // 8,) * 2, Image.Resampling.BILINEAR)
        image.alpha_composite(small, (side // 16,) * 2)
        picture[:] = np.asarray(image.convert("RGB"))
    return pictures


def crops(pictures: UInt8[np.ndarray, "B h w 3"]) -> UInt8[np.ndarray, "BK h w 3"]:
    """All crops of all pictures, enlarged to the pictures' size; a picture's crops are adjacent."""
    side, found = pictures.shape[1], []
    for picture in map(Image.fromarray, pictures):
        for top, left, share in CROPS:
            box = tuple(round(side * v) for v in (left, top, left + share, top + share))
            found.append(np.asarray(picture.crop(box).resize((side, side))))
    return np.stack(found)


def hits(
    features: Float[np.ndarray, "B F"],
    gallery: Float[np.ndarray, "P F"],
    points: np.ndarray,
    asked: list[str],
) -> np.ndarray:
    """Whether the asked code point is among the nearest gallery pictures, for every row."""
    order = np.argsort(-(features @ gallery.T), axis=1)[:, :NEAREST]
    return np.array([point in points[row] for point, row in zip(asked, order, strict=True)])


def judge(
    folder: Path, features: Features, gallery: Float[np.ndarray, "P F"], points: np.ndarray
) -> dict[str, float | int]:
    """Shares of things found, and the same by chance, for the lists drawn in a folder."""
    lists = json.loads(PROMPTS.read_text())
    rng = np.random.default_rng(0)
    found: dict[str, float | int] = {}
    for name in ("single", "retrieval"):
        pictures = drawn_pictures(folder, name, len(lists[name]))
        if pictures is None:
            continue
        drawn = features(pictures)
        asked = [entry["code_points"][0] for entry in lists[name]][: len(drawn)]
        shuffled = [
            hits(drawn, gallery, points, list(rng.permutation(asked))).mean() for _ in range(5)
        ]
        found |= {
            f"{name}_pictures": len(drawn),
            name: float(hits(drawn, gallery, points, asked).mean()),
            f"{name}_chance": float(np.mean(shuffled)),
        }
    pictures = drawn_pictures(folder, "scenes", len(lists["scenes"]))
    if pictures is not None:
        found |= judge_scenes(features, pictures, lists["scenes"], gallery, points, rng)
    return found


def judge_scenes(
    features: Features,
    pictures: UInt8[np.ndarray, "B h w 3"],
    entries: list[dict],
    gallery: Float[np.ndarray, "P F"],
    points: np.ndarray,
    rng: np.random.Generator,
) -> dict[str, float | int]:
    """Share of the named things of scenes that are found in a crop, and the same by chance."""
    drawn = features(crops(pictures)).reshape(len(pictures), len(CROPS), -1)
    objects = [
        hits(rows, gallery, points, [point] * len(CROPS)).any()
        for rows, entry in zip(drawn, entries, strict=False)
        for point in entry["code_points"]
    ]
    chance = [
        hits(rows, gallery, points, [str(rng.choice(points))] * len(CROPS)).any()
        for rows in drawn
        for _ in range(20)
    ]
    return {
        "scene_objects": len(objects),
        "scenes": float(np.mean(objects)),
        "scenes_chance": float(np.mean(chance)),
    }


def main() -> None:
    """Write `results/<device>/demo_retrieval.json`: an entry for every setting that was drawn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", default=device_folder(), help="where the pictures were drawn")
    parser.add_argument("--weights", type=Path, help="EfficientNet-Lite0 file, if not installed")
    parser.add_argument("--things", type=int, help="only so many things (rehearsal)")
    args = parser.parse_args()
    features = Features(args.weights)
    collection, sprites = load_sprites(args.things)
    gallery = features(on_white(sprites[collection.train]))
    points = np.array([collection.pictures[i].code_point for i in collection.train])
    found = {
        folder.name.replace("-", ":"): judge(folder, features, gallery, points)
        for folder in sorted(args.pictures.iterdir())
        if folder.is_dir()
    }
    lossy = any(not s.with_suffix(".npy").exists() for s in args.pictures.rglob("*.webp"))
    report = {
        "pictures": "WebP contact sheets" if lossy else "arrays",
        "gallery": len(points),
        "nearest": NEAREST,
        "settings": found,
    }
    if args.things is None:
        entries, rng = json.loads(PROMPTS.read_text())["scenes"], np.random.default_rng(0)
        true = demo_truth.scenes(entries, collection, sprites)
        report["true_scenes"] = judge_scenes(features, true, entries, gallery, points, rng)
    print(json.dumps(report, indent=1))
    record.write_entries("demo_retrieval", report, folder=args.results / args.device)


if __name__ == "__main__":
    main()
