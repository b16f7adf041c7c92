"""Stage 4: train the transformer and its text encoder, bounded by the wall clock.

Run `python -m examples.train_demo.train_transformer --seconds 480 --out runs/demo` after stage 3.
Always the full 13-scale token sequence is meant, but a step may stop after 5, 7, 10 or 13 scales
(prefix-progressive): the first scales decide what is drawn and cost next to nothing, the last cost
nearly everything and are mostly local. Bit-wise self-correction, text dropped for one picture in
ten, and both networks trained together.
"""

import argparse
import collections
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from examples.train_demo import optim, parallel, pool, store
from examples.train_demo.feed import Feeder, make_chunk
from examples.train_demo.models import (
    SCHEDULE,
    SIZES,
    DemoConfig,
    Network,
    initial,
    networks,
)
from examples.train_demo.pictures import Collection, load_sprites
from examples.train_demo.programs import BATCHES, Programs
from sparvar_jax.models.infinity import Infinity
from sparvar_jax.models.t5 import T5Encoder

PEAK_RATE = 2e-3
CONSTANT_SHARE = 0.5
SCENES = 0.5
POOL = 16384
REFILL = 32  # pictures a device and a step
IN_FLIGHT = 2
SAVE_SECONDS = 45
REPORT_SECONDS = 10


@dataclass(frozen=True)
class Course:
    """Which prefix lengths a part of the training cycles through, until a share of its time."""

    until: float
    cycle: tuple[int, ...]


# The whole sequence enters well before the rate begins to fall: the last scales start last, and
# a falling rate would leave them noisy.
COURSES = (Course(0.28, (7,)), Course(0.42, (10, 7)), Course(1.0, (13, 7, 10, 7)))


@dataclass(frozen=True)
class Budget:
    """When to stop, and which part of the whole course this run covers.

    until: `time.time()` at which to stop. span: shares of the course, (0, 1) for all of it; a run
    that goes on from weights covers a later part. steps: at most so many, for rehearsals.
    """

    until: float
    span: tuple[float, float] = (0.0, 1.0)
    steps: int | None = None

    def fraction(self, began: float) -> float:
        """Where in the whole course a run that began then is now; its end is the end of `span`."""
        share = min(1.0, (time.time() - began) / max(self.until - began, 1e-3))
        first, last = self.span
        return first + share * (last - first)

    def over(self, count: int) -> bool:
        """Whether time or steps are used up."""
        return time.time() >= self.until or count == self.steps


@dataclass
class Record:
    """What a run did, for the log and the model card."""

    steps: collections.Counter = field(default_factory=collections.Counter)
    losses: dict[int, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def show(self, fraction: float) -> None:
        """Print the latest loss of every scale for every prefix length."""
        for scales, losses in sorted(self.losses.items()):
            values = " ".join(f"{v:.3f}" for v in losses)
            print(
                f"{self.seconds:.0f} s {fraction:.0%} | {scales} scales "
                f"x{self.steps[scales]}: {values}",
                flush=True,
            )


def course(fraction: float, count: int, cycle: Sequence[int] = ()) -> int:
    """The prefix length of step `count` after a fraction of the course, or of a fixed cycle."""
    if not cycle:
        cycle = next((c for c in COURSES if fraction < c.until), COURSES[-1]).cycle
    return cycle[count % len(cycle)]


def fill(
    size: int,
    nets: dict[str, Network],
    mesh: Any,
    refill: Callable[..., pool.Pool],
    tokenizer: Any,
    sprites: Array,
    chunks: Iterator[Any],
) -> pool.Pool:
    """A pool full of freshly encoded pictures."""
    began = time.time()
    data = pool.empty(size, SCHEDULE.final, nets["transformer"].config.bits)
    data = parallel.put(data, mesh, parallel.SPLIT)
    for start in range(0, size // mesh.size, REFILL):
        data = refill(data, tokenizer, sprites, next(chunks), np.int32(start))
    data = jax.block_until_ready(data)
    print(f"pool of {size} pictures in {time.time() - began:.0f} s", flush=True)
    return data


def train(
    nets: dict[str, Network],
    params: Any,
    tokenizer: Any,
    sprites: Array,
    collection: Collection,
    mesh: Any,
    programs: Programs,
    *,
    things: np.ndarray,
    budget: Budget,
    pool_size: int,
    save: Callable[[Any, Record], Any],
    peak: float = PEAK_RATE,
    scenes: float = SCENES,
    cycle: Sequence[int] = (),
) -> None:
    """Train on the pictures of indices `things` until the budget is used up.

    `save(averaged params, record)` is called now and then, and last. scenes: share of composed
    scenes. cycle: prefix lengths in turn, instead of those of `COURSES`.
    """
    state = parallel.put(optim.start(programs.packing.pack(params), programs.optimizer), mesh)
    refill = pool.make_refill(nets["tokenizer"], mesh)
    fresh = REFILL * mesh.size
    feeder = Feeder(lambda seed: make_chunk(collection, things, fresh, seed, scenes), 256)
    chunks = iter(feeder)
    data = fill(pool_size, nets, mesh, refill, tokenizer, sprites, chunks)
    programs.wait()
    record, began = Record(), time.time()
    shown, saved, count, waiting = began, began, 0, collections.deque()
    while not budget.over(count):
        fraction = budget.fraction(began)
        scales, step = programs.pick(course(fraction, count, cycle))
        rate = optim.learning_rate(peak, fraction, count, warmup=50, constant=CONSTANT_SHARE)
        state, losses = step(state, data, np.uint32(count), np.float32(rate))
        start = np.int32(count * REFILL % (pool_size // mesh.size))
        data = refill(data, tokenizer, sprites, next(chunks), start)
        count += 1
        record.steps[scales] += 1
        waiting.append((scales, losses))
        if len(waiting) > IN_FLIGHT:
            # Waiting for an older step bounds the queue, so that the deadline holds.
            done, values = waiting.popleft()
            record.losses[done] = np.asarray(values).tolist()
        record.seconds = time.time() - began
        if time.time() - shown > REPORT_SECONDS:
            shown = time.time()
            record.show(fraction)
        if time.time() - saved > SAVE_SECONDS:
            saved = time.time()
            save(programs.packing.averaged(state), record)
    feeder.close()
    record.losses |= {scales: np.asarray(values).tolist() for scales, values in waiting}
    save(programs.packing.averaged(state), record)
    record.show(budget.fraction(began))


def start_params(
    config: DemoConfig, nets: dict[str, Network], weights: Path | None, fresh_text: bool = False
) -> Any:
    """Fresh parameters of the transformer and its text encoder, or those saved in a folder.

    fresh_text: the text encoder begins anew beside a saved transformer.
    """
    text = initial(T5Encoder, config.text, 2)
    if weights is None:
        return {"transformer": initial(Infinity, config.transformer, 1), "text": text}
    like = {name: nets[name].like for name in ("transformer", "text")}
    params = store.load(weights, "transformer", like)
    return params | {"text": text} if fresh_text else params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this stage that both commands have."""
    parser.add_argument("--pool", type=int, default=POOL, help="encoded pictures kept")
    parser.add_argument(
        "--batches",
        type=int,
        nargs=len(BATCHES),
        default=list(BATCHES.values()),
        help=f"pictures a step at {', '.join(map(str, BATCHES))} scales",
    )
    parser.add_argument("--scenes", type=float, default=SCENES, help="share of composed scenes")
    parser.add_argument(
        "--cycle", type=int, nargs="+", choices=BATCHES, default=(), help="prefix lengths in turn"
    )
    parser.add_argument("--rate", type=float, default=PEAK_RATE)
    parser.add_argument(
        "--distinct", action="store_true", help="leave out people, faces, hands and hearts"
    )
    parser.add_argument(
        "--span", type=float, nargs=2, default=(0.0, 1.0), help="part of the course (0 1: all)"
    )
    parser.add_argument(
        "--fresh-text", action="store_true", help="with --restart: begin the text encoder anew"
    )
    parser.add_argument("--remat", action="store_true", help="less memory, more time")
    parser.add_argument("--max-steps", type=int, help="at most so many steps (rehearsal)")
    parser.add_argument("--size", choices=SIZES, default="shipped")
    parser.add_argument("--things", type=int, help="only so many things (rehearsal)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--restart", type=Path, help="go on from these weights, or from this exported model"
    )


def chosen(args: argparse.Namespace, collection: Collection) -> np.ndarray:
    """Indices of the training pictures that this run draws from."""
    return collection.distinct(collection.train) if args.distinct else collection.train


def make_programs(args: argparse.Namespace, nets: dict[str, Network], mesh: Any) -> Programs:
    """The steps at the batch sizes asked for; compilation begins here."""
    used = args.cycle or {scales for part in COURSES for scales in part.cycle}
    batches = dict(zip(BATCHES, args.batches, strict=True))
    batches = {scales: batch for scales, batch in batches.items() if scales in used}
    return Programs(nets, mesh, batches, args.pool, args.remat)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=480, help="of everything")
    add_arguments(parser)
    args = parser.parse_args()
    until = time.time() + args.seconds
    config, mesh = SIZES[args.size], parallel.make_mesh()
    nets = networks(config)
    programs = make_programs(args, nets, mesh)
    collection, sprites = load_sprites(args.things)
    tokenizer = store.load(args.restart or args.out, "tokenizer", nets["tokenizer"].like)
    train(
        nets,
        start_params(config, nets, args.restart, args.fresh_text),
        parallel.put(tokenizer, mesh),
        parallel.put(sprites, mesh),
        collection,
        mesh,
        programs,
        things=chosen(args, collection),
        budget=Budget(until, tuple(args.span), args.max_steps),
        pool_size=args.pool,
        peak=args.rate,
        scenes=args.scenes,
        cycle=args.cycle,
        save=lambda params, _: store.save(args.out, "transformer", params),
    )


if __name__ == "__main__":
    main()
