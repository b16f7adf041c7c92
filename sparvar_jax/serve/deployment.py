"""The same application on Ray Serve: replicas on as many machines as a Ray cluster has.

serve run sparvar_jax.serve.deployment:build model=/models/infinity_2b replicas=4 gpus=1
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve  # pyright: ignore[reportMissingImports]
from ray.serve import Application  # pyright: ignore[reportMissingImports]

from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.serve.app import create_app
from sparvar_jax.serve.settings import Settings
from sparvar_jax.serve.warming import warm_up


def deployment(
    model: str | Path | None,
    settings: Settings,
    *,
    replicas: int = 1,
    gpus: float = 0,
    dtype: str | None = None,
) -> Application:
    """The application, to be run by `ray.serve.run`.

    Every replica loads the model from a path that its machine has, compiles, and only then takes
    requests. gpus: of one replica. Raises ValueError for settings with a page, whose events would
    meet another replica at every step.
    """
    if settings.page:
        raise ValueError("the page keeps its state in one process: serve it by `sparvar web`")
    # Ray takes a function for a builder, but a partial for an application.
    ingress = serve.ingress(lambda: _replica(model, settings, dtype))
    made = serve.deployment(
        ingress(_Replica),
        name="sparvar",
        num_replicas=replicas,
        ray_actor_options={"num_gpus": gpus},
        # The queue is ours: a replica sees all requests it may batch, and refuses those beyond.
        max_ongoing_requests=settings.waiting + 2 * settings.largest,
        graceful_shutdown_timeout_s=settings.seconds,
    )
    return made.bind()


def build(arguments: dict[str, str]) -> Application:
    """The application from the arguments of `serve run`, or of a Serve configuration file.

    model, replicas, gpus, dtype, and settings: plans and sizes (joined by semicolons), batches (by
    commas), prompt_tokens, waiting, most_pictures, seconds, api_key. Raises ValueError for others.
    """
    unknown = sorted(set(arguments) - set(_READ))
    if unknown:
        raise ValueError(f"unknown argument {', '.join(unknown)}: use {', '.join(_READ)}")
    given = {name: _READ[name](value) for name, value in arguments.items()}
    own = {name: given.pop(name) for name in ("replicas", "gpus", "dtype") if name in given}
    return deployment(given.pop("model", None), Settings(**given), **own)


def _texts(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(";"))


def _numbers(value: str) -> tuple[int, ...]:
    return tuple(int(part) for part in value.split(","))


_READ: dict[str, Callable[[str], Any]] = {
    "model": str,
    "replicas": int,
    "gpus": float,
    "dtype": str,
    "plans": _texts,
    "sizes": _texts,
    "batches": _numbers,
    "prompt_tokens": int,
    "waiting": int,
    "most_pictures": int,
    "seconds": float,
    "api_key": str,
}


class _Replica:
    """What Ray wraps around the application."""


def _replica(model: str | Path | None, settings: Settings, dtype: str | None) -> FastAPI:
    from sparvar_jax.cli import console

    console.use_compilation_cache()
    pipe = Pipeline.from_checkpoint(model, dtype=dtype)
    warm_up(pipe, settings)
    return create_app(pipe, settings)
