"""What the tables of result files show, by kind of file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.quality_plans import label

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


def _number(name: str, digits: int = 3, factor: float = 1.0) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else f"{factor * value:.{digits}f}"

    return show


def _of_scales(name: str, pick: Callable[[list[float]], float]) -> Callable[[Row], str]:
    """One of an entry's numbers by scale."""
    return lambda row: f"{pick(row[name]):.4f}" if name in row else ""


def _text(name: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(name) is None else str(row[name])


def _parts(row: Row) -> str:
    parts = row.get("seconds_by_part", {})
    return ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in parts.items())


def _seconds(row: Row) -> str:
    return row["failed"] if "failed" in row else _number("seconds_median")(row)


def _planned(share: str) -> Callable[[Row], str]:
    return lambda row: f"{row['planned_gib'][share]:.1f}" if "planned_gib" in row else ""


def _pixels(row: Row) -> str:
    return "x".join(str(side) for side in row.get("pixels", ()))


def _check(row: Row) -> str:
    check = row.get("check")
    return "" if check is None else f"{check['cache_error']:.4f}"


def asked_with(row: Row) -> str:
    """What a generation was asked for besides its plan."""
    asked = {"path": "kernels", "matrices": "matrices", "stream": "stream", "cache": "cache"}
    return ", ".join(f"{row[k]} {noun}" for k, noun in asked.items() if row.get(k)) or "defaults"


def _psnr(row: Row) -> str:
    """Decibels; pictures that are the same bit for bit have none."""
    same = "same" in row and row["same"] == row["pictures"]
    return "the same bits" if same else _number("psnr", 2)(row)


def _on_h100(row: Row) -> str:
    """Seconds a picture of another results file, and how many were drawn together."""
    found = row.get("h100")
    if not found:
        return ""
    together = "" if found["batch"] == 1 else f" ({found['batch']} together)"
    return f"{found['seconds']:.3f}{together}"


def _source(row: Row) -> str:
    """Where a row was measured; what others published stays their claim."""
    return row["source"] if "claim" not in row else f"claimed, {row['source']}: {row['claim']}"


_THROUGHPUT: tuple[Column, ...] = (
    ("model", _text("model")),
    ("plan", _text("plan")),
    ("with", asked_with),
    ("images", _text("batch")),
    ("pixels", _pixels),
    ("seconds", _seconds),
    ("spread", _number("seconds_spread")),
    ("images/s", _number("images_per_second", 2)),
    ("peak GiB", _number("peak_gib", 1)),
    ("planned GiB", _planned("peak")),
)
COLUMNS: dict[str, tuple[Column, ...]] = {
    "kernels": (
        ("case", _text("case")),
        ("implementation", _text("implementation")),
        ("rows", _text("batch_rows")),
        ("ms", _number("median_ms")),
        ("spread", _number("spread_ms")),
        ("density", _number("density")),
        ("TFLOP/s kept", _number("tflops_kept", 0)),
    ),
    "convert": (
        ("checkpoint", _text("preset")),
        ("form", _text("form")),
        ("parameters, billion", _number("parameters_b", 2)),
        ("largest file GiB", _number("largest_file_gib", 2)),
        ("peak memory GiB", _number("peak_gib", 2)),
        ("bound GiB", _number("bound_gib", 2)),
        ("seconds", _number("seconds", 0)),
    ),
    "fused": (
        ("case", _text("case")),
        ("implementation", _text("implementation")),
        ("ms", _number("median_ms", 4)),
        ("spread", _number("spread_ms", 4)),
        ("GB/s", _number("gb_per_s", 0)),
        ("difference", _number("error", 5)),
    ),
    "decoder": (
        ("decoder", _text("case")),
        ("images", _text("batch")),
        ("pixels", _pixels),
        ("ms", _number("median_ms")),
        ("spread", _number("spread_ms")),
        ("images/s", _number("images_per_second", 1)),
        ("TFLOP/s", _number("tflops", 0)),
        ("peak GiB", _number("peak_gib", 2)),
        ("error", _number("error", 4)),
    ),
    "generate": (
        ("model", _text("model")),
        ("plan", _text("plan")),
        ("with", asked_with),
        ("images", _text("batch")),
        ("seconds", _seconds),
        ("spread", _number("seconds_spread")),
        ("parts (each waited for)", _parts),
        ("density", _number("density")),
        ("TFLOP/s", _number("tflops", 0)),
        ("of", _number("matmul_ceiling_tflops", 0)),
        ("cold s", _number("cold_seconds", 1)),
        ("peak GiB", _number("peak_gib", 1)),
        ("difference from XLA", _check),
    ),
    "generate-throughput": (*_THROUGHPUT, ("cache GiB", _planned("cache"))),
    "generate-classes": (*_THROUGHPUT, ("density", _number("density"))),
    "generate-sizes": (
        ("model", _text("model")),
        ("plan", _text("plan")),
        ("pixels", _pixels),
        ("seconds", _seconds),
        ("spread", _number("seconds_spread")),
        ("density", _number("density")),
        ("peak GiB", _number("peak_gib", 1)),
        ("planned GiB", _planned("peak")),
    ),
    "generate-memory": (
        ("model", _text("model")),
        ("plan", _text("plan")),
        ("images", _text("batch")),
        ("from", _text("text")),
        ("cache", lambda row: str(row.get("cache", "full"))),
        ("peak GiB", _number("peak_gib", 1)),
        ("weights GiB, text encoder apart", _planned("weights")),
        ("cache GiB", _planned("cache")),
        ("seconds", _seconds),
    ),
    "planned": (
        ("model", _text("model")),
        ("weights", lambda row: row["matrices"].replace("dense", "bfloat16")),
        ("plan", _text("plan")),
        ("pictures", _text("batch")),
        ("cache", _text("cache")),
        (
            "largest step, GiB",
            lambda row: f"{row['planned_gib']['weights'] + row['steps_gib']:.1f}",
        ),
        ("with the decoder, GiB", _planned("peak")),
        ("estimate, GiB", _number("estimated_gib", 1)),
        ("off, %", lambda row: f"{100 * row['off']:+.1f}"),
    ),
    "generate-cold": (
        ("model", _text("model")),
        ("plan", _text("plan")),
        ("compile cache", _text("cache")),
        ("import s", _number("import_seconds", 1)),
        ("weights s", _number("weights_seconds", 1)),
        ("compile s", _number("compile_seconds", 1)),
        ("first picture after weights, s", _number("first_picture_seconds", 1)),
    ),
    "kv-budgets": (
        ("keys and values", _text("method")),
        ("cache", _text("cache")),
        ("8B GiB", _number("infinity_8b_gib", 2)),
        ("2B GiB", _number("infinity_2b_gib", 2)),
        ("of 8B's full", _number("infinity_8b_share", 2)),
        ("PSNR dB", _psnr),
        ("SSIM", _number("ssim")),
        ("8B on an H100, s", _on_h100),
        ("from", _source),
    ),
    "generate-devices": (
        ("model", _text("model")),
        ("plan", _text("plan")),
        ("with", asked_with),
        ("images", _text("pictures")),
        ("devices", _text("devices")),
        ("mesh", _text("mesh")),
        ("seconds", _seconds),
        ("one device, seconds", lambda row: _seconds(row["one_device"])),
        ("images a second, times", _number("speedup", 2)),
        ("divided from scale", _text("divided_from")),
    ),
    "serve": (
        ("model", _text("model")),
        ("clients", _text("clients")),
        ("batches", lambda row: ", ".join(map(str, row["batches"]))),
        ("images/s", _number("images_per_second", 1)),
        ("of the pipeline's best batch", lambda row: f"{row['share']:.0%}"),
        ("median answer, s", _number("seconds_median")),
        ("of it the file's writing, s", _number("file_ms", factor=1e-3)),
        ("added, ms", _number("added_ms", 1)),
    ),
    "newcomer": (
        ("step", _text("step")),
        ("command", lambda row: f"`{row['command']}`"),
        ("seconds", _number("seconds", 1)),
        ("cores", _text("cores")),
        ("load", _number("load", 1)),
    ),
    "eight_bits": (
        ("model", _text("model")),
        ("variant", _text("variant")),
        ("logit error, last scale", _of_scales("logit_error_by_scale", lambda x: x[-1])),
        ("largest", _of_scales("logit_error_by_scale", max)),
        ("bits equal, last scale", _of_scales("equal_bits_by_scale", lambda x: x[-1])),
        ("least", _of_scales("equal_bits_by_scale", min)),
        ("drawn freely: PSNR dB", _number("psnr", 2)),
    ),
    "quality": (
        ("plan", lambda row: label(row["plan"])),
        ("PSNR dB", _number("psnr", 2)),
        ("SSIM", _number("ssim")),
        ("MS-SSIM", _number("ms_ssim")),
        ("distance", _number("distance")),
        ("bits equal", _number("bit_agreement")),
        ("density", _number("density")),
        ("density, all scales", _number("density_all")),
        ("seconds a batch", _number("seconds", 2)),
    ),
}
