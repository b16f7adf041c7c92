"""Draw the free prompts for a look: sheets of sixteen pictures, each with its number and prompt.

    python -m examples.free_prompts.draw --out runs/before
    python -m examples.free_prompts.draw --out runs/after --model runs/model
    python -m examples.free_prompts.draw --out runs/again --prompts again

Picture n has seed n and is drawn by the model's own default plan, guidance and temperature. Writes
`sheet-1.webp` and so on, and `looked.json`: every prompt with an empty verdict, to be filled by
whoever looks at the sheets (`verdicts.py` says how, and counts). Sixty-four pictures take about
twenty minutes on two idle CPU cores; `--sheets 3 4` draws a part.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from benchmarks import _record as record
from examples.free_prompts.verdicts import LISTS, prompts_of
from sparvar_jax.pipelines.pipeline import Pipeline

COLUMNS, PER_SHEET = 4, 16
LINE, TEXT_SIZE, MARGIN = 15, 12, 4
LINES = 2


def captioned_sheet(
    pictures: Sequence[UInt8[np.ndarray, "height width 3"]], captions: Sequence[str]
) -> Image.Image:
    """Pictures in rows of four, what was asked for written below each."""
    height, width, _ = pictures[0].shape
    font = ImageFont.load_default(TEXT_SIZE)
    across, down = width + MARGIN, height + LINES * LINE + MARGIN
    sheet = Image.new("RGB", (COLUMNS * across, -(-len(pictures) // COLUMNS) * down), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = index % COLUMNS * across, index // COLUMNS * down
        sheet.paste(Image.fromarray(picture), (left, top))
        for line, words in enumerate(wrapped(caption, font, width)[:LINES]):
            pen.text((left, top + height + line * LINE), words, fill="black", font=font)
    return sheet


def wrapped(text: str, font: Any, width: int) -> list[str]:
    """The words of a text in lines that are at most `width` pixels long."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def main() -> None:
    """Draw the sheets asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="model directory; the demo model by default")
    parser.add_argument("--plan", help="the model's own by default")
    parser.add_argument("--prompts", choices=LISTS, default=LISTS[0], help="which list")
    parser.add_argument("--size", default="1M", help="smaller ones are for rehearsals")
    parser.add_argument("--out", type=Path, default=Path("runs/free"))
    parser.add_argument("--sheets", type=int, nargs="+", help="only these, counted from 1")
    args = parser.parse_args()
    entries = prompts_of(args.prompts)
    args.out.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline.from_checkpoint(args.model)
    options = {"size": args.size} | ({"plan": args.plan} if args.plan else {})
    began = time.time()
    for number in args.sheets or range(1, -(-len(entries) // PER_SHEET) + 1):
        part = entries[(number - 1) * PER_SHEET : number * PER_SHEET]
        pictures = [
            np.asarray(pipeline(entry["prompt"], seed=entry["number"], **options).images[0])
            for entry in part
        ]
        captions = [f"{entry['number']}  {entry['prompt']}" for entry in part]
        captioned_sheet(pictures, captions).save(args.out / f"sheet-{number}.webp", quality=88)
        print(f"sheet {number} after {time.time() - began:.0f} s", flush=True)
    drawn = {
        **record.describe(),
        "model": args.model or "demo",
        "plan": args.plan or pipeline.model.defaults.plan,
        "prompts": args.prompts,
        "verdicts": [{**entry, "verdict": "", "seen": ""} for entry in entries],
    }
    looked = args.out / "looked.json"
    if not looked.exists():  # never over what somebody wrote into it
        looked.write_text(json.dumps(drawn, indent=1) + "\n")


if __name__ == "__main__":
    main()
