"""What the command lines of this folder have in common."""

from __future__ import annotations

import argparse


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """A parser that shows a command's docstring in its help as it is written."""
    return argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_out(parser: argparse.ArgumentParser) -> None:
    """The option `--out`: the folder of result files, as `_record` takes it."""
    parser.add_argument("--out", help="folder, default benchmarks/results/DEVICE")
