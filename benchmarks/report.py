"""Turns the JSON files under `benchmarks/results/` into the tables of README and documentation.

    python -m benchmarks.report            # rewrite the tables
    python -m benchmarks.report --check    # exit 1 if a page is not what the files say
    python -m benchmarks.report NAME ...   # print tables, on a page or not

A table lives between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a file's path below
`benchmarks/results/` without its ending, and the columns follow from the kind of file. With
`NAME where COLUMN=VALUE` it has the rows alone whose entry COLUMN is VALUE, or one of several
between `|`. `with` is what a generation was asked for besides its plan, or `defaults`.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys

from benchmarks._options import parser_of
from benchmarks.report_columns import COLUMNS, asked_with

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
DOCS = ROOT / "docs"
_TABLE = re.compile(
    r"<!-- table: ([\w./-]+)(?: where (\w+)=([^\n]+?))? -->\n.*?<!-- end -->", re.DOTALL
)

LEFT_TO_THE_FILE = ("single", "boxes")
"""Subsets of a quality file that its table leaves out."""


def pages() -> list[pathlib.Path]:
    """The README and every page of the documentation that holds tables."""
    found = sorted(DOCS.rglob("*.md"))
    return [README, *(page for page in found if _TABLE.search(page.read_text()))]


def _kind(file: pathlib.Path) -> str:
    return file.stem if file.stem in COLUMNS else re.split(r"[-_.]", file.stem)[0]


def every_table() -> str:
    """A page with the table of every result file that has columns here, by device."""
    lines = ["# Every result file", "", "Made from `benchmarks/results` when this is built."]
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        lines += ["", f"## {folder.name}"]
        for file in sorted(folder.glob("*.json")):
            if _kind(file) in COLUMNS:
                name = f"{folder.name}/{file.stem}"
                lines += ["", f"### {name}", "", table(name)]
    return "\n".join([*lines, ""])


def table(name: str, column: str | None = None, values: str | None = None) -> str:
    """The markdown table of one results file, with the line that says where it comes from.

    column, values: keep the rows alone whose entry `column` is one of `values`, between `|`.
    """
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        raise ValueError(f"a page names {file}, which does not exist: run its benchmark first")
    content = json.loads(file.read_text())
    if column:
        wanted = (values or "").split("|")
        shown = {"with": asked_with}.get(column, lambda row: str(row.get(column)))
        content["rows"] = [row for row in content["rows"] if shown(row) in wanted]
        if not content["rows"]:
            raise ValueError(f"{file} has no row whose {column} is {values}: mend the page")
    kind = _kind(file)
    if kind not in COLUMNS:
        raise ValueError(f"{file}: no table for {kind!r}, expected one of {', '.join(COLUMNS)}")
    for row in content["rows"]:
        if problem := row.get("check", {}).get("problem"):
            raise ValueError(f"{file}: {row['model']} {row['plan']} is wrong ({problem}): mend it")
    columns = COLUMNS[kind]
    lines = [
        "| " + " | ".join(title for title, _ in columns) + " |",
        "| " + " | ".join("---" for _ in columns) + " |",
    ]
    rows = [row for row in content["rows"] if row.get("subset") not in LEFT_TO_THE_FILE]
    lines += ["| " + " | ".join(show(row) for _, show in columns) + " |" for row in rows]
    versions = ", ".join(f"{k} {v}" for k, v in content["versions"].items())
    source = f"`benchmarks/results/{name}.json`: {content['device']}; {versions}"
    if flags := content.get("xla_flags"):
        source += f"; {flags}"
    commits = {row.get("commit", content["commit"])[:12]: None for row in content["rows"]}
    return "\n".join([*lines, "", f"{source}; {content['date']}; commit {', '.join(commits)}."])


def render(page: str) -> str:
    """A page with every table rewritten from its file."""

    def write(found: re.Match[str]) -> str:
        head = found[0].partition("\n")[0]
        return f"{head}\n{table(*found.groups())}\n<!-- end -->"

    return _TABLE.sub(write, page)


def main() -> None:
    """Rewrite or check the tables of all pages, or print tables by name."""
    parser = parser_of(__doc__)
    parser.add_argument("names", nargs="*", help="tables to print, such as h200/generate-latency")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.names:
        print("\n\n".join(table(name) for name in arguments.names))
        return
    for page in pages():
        before = page.read_text()
        after = render(before)
        if arguments.check and after != before:
            sys.exit(f"{page} is older than benchmarks/results: run python -m benchmarks.report")
        if not arguments.check:
            page.write_text(after)


if __name__ == "__main__":
    main()
