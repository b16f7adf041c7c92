"""The `sparvar` command line: one module per command, shared manners in `console`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparvar_jax.cli import console
from sparvar_jax.cli.bench import bench
from sparvar_jax.cli.chart import chart
from sparvar_jax.cli.compare import compare
from sparvar_jax.cli.convert import convert
from sparvar_jax.cli.demo import demo
from sparvar_jax.cli.edit import edit
from sparvar_jax.cli.fetch import fetch
from sparvar_jax.cli.generate import generate
from sparvar_jax.cli.head_order import head_order
from sparvar_jax.cli.info import info
from sparvar_jax.cli.inspect import inspect
from sparvar_jax.cli.plans import plans
from sparvar_jax.cli.quantise import quantise
from sparvar_jax.cli.sample import sample
from sparvar_jax.cli.serve import serve, web
from sparvar_jax.cli.warmup import warmup

app = typer.Typer(
    name="sparvar",
    help="Fast visual autoregressive generation in JAX, with SparVAR's sparse attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    generate, demo, edit, sample, fetch, convert, quantise, compare, bench, info, inspect, plans,
    head_order, chart, warmup, serve, web,
):  # fmt: skip
    app.command()(command)


@app.callback()
def options(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from instead of one line.")
    ] = False,
    policies_from: Annotated[
        Path | None,
        typer.Option("--policies-from", help="Python file that registers policies; it is run."),
    ] = None,
) -> None:
    """Fast visual autoregressive generation in JAX, with SparVAR's sparse attention."""
    console.show_tracebacks(traceback)
    from sparvar_jax.policies import registry

    registry.load_entry_points()
    if policies_from is not None:
        registry.load_policies(policies_from)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 bad input."""
    return console.run(app, arguments)
