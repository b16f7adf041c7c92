"""Answers: one JSON body, or server-sent events with previews."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from sparvar_jax.serve.desk import Desk, Draft
from sparvar_jax.serve.errors import Refused, failed, log
from sparvar_jax.serve.menu import Order
from sparvar_jax.serve.pictures import USUAL_QUALITY, Encoding
from sparvar_jax.serve.schema import (
    ImageEvent,
    ImageRequest,
    ImagesResponse,
    Picture,
    TextAndImage,
    Usage,
)

Result = TypeVar("Result")
GONE = "client gone"
GONE_STATUS = 499  # nobody reads it; what proxies log


class Answer:
    """The answer to one request that can be drawn."""

    def __init__(self, desk: Desk, asked: ImageRequest, order: Order):
        self._desk, self._asked, self._order = desk, asked, order
        quality = asked.output_compression
        self._encoding = Encoding(
            asked.output_format or "png", USUAL_QUALITY if quality is None else quality
        )
        self._created = int(time.time())

    async def whole(self, request: Request) -> Response:
        """All pictures in one body. A client that goes away frees its place."""
        desk, order = self._desk, self._order
        try:
            async with desk.placed(order) as draft:
                data = await unless_gone(request, self._pictures(draft))
        except ClientGone:
            desk.metrics.answered(GONE)
            return Response(status_code=GONE_STATUS)
        except Refused as error:
            desk.metrics.answered(error.status)
            raise
        desk.metrics.answered(200)
        body = ImagesResponse(
            created=self._created,
            data=data,
            output_format=self._encoding.form,
            quality=self._asked.quality or "auto",
            size=order.bucket.shape.name,
            usage=self._usage(),
        )
        # Written by pydantic: megabytes of base64 take the json module tens of milliseconds.
        return Response(body.model_dump_json(exclude_none=True), media_type="application/json")

    async def events(self) -> Response:
        """Previews and the picture as events. What cannot be begun is an error at once."""
        stack = contextlib.AsyncExitStack()
        try:
            draft = await stack.enter_async_context(self._desk.placed(self._order))
        except Refused as error:
            self._desk.metrics.answered(error.status)
            raise
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = self._events(draft, stack)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def _events(self, draft: Draft, stack: contextlib.AsyncExitStack) -> AsyncIterator[str]:
        outcome: int | str = GONE
        async with stack:
            try:
                done = False
                while not done:
                    _, event = await draft.next()
                    assert event.pixels is not None
                    encoded = await self._encoded(event.pixels, 0)
                    done = event.preview is None
                    yield _sent(self._event(encoded, event.preview))
                outcome = 200
            except Refused as error:
                outcome = error.status
                yield _sent({"type": "error", **error.body()})
            except Exception as error:
                log.exception("a stream failed")
                outcome = 500
                yield _sent({"type": "error", **failed(error).body()})
            finally:
                self._desk.metrics.answered(outcome)

    def _event(self, encoded: str, preview: int | None) -> dict[str, Any]:
        kind = "completed" if preview is None else "partial_image"
        event = ImageEvent(
            type=f"image_generation.{kind}",  # type: ignore[arg-type]
            b64_json=encoded,
            created_at=self._created,
            size=self._order.bucket.shape.name,
            quality=self._asked.quality or "auto",
            output_format=self._encoding.form,
            seed=self._order.seed,
            partial_image_index=preview,
            usage=self._usage() if preview is None else None,
        )
        return event.model_dump(exclude_none=True)

    async def _pictures(self, draft: Draft) -> list[Picture]:
        pixels = await draft.pictures()
        files = await asyncio.gather(
            *(self._encoded(picture, index) for index, picture in enumerate(pixels))
        )
        as_url = self._asked.response_format == "url"
        return [
            Picture(
                b64_json=None if as_url else file,
                url=self._encoding.data_url(file) if as_url else None,
                seed=self._order.seed + index,
            )
            for index, file in enumerate(files)
        ]

    async def _encoded(self, pixels: Any, index: int) -> str:
        told = self._desk.told(self._order, self._order.seed + index)
        return await asyncio.to_thread(self._encoding.base64, pixels, told)

    def _usage(self) -> Usage:
        order = self._order
        read, drawn = order.text_tokens * order.count, order.image_tokens * order.count
        return Usage(
            input_tokens=read,
            input_tokens_details=TextAndImage(text_tokens=read, image_tokens=0),
            output_tokens=drawn,
            total_tokens=read + drawn,
        )


class ClientGone(Exception):
    """Nobody waits for the answer."""


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of some work, given up with `ClientGone` once the client has left."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sent(event: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
