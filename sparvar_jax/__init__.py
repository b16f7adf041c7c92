"""Visual autoregressive generation in JAX: models, plans, policies and pipelines.

Names are imported on demand: a program that needs a schedule or a plan alone does not wait for
checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparvar_jax import policies
    from sparvar_jax.pipelines.pipeline import Pipeline
    from sparvar_jax.plans.plan import (
        Plan,
        dense_plan,
        map_attention,
        map_segments,
        with_store,
    )
    from sparvar_jax.plans.schedule import ScaleSchedule, infinity_schedule
    from sparvar_jax.plans.stores import Store
    from sparvar_jax.plans.strategy import Attention, Output, Place, ReadsAll, TokenRule, View
    from sparvar_jax.policies.registry import register_policy
    from sparvar_jax.runtime.controls import controls
    from sparvar_jax.runtime.generate import Generator
    from sparvar_jax.study.teacher import teacher_forced_logits

__version__ = "0.1.0"
_HOMES = {
    "pipelines.pipeline": ("Pipeline",),
    "plans.plan": ("Plan", "dense_plan", "map_attention", "map_segments", "with_store"),
    "plans.schedule": ("ScaleSchedule", "infinity_schedule"),
    "plans.stores": ("Store",),
    "plans.strategy": ("Attention", "Output", "Place", "ReadsAll", "TokenRule", "View"),
    "policies.registry": ("register_policy",),
    "runtime.controls": ("controls",),
    "runtime.generate": ("Generator",),
    "study.teacher": ("teacher_forced_logits",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [
    "Attention",
    "Generator",
    "Output",
    "Pipeline",
    "Place",
    "Plan",
    "ReadsAll",
    "ScaleSchedule",
    "Store",
    "TokenRule",
    "View",
    "__version__",
    "controls",
    "dense_plan",
    "infinity_schedule",
    "load",
    "map_attention",
    "map_segments",
    "policies",
    "register_policy",
    "teacher_forced_logits",
    "with_store",
]


def load(directory: Any = None, **options: Any) -> Pipeline:
    """The pipeline of a model directory of any family; None is the demo model.

    Options are those of `Pipeline.from_checkpoint`.
    """
    from sparvar_jax.pipelines.pipeline import Pipeline

    return Pipeline.from_checkpoint(directory, **options)


def __getattr__(name: str) -> Any:
    if name == "policies":
        return importlib.import_module("sparvar_jax.policies")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"sparvar_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
