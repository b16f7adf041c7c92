"""`sparvar serve` and `sparvar web`: pictures over HTTP, and a page to ask for them."""

from __future__ import annotations

import importlib
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparvar_jax.cli import console, options

if TYPE_CHECKING:
    from sparvar_jax.serve.settings import Settings

Plans = Annotated[
    list[str] | None,
    typer.Option("--plan", help="A plan to serve; give it again for more. The first is usual."),
]
Sizes = Annotated[
    list[str] | None,
    typer.Option("--size", help="A size to serve, WIDTHxHEIGHT; give it again for more."),
]
Batches = Annotated[
    str | None,
    typer.Option(
        "--batches", help="Pictures drawn at once, such as 1,2,4,8: by default 1 on CPUs."
    ),
]
Host = Annotated[str, typer.Option("--host", help="Address; by default this machine alone.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0 is any free one.")]
Tokens = Annotated[
    int | None, typer.Option("--prompt-tokens", min=1, help="Tokens of the longest prompt served.")
]
Key = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="SPARVAR_API_KEY", help="Key clients must give; better in the variable."
    ),
]
Waiting = Annotated[int, typer.Option("--queue", min=1, help="Pictures that may wait.")]
Most = Annotated[int, typer.Option("--most-pictures", min=1, max=10, help="Of one request.")]
Seconds = Annotated[float, typer.Option("--seconds", help="A request may take.")]
Unguided = Annotated[bool, typer.Option("--unguided", help="Also serve guidance 1.")]
SafetyFilter = Annotated[
    str | None,
    typer.Option("--safety-filter", help="MODULE:FUNCTION that flags pictures to hold back."),
]
GPU_BATCHES = (1, 2, 4, 8)


def serve(
    model: options.Model = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    plan: Plans = None,
    size: Sizes = None,
    batches: Batches = None,
    prompt_tokens: Tokens = None,
    unguided: Unguided = False,
    queue: Waiting = 64,
    most_pictures: Most = 10,
    seconds: Seconds = 120.0,
    api_key: Key = None,
    safety_filter: SafetyFilter = None,
    page: Annotated[bool, typer.Option("--page", help="Also serve the page.")] = False,
    dtype: options.Precision = None,
    weights: options.Weights = None,
    stream: options.Stream = None,
) -> None:
    """Serve the OpenAI images API: POST /v1/images/generations. Compiles, then opens the port."""
    from sparvar_jax.serve.settings import Settings

    settings = Settings(
        plans=tuple(plan or ()),
        sizes=tuple(size or ()),
        batches=_batches(batches),
        prompt_tokens=prompt_tokens,
        unguided=unguided,
        waiting=queue,
        most_pictures=most_pictures,
        seconds=seconds,
        api_key=api_key,
        flagged=_filter(safety_filter),
        page=page,
    )
    _run(model, options.loading(dtype, weights, stream), settings, host, port)


def web(
    model: options.Model = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    plan: Plans = None,
    size: Sizes = None,
    prompt_tokens: Tokens = None,
    api_key: Key = None,
    opened: Annotated[
        bool, typer.Option("--open/--no-open", help="Show the page in a browser.")
    ] = True,
    dtype: options.Precision = None,
    weights: options.Weights = None,
    stream: options.Stream = None,
) -> None:
    """Open a page that draws, compares plans and shows attention; the API is served beside it."""
    from sparvar_jax.serve.settings import Settings

    settings = Settings(
        plans=tuple(plan or ("dense", "sparvar-fast")),
        sizes=tuple(size or ()),
        prompt_tokens=prompt_tokens,
        api_key=api_key,
        page=True,
        study=True,
    )
    _run(model, options.loading(dtype, weights, stream), settings, host, port, show=opened)


def _run(
    model: Path | None,
    how: dict[str, Any],
    settings: Settings,
    host: str,
    port: int,
    show: bool = False,
) -> None:
    from sparvar_jax.serve import running

    # A port that is taken is found before the work.
    with running.bind(host, port) as bound:
        _serve_at(bound, host, model, how, settings, show)


def _serve_at(
    bound: socket.socket,
    host: str,
    model: Path | None,
    how: dict[str, Any],
    settings: Settings,
    show: bool,
) -> None:
    from sparvar_jax.pipelines import loading
    from sparvar_jax.pipelines.pipeline import Pipeline
    from sparvar_jax.serve import running
    from sparvar_jax.serve.app import create_app
    from sparvar_jax.serve.menu import Menu
    from sparvar_jax.serve.warming import warm_up

    described = loading.describe_model(loading.model_folder(model))
    Menu(Pipeline(described), settings)  # complains before weights are read
    if settings.api_key is None and not running.is_loopback(host):
        console.errors.print(
            f"warning: {host} is open to other machines and no API key is asked for",
            highlight=False,
        )
    console.use_compilation_cache()
    watch = console.Stopwatch()
    with console.progress() as report:
        pipe = Pipeline.from_checkpoint(model, **how, progress=report)
        app = create_app(pipe, settings)
        watch.lap("loaded")
        warm_up(pipe, settings, report)
        watch.lap("compiled")
    watch.tell()
    address = running.address_of(bound)

    def opened() -> None:
        console.output.print(f"{pipe.model.name} is served at {address}", highlight=False)
        if show:
            typer.launch(address)

    running.run(app, bound, settings.seconds, opened)


def _batches(text: str | None) -> tuple[int, ...]:
    if text is None:
        import jax

        return (1,) if jax.default_backend() == "cpu" else GPU_BATCHES
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--batches takes numbers such as 1,2,4, got {text!r}") from None


def _filter(name: str | None) -> Any:
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"the safety filter {name!r} (MODULE:FUNCTION): {error}") from error
    if not callable(found):
        raise ValueError(f"the safety filter {name!r} is no function")
    return found
