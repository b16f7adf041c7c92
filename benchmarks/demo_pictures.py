"""Draw the demo's fixed prompts for `demo_retrieval.py`, and measure what the last scales add.

Run `python -m benchmarks.demo_pictures --out runs/pictures`. A setting is guidance
and temperature, as in `--settings 3:0.5 5:0.7`; for each there is a folder with an array of
pictures and a contact sheet a list, and an entry in `results/<device>/demo_scales.json`: how far
pictures whose last two scales were skipped lie from the full ones.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from benchmarks import _record as record
from benchmarks._record import RESULTS, device_folder
from examples.gallery import PROMPTS, contact_sheet
from sparvar_jax.pipelines.pipeline import Pipeline

SKIPPED = 2
PLAN = "dense"  # figures of the model, not of a plan
SHEET_COLUMNS = 8
LISTS = ("single", "scenes", "retrieval")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB of two uint8 pictures."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def draw(
    pipeline: Pipeline, prompts: list[str], batch: int, **options: object
) -> tuple[UInt8[np.ndarray, "B height width 3"], UInt8[np.ndarray, "B height width 3"]]:
    """Full pictures, and the same without their last two scales; picture i has seed i."""
    full, skipped = [], []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        # Padded to the one batch size that is compiled.
        padded = part + part[-1:] * (batch - len(part))
        stages = list(pipeline.stream(padded, seed=start, plan=PLAN, **options))
        full += list(stages[-1][: len(part)])
        skipped += list(stages[-1 - SKIPPED][: len(part)])
    return np.stack(full), np.stack(skipped)


def settings(text: str) -> dict[str, float]:
    """`guidance:temperature` as options of a call."""
    guidance, temperature = text.split(":")
    return {"guidance": float(guidance), "temperature": float(temperature)}


def main() -> None:
    """Draw every list with every setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", default=device_folder())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--settings", nargs="+", help="guidance:temperature; the model's default")
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=LISTS)
    parser.add_argument("--count", type=int, help="only so many prompts of each list")
    args = parser.parse_args()
    pipeline = Pipeline.from_checkpoint(args.model)
    default = pipeline.model.defaults
    lists = json.loads(PROMPTS.read_text())
    found = {}
    for setting in args.settings or [f"{default.guidance:g}:{default.temperature:g}"]:
        folder = args.out / setting.replace(":", "-")
        folder.mkdir(parents=True, exist_ok=True)
        for name in args.lists:
            prompts = [entry["prompt"] for entry in lists[name]][: args.count]
            full, skipped = draw(pipeline, prompts, args.batch, **settings(setting))
            np.save(folder / f"{name}.npy", full)
            contact_sheet(full, min(SHEET_COLUMNS, len(full))).save(
                folder / f"{name}.webp", quality=85
            )
            distances = [psnr(a, b) for a, b in zip(full, skipped, strict=True)]
            found.setdefault(setting, {})[name] = {
                "pictures": len(full),
                "skipped_scales": SKIPPED,
                "psnr_mean": float(np.mean(distances)),
                "psnr_max": max(distances),
            }
            print(setting, name, found[setting][name], flush=True)
    record.write_entries("demo_scales", {"settings": found}, folder=args.results / args.device)


if __name__ == "__main__":
    main()
