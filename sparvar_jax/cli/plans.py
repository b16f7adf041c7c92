"""`sparvar plans`: the plans by name, or the table of one."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer
from rich.table import Table

from sparvar_jax.cli import console, options


def plans(
    name: Annotated[
        str | None, typer.Argument(help="Plan to show scale by scale, such as sparvar-paper.")
    ] = None,
    depth: Annotated[
        int, typer.Option("--depth", min=1, max=512, help="Layers of the model.")
    ] = 32,
    aspect: options.Aspect = None,
    size: options.Size = None,
) -> None:
    """List the plans, or show what one runs, scale by scale."""
    from sparvar_jax.pipelines.numbers import parse_ratio
    from sparvar_jax.plans.schedule import infinity_schedule
    from sparvar_jax.policies import parse_plan, registry

    schedule = infinity_schedule(1 / parse_ratio(aspect or 1.0), size or "1M")
    if name is not None:
        console.say(parse_plan(name, schedule, depth).describe())
        return
    presets = Table("preset", "density", "what it runs", box=None)
    for preset, make in registry.PRESETS.items():
        density = parse_plan(preset, schedule, depth).density()
        presets.add_row(preset, f"{density:.3f}", _first_sentence(make))
    policies = Table("policy", "what it changes", box=None)
    for policy, make in registry.POLICIES.items():
        policies.add_row(f"{policy}(...)", _first_sentence(make))
    console.output.print(presets, "", policies)
    console.output.print(
        "\nJoin them with +, for instance --plan 'sparvar-paper+drop_uncond(3)'. Density is kept "
        "over dense (query, key) pairs of the last three scales.",
        highlight=False,
    )


def _first_sentence(thing: object) -> str:
    text = " ".join((inspect.getdoc(thing) or "").split())
    return text.partition(". ")[0].rstrip(".").replace("`", "")
