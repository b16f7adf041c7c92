"""Pictures that wait, and the one thread that draws them, batch after batch."""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.serve.errors import closing, failed, overloaded
from sparvar_jax.serve.menu import Bucket
from sparvar_jax.serve.metrics import Metrics
from sparvar_jax.serve.settings import Settings

log = logging.getLogger("sparvar.serve")
SCALES_AHEAD = 3
"""Of the device: waiting for the one before would leave it idle where scales take a millisecond."""


@dataclasses.dataclass(frozen=True)
class Event:
    """What happens to a picture: a preview (with its index), the picture, or an error.

    seconds: since its batch began to be drawn. held_back: by the safety filter.
    """

    pixels: UInt8[np.ndarray, "height width 3"] | None = None
    preview: int | None = None
    error: Exception | None = None
    seconds: float = 0.0
    held_back: bool = False


@dataclasses.dataclass(eq=False)
class Ticket:
    """The place of one picture in the queue.

    previews: steps after which one is shown. tell: called with every event, in another thread.
    gone: nobody waits for it any more.
    """

    bucket: Bucket
    prompt: str
    negative: str | None
    seed: int
    previews: tuple[int, ...]
    tell: Callable[[Event], None]
    gone: bool = False
    since: float = dataclasses.field(default_factory=time.perf_counter)


class Batcher:
    """Draws tickets of one bucket together, the oldest bucket first.

    While one batch is on the device, the next is made ready behind it: half of all pictures in the
    house, so that two batches take turns and the device never waits for answers and new requests.
    A batch is filled up to a compiled number by drawing its last picture again.
    """

    def __init__(self, pipe: Pipeline, settings: Settings, metrics: Metrics):
        self._pipe, self._settings, self._metrics = pipe, settings, metrics
        self._changed = threading.Condition()
        self._waiting: list[Ticket] = []
        self._drawing = 0
        self._alone: collections.deque[tuple[Callable[[], Any], Future[Any]]] = collections.deque()
        self._closed = False
        self._telling = ThreadPoolExecutor(1, "sparvar-tell")
        self._thread = threading.Thread(target=self._work, name="sparvar-draw", daemon=True)
        metrics.watch(self)

    @property
    def alive(self) -> bool:
        """Whether pictures are drawn."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Pictures in the queue."""
        return len(self._waiting)

    @property
    def drawing(self) -> int:
        """Pictures of batches that were begun and are not done."""
        return self._drawing

    def start(self) -> None:
        """Begin to draw."""
        self._thread.start()

    def close(self) -> None:
        """Draw what waits, then stop. Returns when all is told."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        self._telling.shutdown()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue the pictures of one request, all or none; raises `Refused` where that cannot be."""
        with self._changed:
            if self._closed:
                raise closing()
            if len(self._waiting) + len(tickets) > self._settings.waiting:
                raise overloaded(len(self._waiting))
            self._waiting += tickets
            self._changed.notify_all()

    def drop(self, tickets: Sequence[Ticket]) -> None:
        """Nobody waits for these any more: their places are free, and what is drawn may stop."""
        with self._changed:
            for ticket in tickets:
                ticket.gone = True
            self._waiting = [ticket for ticket in self._waiting if not ticket.gone]
            self._changed.notify_all()

    def alone(self, work: Callable[[], Any]) -> Future[Any]:
        """Run something else on the device, between batches; raises `Refused` if that is full."""
        done: Future[Any] = Future()
        with self._changed:
            if self._closed:
                raise closing()
            if self._alone:
                raise overloaded(len(self._waiting))
            self._alone.append((work, done))
            self._changed.notify_all()
        return done

    def _work(self) -> None:
        while (job := self._next()) is not None:
            if isinstance(job, list):
                self._draw(job)
                continue
            work, done = job
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

    def _next(self) -> Any:
        """The tickets of the next batch, or work to do alone; None after the last."""
        with self._changed:
            while True:
                if self._alone and not self._drawing:
                    return self._alone.popleft()
                count = 0 if self._alone else self._ready()
                if count:
                    return self._take(count)
                if self._closed and not self._waiting and not self._alone:
                    return None
                self._changed.wait()

    def _ready(self) -> int:
        """How many pictures to begin now; 0 is to wait."""
        if not self._waiting:
            return 0
        bucket, largest = self._waiting[0].bucket, self._settings.largest
        count = sum(ticket.bucket == bucket for ticket in self._waiting)
        if not self._drawing:
            return min(count, largest)
        if count < min(self._drawing, largest):
            return 0
        return min(largest, (count + self._drawing + 1) // 2)

    def _take(self, count: int) -> list[Ticket]:
        bucket = self._waiting[0].bucket
        chosen = [ticket for ticket in self._waiting if ticket.bucket == bucket][:count]
        taken = set(map(id, chosen))
        self._waiting = [ticket for ticket in self._waiting if id(ticket) not in taken]
        self._drawing += len(chosen)
        return chosen

    def _draw(self, tickets: list[Ticket]) -> None:
        """Dispatch one batch, a few scales ahead of the device, and have it told."""
        begun = time.perf_counter()
        self._metrics.begun(tickets, begun)
        try:
            pictures = self._pictures(tickets, begun)
        except Exception as error:
            log.exception("a batch of %d failed", len(tickets))
            self._end(tickets)
            self._telling.submit(self._failed, tickets, error)
            return
        if pictures is None:
            self._end(tickets)
        else:
            self._telling.submit(self._finish, tickets, pictures, begun)

    def _pictures(self, tickets: list[Ticket], begun: float) -> jax.Array | None:
        """The pictures, not waited for; None if nobody wants them any more."""
        pipe, bucket = self._pipe, tickets[0].bucket
        rows = tickets + tickets[-1:] * (self._settings.padded(len(tickets)) - len(tickets))
        guided = {} if bucket.negative is None else {"negative": [t.negative for t in rows]}
        request = pipe.request(
            [ticket.prompt for ticket in rows],
            seed=[ticket.seed for ticket in rows],
            **bucket.options,
            **guided,
        )
        code_sum, ahead = None, collections.deque[jax.Array]()
        for index, (state, output) in enumerate(pipe.steps(request)):
            if len(ahead) == SCALES_AHEAD:  # so that work nobody wants can stop between scales
                ahead.popleft().block_until_ready()
            if all(ticket.gone for ticket in tickets):
                return None
            ahead.append(output.tokens)
            code_sum = state.code_sum
            shown = [ticket for ticket in tickets if index in ticket.previews]
            if shown:
                preview = pipe.pixels(code_sum)
                self._telling.submit(self._preview, tickets, preview, index, begun)
        assert code_sum is not None
        return pipe.pixels(code_sum)

    def _preview(self, tickets: list[Ticket], pictures: jax.Array, step: int, begun: float) -> None:
        try:
            pixels = np.asarray(pictures)
            held_back = self._held_back(pixels)
        except Exception:  # the picture itself will tell what is wrong
            log.exception("a preview failed")
            return
        seconds = time.perf_counter() - begun
        for ticket, picture, held in zip(tickets, pixels, held_back, strict=False):
            if step in ticket.previews and not held:
                index = ticket.previews.index(step)
                self._tell(ticket, Event(picture, preview=index, seconds=seconds))

    def _finish(self, tickets: list[Ticket], pictures: jax.Array, begun: float) -> None:
        try:
            try:
                pixels = np.asarray(pictures)
            finally:
                self._end(tickets)  # the device is free: the next batch need not wait for more
            held_back = self._held_back(pixels[: len(tickets)])
        except Exception as error:
            log.exception("a batch of %d failed", len(tickets))
            self._failed(tickets, error)
            return
        seconds = time.perf_counter() - begun
        self._metrics.drawn(tickets, seconds)
        for ticket, picture, held in zip(tickets, pixels, held_back, strict=False):
            event = Event(held_back=True) if held else Event(picture, seconds=seconds)
            self._tell(ticket, event)

    def _failed(self, tickets: list[Ticket], error: Exception) -> None:
        for ticket in tickets:
            self._tell(ticket, Event(error=failed(error)))

    def _held_back(self, pixels: UInt8[np.ndarray, "B height width 3"]) -> Sequence[bool]:
        flagged = self._settings.flagged
        if flagged is None:
            return [False] * len(pixels)
        return [bool(flag) for flag in flagged(pixels)]

    def _tell(self, ticket: Ticket, event: Event) -> None:
        if not ticket.gone:
            ticket.tell(event)

    def _end(self, tickets: list[Ticket]) -> None:
        with self._changed:
            self._drawing -= len(tickets)
            self._changed.notify_all()
