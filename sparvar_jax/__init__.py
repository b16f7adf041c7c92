"""Visual autoregressive generation in JAX: models, plans, policies and pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparvar_jax.pipelines.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__"]


def __getattr__(name: str) -> Any:
    # On demand: a program that needs a schedule or a plan alone should not wait for checkpoints.
    if name == "Pipeline":
        from sparvar_jax.pipelines.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
