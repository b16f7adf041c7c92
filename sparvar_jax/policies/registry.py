"""Plans from text: preset names and policy calls, joined by plus signs."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import re
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pallas_kernels.api import Implementation
from sparvar_jax.plans.plan import Plan, dense_plan
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.plans.served import with_implementation
from sparvar_jax.policies.adaptive import adaptive
from sparvar_jax.policies.arguments import checked
from sparvar_jax.policies.cs4a import cs4a
from sparvar_jax.policies.csla import csla
from sparvar_jax.policies.fastvar import fastvar
from sparvar_jax.policies.per_head import per_head
from sparvar_jax.policies.prune import prune
from sparvar_jax.policies.router import router
from sparvar_jax.policies.routing import Policy
from sparvar_jax.policies.scalekv import scalekv
from sparvar_jax.policies.scales import (
    drop_uncond,
    guidance_range,
    share_rows,
    skip_last_scales,
)
from sparvar_jax.policies.sparvar import published, sparvar
from sparvar_jax.weights.json_file import LONGEST_TEXT
from sparvar_jax.weights.told import shown, told

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


def almost_lossless() -> Policy:
    """Hardly to be told from dense: the last three scales run without their unconditional rows."""
    return drop_uncond(3)


def balanced() -> Policy:
    """About half of the work: no last scale, and no unconditional rows in the one before."""

    def apply(plan: Plan) -> Plan:
        return drop_uncond(2)(skip_last_scales(1)(plan))

    return apply


def fastest() -> Policy:
    """About a third of the work: the last two scales are not drawn; fine outlines get soft."""
    return skip_last_scales(2)


PRESETS: dict[str, Callable[[], Policy]] = {
    "almost-lossless": checked(almost_lossless),
    "balanced": checked(balanced),
    "fastest": checked(fastest),
    "dense": checked(dense),
    "sparvar-paper": checked(sparvar_paper),
    "sparvar-fast": checked(sparvar_fast),
}
POLICIES: dict[str, Callable[..., Policy]] = {
    "csla": csla,
    "cs4a": cs4a,
    "sparvar": sparvar,
    "adaptive": adaptive,
    "skip_last_scales": skip_last_scales,
    "drop_uncond": drop_uncond,
    "guidance_range": guidance_range,
    "share_rows": share_rows,
    "prune": prune,
    "fastvar": fastvar,
    "per_head": per_head,
    "scalekv": scalekv,
    "router": router,
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
    (PRESETS if preset else POLICIES)[name] = checked(make)


def load_policies(file: Path) -> None:
    """Run a Python file that registers policies, as `--policies-from` asks for. It is code.

    Raises ValueError where there is no such file or running it fails.
    """
    if not file.is_file():
        raise ValueError(f"{file} is no file: give a Python file that calls register_policy")
    try:
        runpy.run_path(str(file), run_name="policies")
    except Exception as error:  # whatever a user's file raises is told by file and reason
        raise ValueError(
            f"{file} cannot be run: {type(error).__name__}: {told(error, 200)}"
        ) from error


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
        raise ValueError(f"unknown policy {shown(text.strip())}: use one of {', '.join(known)}")
    positional, named = _arguments(text, match[2] or "()")
    return known[match[1]](*positional, **named)


def parse_policies(text: str) -> Policy:
    """The policies of a text such as "sparvar-fast + drop_uncond(3)", applied left to right."""
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"a plan's text has {LONGEST_TEXT} letters at most, got {len(text)}")
    policies = [parse_policy(part) for part in _split(text)]

    def apply(plan: Plan) -> Plan:
        for policy in policies:
            plan = plan.through(policy)
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
    if not implementation:
        return plan
    return plan.through(lambda bare: with_implementation(bare, implementation))


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the text's spelling, such as '\\d'
            node = ast.parse(f"f{call}", mode="eval").body
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ValueError("not one call")
        positional = [_literal(value) for value in node.args]
        named = {str(item.arg): _literal(item.value) for item in node.keywords}
        if len(named) < len(node.keywords):
            raise ValueError("an argument is given twice")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # as ast may raise
        raise ValueError(
            f"{shown(text.strip())} needs literal arguments, such as csla(sinks=5, form='boxes')"
        ) from None
    return positional, named


def _literal(node: ast.expr) -> Any:
    value = ast.literal_eval(node)
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value
