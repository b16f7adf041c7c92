"""Pictures and numbers of an inspected generation: JSON and PNG files in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.plans.plan import Plan
from sparvar_jax.study import inspection
from sparvar_jax.study.inspection import Options
from sparvar_jax.weights.files import whole_file

QUANTITIES = {
    "sinks": "attention mass on the sink scales",
    "inside": "attention mass inside windows and sinks",
    "likeness": "cosine to the previous scale's attention",
    "covered": "dense attention mass on the blocks the plan reads",
}


def inspect_prompt(
    pipe: Pipeline,
    prompt: str,
    out: Path,
    *,
    plan: str = "sparvar-paper",
    options: Options | None = None,
    **request: Any,
) -> list[dict[str, Any]]:
    """Draw one prompt, measure its attention, and write `inspect.json` and PNG files into `out`.

    request: further options of `Pipeline.request`. Returns the rows of the JSON file. Raises
    ValueError for more than one prompt; needs matplotlib.
    """
    options = options or Options()
    resolved = pipe.request([prompt], plan=plan, **request)
    watched = inspection.observe(resolved.plan, options)
    _, outputs = pipe.generator.run(watched, resolved.condition, resolved.controls, resolved.keys)
    found = inspection.collect(outputs)
    rows = inspection.summarise(resolved.plan, found, options)
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "prompt": prompt,
        "plan": plan,
        "model": pipe.model.name,
        "density": resolved.plan.density(),
        "means": {name: _mean(rows, name) for name in QUANTITIES},
        "rows": rows,
    }
    with whole_file(out / "inspect.json") as file:
        file.write_text(json.dumps(content, indent=1) + "\n")
    for name, title in QUANTITIES.items():
        heatmaps(rows, name, title, out / f"{name}.png")
    for scale in sorted({scale for scale, _ in found}):
        map_sheet(found, resolved.plan, scale).save(out / f"maps-{scale}.png", optimize=True)
    return rows


def _mean(rows: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Scale -> mean over layers and heads."""
    found: dict[str, float] = {}
    for scale in sorted({row["scale"] for row in rows}):
        values = [row[name] for row in rows if row["scale"] == scale and row[name] is not None]
        if values:
            found[str(scale)] = float(np.mean(values))
    return found


def heatmaps(rows: list[dict[str, Any]], name: str, title: str, file: Path) -> None:
    """One panel a scale, layers down and heads across."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scales = sorted({row["scale"] for row in rows if row[name] is not None})
    if not scales:
        return
    figure, axes = pyplot.subplots(1, len(scales), squeeze=False, figsize=(4 * len(scales), 4))
    for panel, scale in zip(axes[0], scales, strict=True):
        values = np.array([row[name] for row in rows if row["scale"] == scale])
        shown = panel.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        panel.set(title=f"scale {scale}, mean {values.mean():.2f}", xlabel="head", ylabel="layer")
    figure.suptitle(title)
    figure.colorbar(shown, ax=axes[0].tolist())
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def map_sheet(
    found: Mapping[tuple[int, int], Mapping[str, np.ndarray]], plan: Plan, scale: int
) -> Image.Image:
    """Attention maps (brightness, square root of mass) with the blocks a plan reads in red.

    One row a layer, one cell a head; queries down, keys across.
    """
    layers = [layer for layer in range(plan.depth) if (scale, layer) in found]
    rows = []
    for layer in layers:
        arrays = found[scale, layer]
        cells = []
        for mass, kept in zip(arrays["map"], arrays["kept"] > 1e-7, strict=True):
            light = np.sqrt(mass / max(float(mass.max()), 1e-9))
            colour = np.stack([light, light, light], -1)
            colour[..., 0] = np.where(kept, 0.35 + 0.65 * light, light)
            colour = np.kron(colour, np.ones((4, 2, 1)))
            cells.append(np.pad(colour, ((0, 4), (0, 4), (0, 0)), constant_values=1))
        rows.append(np.concatenate(cells, 1))
    return Image.fromarray((np.concatenate(rows) * 255).astype(np.uint8))
