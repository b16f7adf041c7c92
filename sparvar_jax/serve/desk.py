"""Requests as tickets, and what is told of them as coroutines: queue, limits of time, leaving."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import numpy as np
from jaxtyping import UInt8

from sparvar_jax.pipelines import metadata
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.serve.batching import Batcher, Event, Ticket
from sparvar_jax.serve.errors import Refused, too_slow
from sparvar_jax.serve.menu import Menu, Order
from sparvar_jax.serve.metrics import Metrics
from sparvar_jax.serve.settings import Settings

BLOCKED = "the safety filter holds this picture back: describe another one"


class Desk:
    """Takes orders for one pipeline and hands over pictures; used from one event loop."""

    def __init__(self, pipe: Pipeline, settings: Settings):
        self.pipe, self.settings, self.metrics = pipe, settings, Metrics()
        self.menu = Menu(pipe, settings)
        self.batcher = Batcher(pipe, settings, self.metrics)
        self._versions = ", ".join(f"{k} {v}" for k, v in metadata.versions().items())

    @contextlib.asynccontextmanager
    async def placed(self, order: Order) -> AsyncIterator[Draft]:
        """The pictures of an order while they are drawn; leaving the block gives up the rest.

        Raises `Refused` where the queue is full.
        """
        draft = Draft(order, self.settings.seconds)
        self.batcher.submit(draft.tickets)
        try:
            yield draft
        finally:
            self.batcher.drop(draft.tickets)

    def told(self, order: Order, seed: int) -> dict[str, str]:
        """How a picture is made, for its file."""
        settings = {
            "prompt": order.prompt,
            "negative": order.negative,
            "seed": seed,
            "plan": order.bucket.plan,
            "guidance": order.bucket.guidance or self.pipe.model.defaults.guidance,
            "model": self.pipe.model.name,
            "versions": self._versions,
        }
        return {name: str(value) for name, value in settings.items() if value is not None}


class Draft:
    """One order on its way. tickets: its pictures; the first alone is shown before it is done."""

    def __init__(self, order: Order, seconds: float):
        self._loop = asyncio.get_running_loop()
        self._deadline, self._seconds = self._loop.time() + seconds, seconds
        self._told: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.tickets = [self._ticket(order, index) for index in range(order.count)]

    def _ticket(self, order: Order, index: int) -> Ticket:
        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(self._told.put_nowait, (index, event))

        seed, previews = order.seed + index, order.previews
        return Ticket(order.bucket, order.prompt, order.negative, seed, previews, tell)

    async def next(self) -> tuple[int, Event]:
        """What happens next, and to which picture; raises `Refused` for errors and lateness."""
        try:
            async with asyncio.timeout_at(self._deadline):
                index, event = await self._told.get()
        except TimeoutError:
            raise too_slow(self._seconds) from None
        if event.error is not None:
            raise event.error
        if event.held_back:
            raise Refused(400, BLOCKED, param="prompt", code="moderation_blocked")
        return index, event

    async def pictures(self) -> list[UInt8[np.ndarray, "height width 3"]]:
        """All pictures, in the order of their seeds."""
        found: dict[int, UInt8[np.ndarray, "height width 3"]] = {}
        while len(found) < len(self.tickets):
            index, event = await self.next()
            if event.preview is None and event.pixels is not None:
                found[index] = event.pixels
        return [found[index] for index in range(len(self.tickets))]
