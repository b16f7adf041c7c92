"""The application: routes of the OpenAI images API over one loaded pipeline."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response

from sparvar_jax import __version__
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.serve import errors, guards
from sparvar_jax.serve.desk import Desk
from sparvar_jax.serve.schema import (
    Error,
    Health,
    ImageRequest,
    ImagesResponse,
    ModelCard,
    ModelList,
)
from sparvar_jax.serve.settings import Settings
from sparvar_jax.serve.stream import Answer

PAGE = "/page"
_STATUSES: tuple[int, ...] = (400, 401, 413, 429, 500, 503, 504)
REFUSALS: dict[int | str, dict[str, Any]] = {status: {"model": Error} for status in _STATUSES}

router = APIRouter()


def create_app(pipe: Pipeline, settings: Settings) -> FastAPI:
    """An application that draws with a pipeline while it runs; several may share a process.

    Raises ValueError for settings that the model cannot serve. Compile first: `warming.warm_up`.
    """
    desk = Desk(pipe, settings)
    app = FastAPI(title="sparvar", version=__version__, lifespan=_drawing)
    app.state.desk = desk
    errors.install(app)
    app.include_router(router)
    app.openapi = functools.partial(_description, app, app.openapi)  # type: ignore[method-assign]
    app.add_middleware(guards.BodyLimit, most=settings.most_body)  # type: ignore[arg-type]
    if settings.api_key is not None:
        app.add_middleware(guards.ApiKey, key=settings.api_key)  # type: ignore[arg-type]
    if settings.page:
        from sparvar_jax.serve.page import mount

        app.add_api_route("/", _to_page, include_in_schema=False)
        app = mount(app, desk, PAGE)
    return app


@contextlib.asynccontextmanager
async def _drawing(app: FastAPI) -> AsyncIterator[None]:
    desk: Desk = app.state.desk
    desk.batcher.start()
    try:
        yield
    finally:
        desk.batcher.close()


@router.post("/v1/images/generations", response_model=ImagesResponse, responses=REFUSALS)
async def generations(asked: ImageRequest, request: Request) -> Response:
    """Draw pictures; with `stream`, as server-sent events with previews."""
    desk: Desk = request.app.state.desk
    try:
        order = desk.menu.order(asked)
    except errors.Refused as error:
        desk.metrics.answered(error.status)
        raise
    answer = Answer(desk, asked, order)
    return await (answer.events() if asked.stream else answer.whole(request))


@router.get("/v1/models", responses={401: {"model": Error}})
async def models(request: Request) -> ModelList:
    """The model that answers, whatever name a request gives."""
    return ModelList(data=[_card(request.app.state.desk)])


@router.get("/v1/models/{name:path}", responses={401: {"model": Error}})
async def model(name: str, request: Request) -> ModelCard:
    """The model that answers to this name, which may be any."""
    del name
    return _card(request.app.state.desk)


@router.get("/health", responses={503: {"model": Health}})
async def health(request: Request) -> Health:
    """Whether pictures can be drawn."""
    desk: Desk = request.app.state.desk
    batcher = desk.batcher
    found = Health(
        status="ok" if batcher.alive else "stopped",
        model=desk.pipe.model.name,
        waiting=batcher.waiting,
        drawing=batcher.drawing,
    )
    return found if batcher.alive else JSONResponse(found.model_dump(), 503)  # type: ignore[return-value]


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    found = request.app.state.desk.metrics
    return Response(found.text(), media_type=found.content_type)


async def _to_page() -> Response:
    return RedirectResponse(PAGE)


def _description(app: FastAPI, describe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The OpenAPI description without the 422 that FastAPI promises and this API never gives."""
    if app.openapi_schema is None:
        described = describe()
        for path in described["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            described["components"]["schemas"].pop(name, None)
    return describe()


def _card(desk: Desk) -> ModelCard:
    menu = desk.menu
    return ModelCard(
        id=desk.pipe.model.name,
        created=0,
        plans=list(menu.plans),
        sizes=list(menu.shapes),
    )
