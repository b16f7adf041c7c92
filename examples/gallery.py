"""Contact sheets of the demo model: fixed prompts, and one picture over its 13 scales.

Run `python -m examples.gallery --out gallery`: 64 pictures take a second on a GPU and about an
hour on two CPU cores, so `--count` draws fewer. `--plan` takes any plan `sparvar generate` takes.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sparvar_jax.pipelines.pipeline import Pipeline

PROMPTS = Path(__file__).parent / "train_demo" / "prompts.json"
MARGIN = 4


def contact_sheet(
    pictures: Sequence[UInt8[np.ndarray, "height width 3"]], columns: int
) -> Image.Image:
    """Pictures of one size in rows of `columns`, with white margins."""
    height, width, _ = pictures[0].shape
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + MARGIN), columns * (width + MARGIN), 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + MARGIN), index % columns * (width + MARGIN)
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet[:-MARGIN, :-MARGIN])


def draw(
    pipeline: Pipeline, prompts: Sequence[str], batch: int, **options: object
) -> list[UInt8[np.ndarray, "height width 3"]]:
    """One picture a prompt; picture i has seed i, whatever the batch size."""
    pictures: list[np.ndarray] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        pictures += list(pipeline(part, seed=start, **options))
    return pictures


def main() -> None:
    """Draw and write the sheets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="model directory; the demo model by default")
    parser.add_argument("--plan", default="dense")
    parser.add_argument("--count", type=int, default=32, help="prompts of each list")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("gallery"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline.from_checkpoint(args.model)
    lists = json.loads(PROMPTS.read_text())
    for name in ("single", "scenes"):
        prompts = [entry["prompt"] for entry in lists[name][: args.count]]
        pictures = draw(pipeline, prompts, args.batch, plan=args.plan)
        contact_sheet(pictures, columns=min(8, len(pictures))).save(args.out / f"{name}.png")
    steps = [p[0] for p in pipeline.stream(lists["scenes"][0]["prompt"], plan=args.plan)]
    contact_sheet(steps, columns=len(steps)).save(args.out / "strip.png")


if __name__ == "__main__":
    main()
