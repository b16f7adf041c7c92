"""What 8-bit products cost in quality: logits and bits under forced tokens, and pictures.

    python -m benchmarks.eight_bits
    python -m benchmarks.eight_bits MODEL_DIR --size 0.25M --prompts 2

Every variant is fed the tokens that the model draws in float32. `int8 qkv` rounds one kind of layer
alone, the rest computes in float32; `in bfloat16` says that all else does as well, as it is drawn
on a GPU; `bfloat16 stream` rounds the residual stream alone, `stream too` beside the rest. The same
with outliers planted (`eight_bits_models.planted`), and a naive scheme of one scale a tensor. Then
pictures, drawn freely, against those in float32. Writes eight_bits.json, a table and sheets into
benchmarks/results/DEVICE.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import _record as record
from benchmarks import eight_bits_models as variants
from benchmarks._options import add_out, parser_of
from benchmarks.quality import DEMO_PROMPTS, read_prompts
from benchmarks.quality_report import sheet
from benchmarks.report_columns import COLUMNS
from benchmarks.teacher_forcing import logits_and_bits
from sparvar_jax.models import eight_bits
from sparvar_jax.models.eight_bits import FORMS
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.study.compare_pictures import picture_measures
from sparvar_jax.weights.matrix import FEWEST_TOKENS

SEED = 0
TRAINED = "as trained"
Row = dict[str, Any]
Make = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute a float32 model. naive: activations have one scale a tensor."""

    name: str
    make: Make
    naive: bool = False


def _form(form: Any, kinds: Any = variants.KINDS) -> Make:
    return lambda model: variants.rounded(model, form, kinds)


def _as_it_is(model: Any) -> Any:
    return model


def _in_bfloat16(make: Make) -> Make:
    return lambda model: make(variants.in_dtype(model, "bfloat16"))


def _streaming(make: Make) -> Make:
    return lambda model: variants.with_stream(make(model), "bfloat16")


NAIVE = Variant("int8, one scale a tensor", variants.per_tensor, naive=True)
WHOLE = [Variant(f"{form} all", _form(form)) for form in FORMS]
# fc2 and cross are the same in both forms.
ALONE = [
    Variant(f"{form} {kind}", _form(form, (kind,)))
    for form, kinds in zip(FORMS, (variants.KINDS, variants.KINDS[:3]), strict=True)
    for kind in kinds
]
STREAM = Variant("bfloat16 stream", _streaming(_as_it_is))
DRAWN = [
    Variant("bfloat16", _in_bfloat16(_as_it_is)),
    *(Variant(f"{form} all, in bfloat16", _in_bfloat16(_form(form))) for form in FORMS),
    Variant("bfloat16, stream too", _streaming(_in_bfloat16(_as_it_is))),
    Variant("int8 all, in bfloat16, stream too", _streaming(_in_bfloat16(_form("int8")))),
]
PLANTED = [*WHOLE, STREAM, NAIVE]


class Forced:
    """Logits and bits of variants on the tokens that one float32 model draws."""

    def __init__(self, pipe: Pipeline, prompts: list[str], options: dict[str, Any]):
        self._pipe, self._asked = pipe, (prompts, {"seed": SEED, **options})
        request = self._request(pipe)
        _, outputs = pipe.generator.run(
            request.plan, request.condition, request.controls, request.keys
        )
        self._forced = tuple(output.tokens for output in outputs)
        self.tokens = [scale.tokens for scale in request.plan.schedule.scales]
        self._truth = self._run(pipe)

    def _request(self, pipe: Pipeline) -> Any:
        return pipe.request(self._asked[0], **self._asked[1])

    def _run(self, pipe: Pipeline) -> Any:
        request = self._request(pipe)
        return logits_and_bits(pipe.generator, request.plan, request, self._forced)

    def row(self, variant: Variant) -> Row:
        """Relative logit error and share of equal bits of every scale."""
        with variants.one_scale() if variant.naive else contextlib.nullcontext():
            found = self._run(with_transformer(self._pipe, variant.make))
        pairs = list(zip(found, self._truth, strict=True))
        return {
            "variant": variant.name,
            "logit_error_by_scale": [relative(ours[0], theirs[0]) for ours, theirs in pairs],
            "equal_bits_by_scale": [float((a[1] == b[1]).mean()) for a, b in pairs],
        }


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative Frobenius error."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def with_transformer(pipe: Pipeline, make: Make) -> Pipeline:
    """A pipeline of its own whose transformer is made from this one's."""
    return Pipeline(pipe.model.with_parts({"transformer": make(pipe.model.transformer)}))


def pictures(pipe: Pipeline, prompts: list[str], options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Pictures drawn freely, in float32 and as they are drawn on a GPU."""
    drawn = {"float32": pipe(prompts, seed=SEED, **options)}
    for variant in DRAWN:
        print(f"drawing in {variant.name}", flush=True)
        drawn[variant.name] = with_transformer(pipe, variant.make)(prompts, seed=SEED, **options)
    return drawn


def table(rows: list[Row], tokens: list[int]) -> str:
    """Markdown: error and equal bits at the last scale and over all, likeness where drawn."""
    large = [index for index, count in enumerate(tokens) if count >= FEWEST_TOKENS]
    lines = [
        f"Scales of {FEWEST_TOKENS} tokens and more: {len(large)} of {len(tokens)}.\n",
        "| " + " | ".join(title for title, _ in COLUMNS["eight_bits"]) + " |",
        "| " + " | ".join("---" for _ in COLUMNS["eight_bits"]) + " |",
    ]
    lines += [
        "| " + " | ".join(show(row) for _, show in COLUMNS["eight_bits"]) + " |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = parser_of(__doc__)
    cpu = jax.default_backend() == "cpu"
    parser.add_argument("model", nargs="?", help="directory or name, default: the demo model")
    parser.add_argument("--size", default="0.25M" if cpu else "1M")
    parser.add_argument("--prompts", type=int, default=2 if cpu else 8, help="of each subset")
    parser.add_argument("--plan", default="dense")
    parser.add_argument("--only", nargs="+", help="names of variants, default: all")
    parser.add_argument("--pictures", action=argparse.BooleanOptionalAction, default=True)
    add_out(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure all variants and write JSON, table and sheets."""
    asked = parse(arguments)
    pipe = Pipeline.from_checkpoint(asked.model, dtype="float32")
    if not eight_bits.kernels(pipe.model.transformer):
        raise SystemExit(f"{pipe.model.name} has no 8-bit products")
    prompts = [prompt for _, prompt in read_prompts(DEMO_PROMPTS, asked.prompts)]
    options = {"size": asked.size, "plan": asked.plan}
    drawn = pictures(pipe, prompts, options) if asked.pictures else {}
    file = _write(asked, [], drawn, [])  # after every measurement: a run that is killed leaves it
    for name in drawn.keys() - {"float32"}:
        stem = "".join(c if c.isalnum() else "-" for c in name)
        image = sheet(drawn["float32"], drawn[name])
        image.save(file.with_name(f"eight_bits-{stem}.webp"), quality=85)
    rows, forced = [], {}
    for name, variant in wanted(asked.only):
        start = time.perf_counter()
        if name not in forced:
            model = pipe if name == TRAINED else with_transformer(pipe, variants.planted)
            forced[name] = Forced(model, prompts, options)
        rows.append({"model": name, **forced[name].row(variant)})
        _write(asked, rows, drawn, forced[name].tokens)
        print(
            f"{name}, {variant.name}: logit error {rows[-1]['logit_error_by_scale'][-1]:.4f}, "
            f"equal bits {rows[-1]['equal_bits_by_scale'][-1]:.4f} at the last scale "
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    print(file.with_suffix(".md").read_text())


def wanted(names: list[str] | None) -> list[tuple[str, Variant]]:
    """The rows: which model, and which variant of it."""
    rows = [(TRAINED, one) for one in (*DRAWN, *WHOLE, STREAM, NAIVE)]
    rows += [("outliers planted", one) for one in PLANTED]
    rows += [(TRAINED, one) for one in ALONE]
    return [row for row in rows if not names or row[1].name in names]


def likened(rows: list[Row], drawn: dict[str, np.ndarray]) -> list[Row]:
    """The rows with how near drawn pictures come to those in float32; rows of their own at need."""
    measure, truth = picture_measures(None), drawn.get("float32")
    near: dict[str, Row] = {}
    for name in drawn.keys() - {"float32"}:
        everywhere = np.ones(drawn[name].shape[:3], np.float32)
        found = np.asarray(measure(truth, drawn[name], everywhere)["psnr"])
        near[name] = {"psnr": float(found.mean()), "psnr_by_picture": found.tolist()}
    trained = [row for row in rows if row["model"] == TRAINED]
    alone = near.keys() - {row["variant"] for row in trained}
    return [
        *({**row, **(near.get(row["variant"], {}) if row in trained else {})} for row in rows),
        *({"model": TRAINED, "variant": name, **near[name]} for name in sorted(alone)),
    ]


def _write(
    asked: argparse.Namespace, rows: list[Row], drawn: dict[str, np.ndarray], tokens: list[int]
) -> pathlib.Path:
    """JSON and table of what is measured so far."""
    rows = likened(rows, drawn)
    about = {"size": asked.size, "plan": asked.plan, "prompts": asked.prompts, "tokens": tokens}
    file = record.write_entries("eight_bits", {"about": about, "rows": rows}, folder=asked.out)
    file.with_suffix(".md").write_text(table(rows, tokens))
    return file


if __name__ == "__main__":
    main()
