"""Plans from text: preset names and policy calls, joined by plus signs."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pallas_kernels.api import Implementation
from sparvar_jax.plans.plan import Plan, dense_plan, with_implementation
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.policies.adaptive import adaptive
from sparvar_jax.policies.cs4a import cs4a
from sparvar_jax.policies.csla import csla
from sparvar_jax.policies.routing import Policy
from sparvar_jax.policies.scales import drop_uncond, skip_last_scales
from sparvar_jax.policies.sparvar import published, sparvar

_NAME = r"[a-z_][\w-]*"


def dense() -> Policy:
    """Every layer dense at every scale: changes nothing."""
    return lambda plan: plan


def sparvar_paper() -> Policy:
    """The shipped configuration: CS4A in layers 0..10, CSLA in 128-blocks above, scales -3 on.

    Depths other than 32 and 40 take the same share of their layers. With text before the grids
    (HART) CSLA in every layer, as its authors ship it.
    """
    return published()


def sparvar_fast() -> Policy:
    """The same windows and budgets in the shapes our kernels like: runs of 8 keys, and boxes."""
    return published(fast=True)


PRESETS: dict[str, Callable[[], Policy]] = {
    "dense": dense,
    "sparvar-paper": sparvar_paper,
    "sparvar-fast": sparvar_fast,
}
POLICIES: dict[str, Callable[..., Policy]] = {
    "csla": csla,
    "cs4a": cs4a,
    "sparvar": sparvar,
    "adaptive": adaptive,
    "skip_last_scales": skip_last_scales,
    "drop_uncond": drop_uncond,
}
_OWN = frozenset({**PRESETS, **POLICIES})


def register_policy(name: str, make: Callable[..., Policy], *, preset: bool = False) -> None:
    """Give a policy a name for plan texts: `make(...)` returns a function from plan to plan.

    preset: list it among whole plans; `make` then takes no arguments. A name given before is given
    anew. Raises ValueError for one that cannot stand in a plan text or that is this package's own.
    """
    if re.fullmatch(_NAME, name) is None:
        raise ValueError(
            f"a policy's name is small letters, digits, - and _, beginning with a letter or _, "
            f"got {name!r}"
        )
    if name in _OWN:
        raise ValueError(f"there is a policy named {name!r} already: choose another name")
    (PRESETS if preset else POLICIES)[name] = make


def load_policies(file: Path) -> None:
    """Run a Python file that registers policies, as `--policies-from` asks for. It is code.

    Raises ValueError where there is no such file or running it fails.
    """
    if not file.is_file():
        raise ValueError(f"{file} is no file: give a Python file that calls register_policy")
    try:
        runpy.run_path(str(file), run_name="policies")
    except Exception as error:  # whatever a user's file raises is told by file and reason
        raise ValueError(f"{file} cannot be run: {type(error).__name__}: {error}") from error


def load_entry_points() -> None:
    """Register what installed packages offer: entry points of the group `sparvar_jax.policies`.

    Each names a function that makes a policy; its entry's name is the policy's.
    """
    for entry in importlib.metadata.entry_points(group="sparvar_jax.policies"):
        register_policy(entry.name, entry.load())


def preset_names() -> tuple[str, ...]:
    """Names that stand for a whole plan."""
    return tuple(PRESETS)


def parse_policy(text: str) -> Policy:
    """One policy from a name or a call with literal arguments, e.g. `csla(sinks=0)`.

    Raises ValueError for unknown names, non-literal arguments or arguments a policy does not take.
    """
    match = re.fullmatch(rf"\s*({_NAME})\s*(\(.*\))?\s*", text, re.DOTALL)
    known = {**PRESETS, **POLICIES}
    if match is None or match[1] not in known:
        raise ValueError(f"unknown policy {text.strip()!r}: use one of {', '.join(known)}")
    positional, named = _arguments(text, match[2] or "()")
    try:
        return known[match[1]](*positional, **named)
    except TypeError as error:
        raise ValueError(f"{text.strip()}: {error}") from error


def parse_policies(text: str) -> Policy:
    """The policies of a text such as "sparvar-fast + drop_uncond(3)", applied left to right."""
    policies = [parse_policy(part) for part in _split(text)]

    def apply(plan: Plan) -> Plan:
        for policy in policies:
            plan = policy(plan)
        return dataclasses.replace(plan, name=text.strip())

    return apply


def parse_plan(
    text: str,
    schedule: ScaleSchedule,
    depth: int,
    *,
    guidance: bool | tuple[bool, ...] = True,
    merge_at: int | None = None,
    implementation: Implementation | None = None,
) -> Plan:
    """A plan from text such as "dense", "sparvar-fast + drop_uncond(3)" or "csla(sinks=0)".

    Policies apply from left to right to the dense plan. guidance, merge_at: as in `dense_plan`.
    implementation: kernel choice for every attention, None for the best that can serve.
    """
    plan = parse_policies(text)(dense_plan(schedule, depth, guidance=guidance, merge_at=merge_at))
    return with_implementation(plan, implementation) if implementation else plan


def _split(text: str) -> list[str]:
    """The parts between plus signs outside parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "+" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _arguments(text: str, call: str) -> tuple[list[Any], dict[str, Any]]:
    try:
        node = ast.parse(f"f{call}", mode="eval").body
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ValueError("not one call")
        positional = [_literal(value) for value in node.args]
        named = {str(item.arg): _literal(item.value) for item in node.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"{text.strip()!r} needs literal arguments, such as csla(sinks=5, form='boxes')"
        ) from error
    return positional, named


def _literal(node: ast.expr) -> Any:
    value = ast.literal_eval(node)
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value
