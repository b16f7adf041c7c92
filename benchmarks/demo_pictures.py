"""Draw the demo's fixed prompts and store them for `demo_retrieval.py`; what the last scales add.

Run `python -m benchmarks.demo_pictures --out runs/pictures --device h100`. It writes every picture
as lossless WebP, contact sheets, and how far pictures whose last two scales were skipped lie from
the full ones (`results/<device>/demo_scales.json`).
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from examples.gallery import PROMPTS, contact_sheet
from sparvar_jax.pipeline import Pipeline

RESULTS = Path(__file__).parent / "results"
SKIPPED = 2


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB of two uint8 pictures."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def draw(pipeline: Pipeline, prompts: list[str], batch: int, **options: object):
    """Full pictures, and the same without their last two scales; picture i has seed i."""
    full, skipped = [], []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        padded = part + part[-1:] * (batch - len(part))
        stages = list(pipeline.stream(padded, seed=start, **options))
        full += list(stages[-1][: len(part)])
        skipped += list(stages[-1 - SKIPPED][: len(part)])
    return full, skipped


def main() -> None:
    """Draw every list; scenes also give the figure of the last scales."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--lists", nargs="+", default=["single", "scenes", "retrieval"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline.from_checkpoint(args.model)
    lists = json.loads(PROMPTS.read_text())
    for name in args.lists:
        prompts = [entry["prompt"] for entry in lists[name]]
        full, skipped = draw(
            pipeline, prompts, args.batch, guidance=args.guidance, temperature=args.temperature
        )
        for index, picture in enumerate(full):
            Image.fromarray(picture).save(args.out / f"{name}-{index:03}.webp", lossless=True)
        contact_sheet(full, 8).save(args.out / f"{name}.webp", quality=92)
        distances = [psnr(a, b) for a, b in zip(full, skipped, strict=True)]
        print(f"{name}: PSNR without the last {SKIPPED} scales {np.mean(distances):.2f} dB")
        if name == "scenes":
            found = {
                "pictures": len(full),
                "skipped_scales": SKIPPED,
                "psnr_mean": float(np.mean(distances)),
                "psnr_max": max(distances),
            }
            folder = args.results / args.device
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "demo_scales.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
