"""Policies: functions from plan to plan, and the plans that have a name."""

from sparvar_jax.policies.adaptive import adaptive
from sparvar_jax.policies.cs4a import cs4a
from sparvar_jax.policies.csla import csla
from sparvar_jax.policies.fastvar import fastvar
from sparvar_jax.policies.per_head import per_head
from sparvar_jax.policies.prune import prune
from sparvar_jax.policies.registry import (
    parse_plan,
    parse_policies,
    parse_policy,
    preset_names,
    register_policy,
)
from sparvar_jax.policies.router import router
from sparvar_jax.policies.routing import Policy
from sparvar_jax.policies.scalekv import scalekv
from sparvar_jax.policies.scales import (
    drop_uncond,
    guidance_range,
    share_rows,
    skip_last_scales,
)
from sparvar_jax.policies.sparvar import sparvar

__all__ = [
    "Policy",
    "adaptive",
    "cs4a",
    "csla",
    "drop_uncond",
    "fastvar",
    "guidance_range",
    "parse_plan",
    "parse_policies",
    "parse_policy",
    "per_head",
    "preset_names",
    "prune",
    "register_policy",
    "router",
    "scalekv",
    "share_rows",
    "skip_last_scales",
    "sparvar",
]
