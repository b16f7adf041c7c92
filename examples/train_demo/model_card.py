"""Write the demo model's card from what was measured: `MODEL_CARD.md` in the model directory.

Run `python -m examples.train_demo.model_card --results benchmarks/results/h200 --model
sparvar_jax/demo`. Every figure is read from `training.json` (written by the training, copied by
`export`) and from the results of `benchmarks.demo_*`; one that was not measured is said to be so.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sparvar_jax.weights import checkpoint

NAME = "MODEL_CARD.md"
TEXT = """# Demo model of sparvar_jax

A small text-to-picture model of Infinity's architecture (arXiv 2412.04431), 256x256 pixels over the
13 scales (10,521 tokens) of the released models' 1M square schedule. It was trained from nothing by
`examples/train_demo`, to run the package without a download and to give sparse attention a trained
model to be judged on. It knows 837 things in four drawing styles and scenes of up to three of
them; it is no general text-to-image model.

## What it is

{parts}

Matrices are stored as int8 with one scale an output channel, the rest as float32; all figures are
of these weights. Default guidance {guidance}, temperature {temperature}, top-p {top_p}.

## What it learnt from

Drawings from Microsoft Fluent Emoji 3D and flat (MIT) and Google Noto Emoji, new and old
(Apache-2.0); names and tags from emojibase (MIT). The tokenizer saw 4,245 of them, the transformer
3,019: people, faces, hands and hearts were left out, hundreds of drawings that differ by a few
pixels. Half of the training pictures and more are scenes composed of them, with captions from
templates. No picture is in this repository; notices are in `examples/train_demo/NOTICE.md`. 3 % of
the (thing, style) pairs were held out.

## How it was trained

{training}

## What was measured

{figures}

## Limits

- Prompts should read like the captions: "a flat icon of an otter", "a strawberry above a fire
  engine on a pink background, 3d style". Words outside the captions mean little to it.
- Scenes: in all 32 pictures of the fixed prompts, looked at one by one, the things stand where the
  prompt says, on the background it says. Word order is read: with the two things of a caption
  exchanged the losses of the scales from 4x4 to 12x12 tokens are 3.4 to 4.7 times as large
  (`benchmarks/results/cpu/demo_order.json`).
- Of 64 prompts in a visitor's words, written before the last run and looked at one by one, 36 are
  drawn right, 16 are usable (a part has melted, or a colour, number or detail is off) and 12 wrong:
  a wrapped present, a lighthouse, a camera, a bee, a small rocket
  (`examples/free_prompts/again-after.md`). Three things in a row are small and rough.
- One prompt gives nearly the same picture with every seed.
- It knows its drawings by heart. Of a thing alone, in a style held out, it foresees another
  drawing: the loss of the first scales is then higher with the text than without (table above). In
  scenes, where the text also says what stands where, it is lower.
- Thin parts (legs, letters, strings) come out blurred or melted, faces more often than shapes: the
  model holds 24 million parameters for 3,019 drawings.
- It has seen single emoji drawings, no photographs and no written text.
- Retrieval counts a picture as right by features of an ImageNet network, which sees shape and
  texture better than fine drawing.
- Perceptual distance (LPIPS) was not measured.
"""


def read(file: Path) -> Any:
    """A JSON file, or None where it does not exist."""
    return json.loads(file.read_text()) if file.exists() else None


def settings(file: Path) -> dict[str, Any]:
    """Figures by `guidance:temperature`, none where the file does not exist."""
    return (read(file) or {}).get("settings", {})


def parts_lines(config: dict[str, Any]) -> str:
    """One line a part, from `config.json`."""
    transformer, text, tokenizer = (config[p] for p in ("transformer", "text", "tokenizer"))
    return "\n".join(
        (
            f"- transformer: {transformer['depth']} layers, width {transformer['width']}, "
            f"{transformer['heads']} heads, {transformer['bits']} bits a token",
            f"- text encoder of T5's architecture: {text['depth']} layers, width {text['width']}",
            f"- BSQ tokenizer: {tokenizer['code_width']} bits, {tokenizer['stride']} pixels a side "
            "of a token",
        )
    )


def training_lines(runs: list[dict[str, Any]] | None) -> str:
    """One line a run, from `training.json`."""
    if not runs:
        return "No record of the training was kept."
    lines = []
    for run in runs:
        steps = ", ".join(
            f"{count} steps of {run['batches'][scales]} pictures at {scales} scales"
            for scales, count in run["steps"].items()
        )
        tokenizer = run["tokenizer"]
        line = f"- {run['device']}: transformer {run['transformer_seconds']} s ({steps})"
        if tokenizer:
            line += (
                f"; tokenizer {tokenizer['seconds']} s "
                f"({tokenizer['steps']} steps of {tokenizer['batch']})"
            )
        lines.append(line)
    return "\n".join([*lines, "- tokenizer before that: 102 s on one H100 (1033 steps of 64)"])


def row(what: str, value: str | None) -> str:
    """A table row; a missing value is said to be missing."""
    return f"| {what} | {value or 'not measured'} |"


def figure_lines(results: Path, setting: str) -> str:
    """The table of figures at one setting, from the results of `benchmarks.demo_*`."""
    training = read(results / "demo_training.json") or {}
    scales = settings(results / "demo_scales.json").get(setting, {}).get("scenes")
    found = settings(results / "demo_retrieval.json").get(setting, {})
    rows = ["| figure | value |", "| --- | --- |"]
    for name in ("single", "scenes"):
        psnr, loss = training.get(f"tokenizer_{name}"), training.get(f"bit_loss_{name}")
        rows.append(
            row(
                f"tokenizer PSNR, held-out, {name}",
                psnr
                and f"{psnr['psnr_mean']:.2f} dB (worst {min(psnr['psnr_worst_5']):.2f}, "
                f"{psnr['pictures']} pictures)",
            )
        )
        for part, stop in (("first 7 scales", slice(0, 7)), ("last 3 scales", slice(10, 13))):
            values = loss and [
                sum(loss[kind][stop]) / len(loss[kind][stop])
                for kind in ("with_text", "without_text")
            ]
            rows.append(
                row(
                    f"held-out bit loss, {name}, {part}, with / without text",
                    values and f"{values[0]:.4f} / {values[1]:.4f} nats",
                )
            )
    rows.append(
        row(
            "scenes: PSNR between pictures with and without the last two scales",
            scales and f"{scales['psnr_mean']:.2f} dB",
        )
    )
    for name, what in (
        ("retrieval", "200 single things found among 10 nearest"),
        ("single", "32 single things found among 10 nearest"),
        ("scenes", "things in 32 scenes found among 10 nearest of a crop"),
    ):
        rows.append(
            row(
                f"{what} (chance)",
                f"{found[name]:.1%} ({found[name + '_chance']:.1%})" if name in found else None,
            )
        )
    judged = read(results / "demo_retrieval.json")
    if judged:
        rows += ["", f"What was found was judged from {judged['pictures']} of the pictures."]
    return "\n".join(rows)


def main() -> None:
    """Write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/cpu"))
    parser.add_argument("--model", type=Path, default=Path("sparvar_jax/demo"))
    args = parser.parse_args()
    config = checkpoint.read_config(args.model)
    defaults = config["defaults"]
    setting = f"{defaults['guidance']:g}:{defaults['temperature']:g}"
    card = TEXT.format(
        parts=parts_lines(config),
        training=training_lines(read(args.model / "training.json")),
        figures=figure_lines(args.results, setting),
        guidance=defaults["guidance"],
        temperature=defaults["temperature"],
        top_p=defaults["top_p"],
    )
    (args.model / NAME).write_text(card)


if __name__ == "__main__":
    main()
