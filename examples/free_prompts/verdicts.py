"""Count what was seen on the sheets of the free prompts, beside an earlier look.

    python -m examples.free_prompts.verdicts runs/after/looked.json \\
        --before examples/free_prompts/before.json

Whoever looks fills, for every picture, `seen` in a few words and `verdict`:

right:  everything asked for is known at a glance, and stands where, and in the colour, number and
        style, that was asked for
usable: the things are known, but one of these is off, or a part of the drawing has melted
wrong:  a thing is missing, cannot be known, or is another thing

Prints a Markdown page, `--out` writes it to a file.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

# Lists written before the training that they judge: the second knows what came of the first.
LISTS = ("prompts", "again")
VERDICTS = ("right", "usable", "wrong")


def prompts_of(name: str) -> list[dict[str, Any]]:
    """The prompts of a list, with their numbers and kinds."""
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text())


def read(file: Path) -> dict[str, Any]:
    """What was looked at; every prompt must have one of the three verdicts.

    Raises ValueError naming the file and the pictures without one, or prompts that are not ours.
    """
    look = json.loads(file.read_text())
    name = look.get("prompts", LISTS[0])
    if name not in LISTS:
        raise ValueError(f"{file} judges the list {name!r}, which must be one of {LISTS}")
    asked = {entry["number"]: entry["prompt"] for entry in prompts_of(name)}
    given = {entry["number"]: entry["prompt"] for entry in look["verdicts"]}
    if given != asked or len(look["verdicts"]) != len(asked):
        raise ValueError(
            f"{file} judges other prompts than those of {name}.json: draw the sheets again"
        )
    empty = [entry["number"] for entry in look["verdicts"] if entry["verdict"] not in VERDICTS]
    if empty:
        raise ValueError(f"{file}: pictures {empty} have none of the verdicts {VERDICTS}: add them")
    return look


def counts(look: dict[str, Any]) -> dict[str, Counter[str]]:
    """Verdicts by kind of prompt, in the order of the prompts, and of all of them."""
    found: dict[str, Counter[str]] = {}
    for entry in look["verdicts"]:
        found.setdefault(entry["kind"], Counter())[entry["verdict"]] += 1
    found["all"] = sum(found.values(), Counter())
    return found


def page(looks: dict[str, dict[str, Any]]) -> str:
    """A table of counts, and one of every picture, of looks by name."""
    lines = ["# Free prompts, looked at one by one", ""]
    for name, look in looks.items():
        lines.append(
            f"- {name}: model `{look['model']}`, plan `{look['plan']}`, {look['device']}, "
            f"{look['date']}, commit {look['commit'][:12]}"
        )
    names = list(looks)
    lines += ["", "| kind | " + " | ".join(f"{n}: right / usable / wrong" for n in names) + " |"]
    lines.append("| --- " * (len(names) + 1) + "|")
    tallies = {name: counts(look) for name, look in looks.items()}
    for kind in next(iter(tallies.values())):
        cells = [" / ".join(str(tallies[n][kind][v]) for v in VERDICTS) for n in names]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    lines += ["", "| | prompt | " + " | ".join(names) + " |", "| --- " * (len(names) + 2) + "|"]
    for rows in zip(*(look["verdicts"] for look in looks.values()), strict=True):
        cells = [f"{r['verdict']}: {r['seen']}" if r["seen"] else r["verdict"] for r in rows]
        lines.append(f"| {rows[0]['number']} | {rows[0]['prompt']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print or write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("looked", type=Path)
    parser.add_argument("--before", type=Path, help="an earlier look to stand beside it")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    try:
        looks = {"before": read(args.before)} if args.before else {}
        looks[args.looked.stem if not args.before else "after"] = read(args.looked)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    text = page(looks)
    if args.out:
        args.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
