"""Plans whose attentions are served by one set of kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

from sparvar_jax.plans.plan import Plan, Step, map_attention
from sparvar_jax.plans.strategy import Attention


def with_implementation(plan: Plan, implementation: str | None) -> Plan:
    """The plan with every attention served by one kernel implementation (None: the best there is).

    Parity runs and kernel checks ask for "xla".
    """

    def choose(step: Step, layer: int) -> Attention | None:
        attention: Any = step.segment(layer).attention
        if not dataclasses.is_dataclass(attention) or not hasattr(attention, "implementation"):
            return None
        return dataclasses.replace(attention, implementation=implementation)  # type: ignore[type-var]

    return map_attention(plan, choose)
