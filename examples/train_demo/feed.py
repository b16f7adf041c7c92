"""Recipes and captions in the background: the host's whole share of the work while training."""

import argparse
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from examples.train_demo import vocabulary
from examples.train_demo.captions import draw_example, stack
from examples.train_demo.names import said_otherwise
from examples.train_demo.pictures import Collection
from examples.train_demo.variety import Variety, paintable

Chunk = dict[str, Any]


def make_chunk(
    collection: Collection,
    indices: np.ndarray,
    size: int,
    seed: int,
    scenes: float = 0.5,
    variety: Variety | None = None,
    plain: str = "",
    other_names: float = 0.0,
) -> Chunk:
    """`size` random captions and recipes of the given pictures: `recipes`, `ids`, `lengths`.

    scenes: share of composed scenes. variety: of which share there are other examples instead.
    plain: the one style that captions may leave unsaid, see `captions.style_said`. other_names: how
    often a thing that has other names goes by one of them.
    """
    rng = np.random.default_rng(seed)
    pictures = collection.pictures
    if other_names:
        pictures = said_otherwise(pictures, other_names, rng)
    by_style = {s: v for s, v in collection.by_style(indices).items() if len(v) >= 3}
    drawn = [
        variety.draw(pictures, by_style, rng, scenes, plain)
        if variety is not None and rng.random() < variety.share
        else draw_example(pictures, by_style, rng, scenes, plain)
        for _ in range(size)
    ]
    ids, lengths = vocabulary.tokenise(vocabulary.read(), [words for words, _ in drawn])
    return {"recipes": stack([recipe for _, recipe in drawn]), "ids": ids, "lengths": lengths}


def chosen(args: argparse.Namespace, collection: Collection) -> np.ndarray:
    """Indices of the training pictures that this run draws from."""
    return collection.distinct(collection.train) if args.distinct else collection.train


def maker(
    args: argparse.Namespace, collection: Collection, sprites: np.ndarray
) -> Callable[[int, int], Chunk]:
    """What draws captions and recipes as a command line asks for them."""
    variety = Variety(args.variety, paintable(collection.pictures, sprites))
    things = chosen(args, collection)
    said = args.plain_style, args.other_names
    return lambda size, seed: make_chunk(
        collection, things, size, seed, args.scenes, variety, *said
    )


class Feeder:
    """An endless iterator of chunks, drawn ahead by a thread."""

    def __init__(self, make: Callable[[int], Chunk], ahead: int = 64, first_seed: int = 10_000):
        self._queue: queue.Queue[Chunk] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, first_seed), daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[int], Chunk], seed: int) -> None:
        while not self._stop.is_set():
            chunk = make(seed)
            seed += 1
            while not self._stop.is_set():
                try:
                    self._queue.put(chunk, timeout=0.5)
                    break
                except queue.Full:
                    continue

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            yield self._queue.get()

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
