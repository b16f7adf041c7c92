"""Every plan on one chart: how near its pictures are to the dense ones, against what they cost."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparvar_jax.pipelines.memory import estimate
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.plans.plan import Plan
from sparvar_jax.study import features
from sparvar_jax.study.compare_pictures import picture_measures
from sparvar_jax.weights.files import whole_file
from sparvar_jax.weights.json_file import read_json

Row = dict[str, Any]
DENSE = "dense"
FLOOR = f"csla(windows={(999,) * 13}, first_scale=1)"
"""Dense attention by other kernels: windows that hide nothing, in blocks. Its distance to the dense
pictures is what rounding alone does."""
PLANS = (
    FLOOR,
    "drop_uncond(1)",
    "drop_uncond(2)",
    "drop_uncond(3)",
    "share_rows(1)",
    "share_rows(3)",
    "drop_uncond(0, ((-1, 0.5),))",
    "drop_uncond(1, ((-3, 0.75), (-2, 0.5)))",
    "skip_last_scales(1)",
    "skip_last_scales(2)",
    "skip_last_scales(1) + drop_uncond(2)",
    "prune(0.4)",
    "prune(0.4, (8, 16))",
    "prune(0.4) + drop_uncond(1)",
    "prune(0.4, (8, 16)) + drop_uncond(3)",
    "prune(0.4, (8, 16)) + drop_uncond(5)",
    "fastvar()",
    "fastvar(((-2, 0.6), (-1, 0.7)), -3, 0)",
    "almost-lossless",
    "balanced",
    "fastest",
    "sparvar-paper",
    "sparvar-fast",
    "sparvar-fast + drop_uncond(3)",
    "sparvar-fast + prune(0.4, (8, 16))",
    "adaptive(0.9)",
    "scalekv(keep=0.1)",
    "router()",
)
CLASSES = {"almost lossless": 0.95, "balanced": 0.85, "fastest": 0.6}
"""Smallest mean SSIM to the dense pictures of the plan that is named for a wish."""
ROOM = 5.0
"""Decibels above the nearest plan where a noise floor that lies higher is drawn."""
COLUMNS = (
    ("PSNR dB", "psnr", 2),
    ("SSIM", "ssim", 3),
    ("MS-SSIM", "ms_ssim", 3),
    ("distance", "distance", 3),
    ("bits equal", "bits_equal", 3),
    ("seconds a picture", "seconds", 3),
    ("cache MiB", "cache_mib", 1),
    ("peak MiB", "peak_mib", 0),
    ("tokens x rows", "work", 3),
    ("density", "density", 3),
)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a plan drew of all subjects, and the seconds of a picture."""

    pictures: np.ndarray
    tokens: list[np.ndarray]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Chart:
    """Draws plans with one pipeline on the same subjects and seeds.

    subjects: prompts or classes. batch: drawn together. repeats: timed draws after the first one;
    0 times the first. options: of `Pipeline.request`.
    """

    pipe: Pipeline
    subjects: Sequence[Any]
    seed: int = 0
    batch: int = 1
    repeats: int = 1
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds of all cores on a CPU, which may be shared with others; else those of a wall."""
        return time.process_time if jax.default_backend() == "cpu" else time.perf_counter

    def request(self, first: int, plan: str) -> Any:
        """The request of the subjects from `first` on that are drawn together."""
        some = list(self.subjects[first : first + self.batch])
        return self.pipe.request(some, plan=plan, seed=self.seed + first, **dict(self.options))

    def draw(self, plan: str) -> Drawn:
        """Pictures and tokens of all subjects."""
        pictures, tokens, spent = [], [], []
        for first in range(0, len(self.subjects), self.batch):
            request = self.request(first, plan)
            count = request.keys.shape[0]
            self.pipe.generator.compile(request.plan, request.condition, count, how=request.how)
            for repeat in range(self.repeats + 1):
                before = self.clock()
                code_sum, outputs = self.pipe.generator.run(
                    request.plan, request.condition, request.controls, request.keys, how=request.how
                )
                jax.block_until_ready(code_sum)
                if repeat or not self.repeats:
                    spent.append((self.clock() - before) / count)
            pictures.append(self.pipe.decode(code_sum))
            tokens.append([np.asarray(output.tokens) for output in outputs])
        same = [np.concatenate(parts) for parts in zip(*tokens, strict=False)]
        return Drawn(np.concatenate(pictures), same, float(np.median(spent)))

    def cost(self, plan: Plan) -> Row:
        """What a plan needs by counting: memory of one batch, products, pairs."""
        memory = estimate(self.pipe.model, plan, min(self.batch, len(self.subjects)))
        return {
            "cache_mib": memory.cache / 2**20,
            "peak_mib": memory.peak / 2**20,
            "work": plan.work(),
            "density": plan.density(),
        }


def measure(
    chart: Chart,
    plans: Sequence[str] = PLANS,
    *,
    known: Sequence[Row] = (),
    write: Callable[[list[Row]], Any] | None = None,
    deadline: float = float("inf"),
) -> list[Row]:
    """One row a plan, the dense one first; means over the pictures.

    known: rows measured before, which are not measured again unless they failed. write: given the
    rows so far after every plan. deadline (`time.perf_counter`): plans not begun by then are left
    out. A plan that cannot run on this model gets a row that says why.
    """
    dense = chart.draw(DENSE)
    compare = picture_measures(features.load())
    cost = chart.cost(chart.request(0, DENSE).plan)
    rows: list[Row] = [row for row in known if "failed" not in row]
    if not rows:
        rows = [{"plan": DENSE, "bits_equal": 1.0, "seconds": dense.seconds, **cost}]
    seen = {chart.request(0, row["plan"]).plan: row for row in rows}
    done = {row["plan"] for row in rows}
    for name in dict.fromkeys(plan for plan in plans if plan not in done):
        if time.perf_counter() > deadline:
            break
        try:
            plan = chart.request(0, name).plan
            if plan not in seen:
                seen[plan] = _row(chart, plan, name, dense, compare)
            rows.append({**seen[plan], "plan": name})
        except ValueError as error:
            rows.append({"plan": name, "failed": str(error)})
        if write is not None:
            write(rows)
    return rows


def _row(chart: Chart, plan: Plan, name: str, dense: Drawn, compare: Callable[..., Any]) -> Row:
    """What one plan drew, beside the dense pictures."""
    drawn = chart.draw(name)
    whole = np.ones(dense.pictures.shape[:3], np.float32)
    found = compare(dense.pictures, drawn.pictures, whole)
    return {
        **{measure: float(value.mean()) for measure, value in found.items()},
        "bits_equal": bits_equal(dense.tokens, drawn.tokens),
        "seconds": drawn.seconds,
        **chart.cost(plan),
    }


def describe(chart: Chart) -> Row:
    """What a chart belongs to."""
    shape = {key: value for key, value in chart.options if value is not None}
    return {
        "model": chart.pipe.model.name,
        "device": jax.devices()[0].device_kind,
        "dtype": chart.pipe.model.transformer.config.dtype,
        "jax": jax.__version__,
        "pictures": len(chart.subjects),
        "seed": chart.seed,
        "batch": chart.batch,
        **shape,
        "clock": "seconds of all cores" if jax.default_backend() == "cpu" else "seconds",
    }


def bits_equal(dense: Sequence[np.ndarray], ours: Sequence[np.ndarray]) -> float:
    """Share of the dense pictures' bits (or ids) drawn alike; what is not drawn is not alike."""
    alike = sum(int((a == b).sum()) for a, b in zip(dense, ours, strict=False))
    return alike / sum(a.size for a in dense)


def label(plan: str) -> str:
    """A plan as the table names it."""
    return "dense, other kernels (noise floor)" if plan == FLOOR else plan


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Plans that no other beats in both seconds and PSNR, fastest first; dense and floor apart."""
    found: list[Row] = []
    drawn = [row for row in rows if row.get("psnr") is not None and row["plan"] != FLOOR]
    for row in sorted(drawn, key=lambda row: (row["seconds"], -row["psnr"])):
        if not found or row["psnr"] > found[-1]["psnr"]:
            found.append(row)
    return found


def chosen(rows: Sequence[Row]) -> dict[str, str]:
    """For every wish the fastest plan whose pictures are near enough; dense where none is."""
    candidates = frontier(rows)
    return {
        wish: next((row["plan"] for row in candidates if row["ssim"] >= least), DENSE)
        for wish, least in CLASSES.items()
    }


def sentence(rows: Sequence[Row]) -> str:
    """Which plan to take."""
    parts = [f"{plan} for {wish!r}" for wish, plan in chosen(rows).items()]
    return f"Take {', '.join(parts[:-1])} and {parts[-1]}."


def table(rows: Sequence[Row]) -> str:
    """All rows in markdown; plans on the frontier are marked with a star."""
    best = [row["plan"] for row in frontier(rows)]
    lines = [f"| plan | {' | '.join(title for title, _, _ in COLUMNS)} |"]
    lines.append("| --- |" + " --- |" * len(COLUMNS))
    for row in rows:
        if "failed" in row:
            lines.append(f"| {label(row['plan'])} | {row['failed']} |" + " |" * (len(COLUMNS) - 1))
            continue
        cells = [_cell(row.get(name), digits) for _, name, digits in COLUMNS]
        star = " *" if row["plan"] in best else ""
        lines.append(f"| {label(row['plan'])}{star} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def draw(rows: Sequence[Row], file: Path, title: str) -> None:
    """PSNR against seconds as PNG, with the frontier and the noise floor; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6.5))
    best = frontier(rows)
    points: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        if row.get("psnr") is not None and row["plan"] != FLOOR:
            points.setdefault((row["seconds"], row["psnr"]), []).append(row["plan"])
    on = {(row["seconds"], row["psnr"]) for row in best}
    for point, names in points.items():
        axes.scatter(*point, color="tab:red" if point in on else "tab:blue")
        axes.annotate(
            "\n".join(names), point, fontsize=6.5, xytext=(4, 2), textcoords="offset points"
        )
    axes.plot([r["seconds"] for r in best], [r["psnr"] for r in best], color="tab:red", alpha=0.5)
    top = max((psnr for _, psnr in points), default=0.0) + ROOM
    for row in rows:
        if row["plan"] == FLOOR and row.get("psnr") is not None:
            said = f"{label(FLOOR)}: {row['psnr']:.1f} dB"
            axes.axhline(min(row["psnr"], top), linestyle="--", color="gray", label=said)
        if row["plan"] == DENSE:
            axes.axvline(row["seconds"], linestyle=":", color="gray", label="dense")
    axes.set_xlabel("seconds a picture" + (" (of one core)" if "cpu" in title else ""))
    axes.set_ylabel("PSNR against the dense pictures, dB")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130, format="png")
    pyplot.close(figure)


def read(folder: Path, about: Row, name: str = "chart") -> list[Row]:
    """Rows of an earlier chart of the same model, pictures and device; none where it is another.

    Raises ValueError for a file that is no chart.
    """
    file = folder / f"{name}.json"
    if not file.is_file():
        return []
    content = read_json(file, "move it away, and measure again")
    if any(content.get(key) != value for key, value in about.items()):
        return []
    rows = content.get("rows")
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise ValueError(f"{file} holds no rows of a chart: move it away, and measure again")
    return rows


def _is_row(row: Any) -> bool:
    numbers = [name for _, name, _ in COLUMNS]
    return (
        isinstance(row, dict)
        and isinstance(row.get("plan"), str)
        and all(isinstance(row.get(name, 0), int | float) for name in numbers)
    )


def write(folder: Path, rows: Sequence[Row], about: Row, name: str = "chart") -> None:
    """`NAME.json`, `NAME.md` and, where matplotlib is installed, `NAME.png` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {**about, "take": chosen(rows), "rows": list(rows)}
    with whole_file(folder / f"{name}.json") as file:
        file.write_text(json.dumps(content, indent=1) + "\n")
    said = ", ".join(f"{key} {value}" for key, value in about.items())
    with whole_file(folder / f"{name}.md") as file:
        file.write_text(f"{table(rows)}\n{sentence(rows)}\n\n{said}.\n")
    try:
        with whole_file(folder / f"{name}.png") as file:
            draw(rows, file, f"{about['model']}, {about['device']}")
    except ImportError:
        return
