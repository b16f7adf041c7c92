"""Run a checkpoint's PyTorch twin and its JAX conversion side by side, on the same forced tokens.

`compare_source` gives one row per scale and layer; `write_report` leaves JSON and a PNG plot.
A model family joins by an entry in `COMPARERS`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import torch

from sparvar_convert import (
    compare_bsq_vae,
    compare_hart,
    compare_infinity,
    compare_var,
    compare_vqvae,
)
from sparvar_convert.error_plot import draw_errors
from sparvar_convert.families import Family, detect
from sparvar_convert.rules import ConversionError
from sparvar_convert.run import convert_source
from sparvar_convert.side_by_side import Options, Row, Sides
from sparvar_convert.sources import open_source
from sparvar_jax.pipelines import loading, metadata
from sparvar_jax.weights import checkpoint
from sparvar_jax.weights.files import whole_file

COMPARERS: Mapping[str, Callable[[Sides, Options], tuple[Row, ...]]] = {
    "infinity": compare_infinity.compare,
    "bsq_vae": compare_bsq_vae.compare,
    "var": compare_var.compare,
    "vqvae": compare_vqvae.compare,
    "hart": compare_hart.compare,
    "hart_vqvae": compare_vqvae.compare,
}
"""Kind of checkpoint -> the function that runs both sides."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All rows of one comparison and what was compared."""

    kind: str
    title: str
    source: str
    converted: str
    options: Options
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return all(row.within(self.options.tolerance) for row in self.rows)


def compare_source(
    source: str | Path, converted: str | Path | None = None, options: Options | None = None
) -> Comparison:
    """Compare a checkpoint with its conversion, made in a temporary folder if none is named.

    Both sides compute in float32. Raises ValueError for sources and folders that do not fit.
    """
    options = options or Options()
    opened = open_source(source)
    family = detect(opened)
    if family.kind not in COMPARERS:
        raise ConversionError(
            f"{opened.name} is a {family.title} ({family.kind}), which has no PyTorch twin to "
            f"compare with: give one of {', '.join(COMPARERS)}"
        )
    with tempfile.TemporaryDirectory(prefix="sparvar-compare-") as scratch:
        folder = Path(scratch) / "model" if converted is None else Path(converted)
        if converted is None:
            convert_source(source, folder)
        config = checkpoint.read_config(loading.model_folder(folder))
        _require_kind(config, family, folder)
        _, values = loading.part_config(config, family.part, "float32")

        def load() -> Any:
            gc.collect()
            return loading.load_part(folder, config, family.part, "float32")

        rows = COMPARERS[family.kind](Sides(opened, family, values, load), options)
    where = "converted on the fly" if converted is None else str(converted)
    return Comparison(family.kind, family.title, opened.name, where, options, rows)


def _require_kind(config: Mapping[str, Any], family: Family, folder: Path) -> None:
    found = config.get(family.part, {}).get("kind")
    if found != family.kind:
        raise ConversionError(
            f"{folder} has {found or 'nothing'} as its {family.part}, the checkpoint is a "
            f"{family.title} ({family.kind}): name the directory it was converted into"
        )


def write_report(comparison: Comparison, out: str | Path) -> tuple[Path, Path]:
    """Write `out` (.json) and a plot of relative error by scale beside it (.png)."""
    out = Path(out)
    picture = out.with_suffix(".png")
    content = {
        **dataclasses.asdict(comparison),
        "passed": comparison.passed,
        "device": jax.devices()[0].device_kind,
        "versions": {**metadata.versions(), "torch": torch.__version__},
    }
    with whole_file(out) as first, whole_file(picture) as second:
        first.write_text(json.dumps(content, indent=2) + "\n")
        draw_errors(second, _curves(comparison.rows), comparison.options.tolerance)
    return out, picture


def _curves(rows: tuple[Row, ...]) -> dict[str, list[tuple[int, float]]]:
    """Relative error by scale: of inputs, of the worst hidden layer, of logits and so on."""
    worst: dict[str, dict[int, float]] = {}
    for found in rows:
        name = "worst layer" if found.layer.startswith("block ") else found.layer
        by_scale = worst.setdefault(name, {})
        index = -1 if found.scale is None else found.scale
        by_scale[index] = max(found.relative, by_scale.get(index, 0.0))
    return {name: sorted(points.items()) for name, points in worst.items()}
