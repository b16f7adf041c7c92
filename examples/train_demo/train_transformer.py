"""Stage 4: train the transformer and its text encoder, bounded by the wall clock.

Run `python -m examples.train_demo.train_transformer --seconds 480 --out runs/demo` after stage 3.
Always the full 13-scale token sequence is meant, but a step may stop after 5, 7, 10 or 13 scales
(prefix-progressive): the first scales decide what is drawn and cost next to nothing, the last cost
nearly everything and are mostly local. Bit-wise self-correction, text dropped for one picture in
ten, and both networks trained together.
"""

import argparse
import collections
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from examples.train_demo import optim, parallel, pool, store
from examples.train_demo.captions import STYLE_SUFFIX
from examples.train_demo.course import COURSES, Budget, Record, Used, course
from examples.train_demo.feed import Chunk, Feeder, maker
from examples.train_demo.models import (
    SCHEDULE,
    SIZES,
    DemoConfig,
    Network,
    initial,
    networks,
)
from examples.train_demo.pictures import load_sprites
from examples.train_demo.programs import BATCHES, Objective, Programs
from sparvar_jax.models.infinity import Infinity
from sparvar_jax.models.t5 import T5Encoder

PEAK_RATE = 2e-3
CONSTANT_SHARE = 0.5
FINAL_RATE = 0.02
SCENES = 0.5
POOL = 16384
REFILL = 32
IN_FLIGHT = 2
SAVE_SECONDS = 45
KEEP_SECONDS = 150
SEEDS_A_STEP = 1_000_000  # apart, so that calls of one course draw other pictures
REPORT_SECONDS = 10


@dataclass(frozen=True)
class Setting:
    """How a training goes; `add_arguments` says what each of these means."""

    pool: int = POOL
    peak: float = PEAK_RATE
    constant: float = CONSTANT_SHARE
    final: float = FINAL_RATE
    text_until: float = 1.0
    cycle: tuple[int, ...] = ()
    refill: int = REFILL

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Setting":
        """What a command line asks for."""
        return cls(
            args.pool, args.rate, args.constant, args.final_rate, args.text_until,
            tuple(args.cycle), args.refill,
        )  # fmt: skip

    def rates(self, fraction: float, step: int) -> np.ndarray:
        """Rates of the transformer and of the text encoder, which is held after its share."""
        rate = optim.learning_rate(
            self.peak, fraction, step, warmup=50, constant=self.constant, final=self.final
        )
        return np.array([rate, rate if fraction < self.text_until else 0.0], np.float32)


def fill(
    setting: Setting,
    nets: dict[str, Network],
    mesh: Any,
    refill: Callable[..., pool.Pool],
    tokenizer: Any,
    sprites: Array,
    chunks: Iterator[Any],
) -> pool.Pool:
    """A pool full of freshly encoded pictures."""
    began = time.time()
    size = setting.pool
    data = pool.empty(size, SCHEDULE.final, nets["transformer"].config.bits)
    data = parallel.put(data, mesh, parallel.SPLIT)
    for start in range(0, size // mesh.size, setting.refill):
        data = refill(data, tokenizer, sprites, next(chunks), np.int32(start))
    data = jax.block_until_ready(data)
    print(f"pool of {size} pictures in {time.time() - began:.0f} s", flush=True)
    return data


def train(
    nets: dict[str, Network],
    state: optim.TrainState,
    tokenizer: Any,
    sprites: Array,
    make: Callable[[int, int], Chunk],
    mesh: Any,
    programs: Programs,
    *,
    setting: Setting,
    budget: Budget,
    save: Callable[[Any, Record], Any],
    keep: Callable[[optim.TrainState, Used, Record], Any] | None = None,
) -> None:
    """Train on from a state, until the budget is used up.

    `make(size, seed)` draws captions and recipes. Called now and then, and last:
    `save(averaged params, record)`, and `keep` with the whole state and what of the course is used.
    """
    first, warm = budget.used.steps, int(state.step)
    state = parallel.put(state, mesh)
    refill = pool.make_refill(nets["tokenizer"], mesh)
    draw = functools.partial(make, setting.refill * mesh.size)
    feeder = Feeder(draw, 256, (first + 1) * SEEDS_A_STEP)
    chunks = iter(feeder)
    data = fill(setting, nets, mesh, refill, tokenizer, sprites, chunks)
    programs.wait()
    record, began = Record(), time.time()
    shown = saved = kept = began
    count, waiting = 0, collections.deque()
    while not budget.over(began, count):
        fraction = budget.fraction(began, count)
        scales, step = programs.pick(course(fraction, first + count, setting.cycle))
        rates = setting.rates(fraction, warm + count)
        state, losses = step(state, data, np.uint32(first + count), rates)
        start = np.int32(count * setting.refill % (setting.pool // mesh.size))
        data = refill(data, tokenizer, sprites, next(chunks), start)
        count += 1
        record.steps[scales] += 1
        waiting.append((scales, losses))
        if len(waiting) > IN_FLIGHT:
            # Waiting for an older step bounds the queue, so that the deadline holds.
            done, values = waiting.popleft()
            record.losses[done] = np.asarray(values).tolist()
        now = time.time()
        record.seconds = now - began
        if now - shown > REPORT_SECONDS:
            shown = now
            record.show(fraction, float(rates[0]))
        if now - saved > SAVE_SECONDS:
            saved = now
            save(programs.packing.averaged(state), record)
        if keep is not None and now - kept > KEEP_SECONDS:
            kept = now
            keep(state, budget.after(record.seconds, count), record)
    feeder.close()
    record.losses |= {scales: np.asarray(values).tolist() for scales, values in waiting}
    save(programs.packing.averaged(state), record)
    if keep is not None:
        keep(state, budget.after(record.seconds, count), record)
    fraction = budget.fraction(began, count)
    record.show(fraction, float(setting.rates(fraction, warm + count)[0]))


def start_params(
    config: DemoConfig, nets: dict[str, Network], weights: Path | None, fresh_text: bool = False
) -> Any:
    """Fresh parameters of the transformer and its text encoder, or those saved in a folder.

    A transformer of more layers than the saved one begins as its equal, see `deepen`.
    fresh_text: the text encoder begins anew beside a saved transformer.
    """
    text = initial(T5Encoder, config.text, 2)
    if weights is None:
        return {"transformer": initial(Infinity, config.transformer, 1), "text": text}
    like = {name: nets[name].like for name in ("transformer", "text")}
    params = store.load(weights, "transformer", like, config.transformer.depth)
    return params | {"text": text} if fresh_text else params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this stage that both commands have."""
    parser.add_argument("--pool", type=int, default=POOL, help="encoded pictures kept")
    parser.add_argument(
        "--refill", type=int, default=REFILL, help="of them drawn anew, a device and a step"
    )
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
    parser.add_argument(
        "--variety",
        type=float,
        default=0.0,
        help="share of examples with a thing in other colours, or several times",
    )
    parser.add_argument(
        "--plain-style",
        choices=("", *STYLE_SUFFIX),
        default="",
        help="the one style that captions may leave unsaid; by default all styles",
    )
    parser.add_argument(
        "--other-names",
        type=float,
        default=0.0,
        help="how often a thing goes by what else people call it (names.py)",
    )
    parser.add_argument("--rate", type=float, default=PEAK_RATE)
    parser.add_argument(
        "--constant", type=float, default=CONSTANT_SHARE, help="share of the course at that rate"
    )
    parser.add_argument(
        "--final-rate", type=float, default=FINAL_RATE, help="its share that is left at the end"
    )
    parser.add_argument(
        "--text-until",
        type=float,
        default=1.0,
        help="share of the course after which the text encoder is held (0: from the start)",
    )
    parser.add_argument(
        "--last-weight",
        type=float,
        default=Objective.last_weight,
        help="times the usual weight of the last three scales' losses",
    )
    parser.add_argument(
        "--text-dropped", type=float, default=Objective.text_dropped, help="share without text"
    )
    parser.add_argument(
        "--memory",
        type=int,
        default=Objective.memory,
        help="steps the exponential average looks back; by default the last twentieth of all",
    )
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


def make_programs(args: argparse.Namespace, nets: dict[str, Network], mesh: Any) -> Programs:
    """The steps at the batch sizes asked for; compilation begins here."""
    used = args.cycle or {scales for part in COURSES for scales in part.cycle}
    batches = dict(zip(BATCHES, args.batches, strict=True))
    batches = {scales: batch for scales, batch in batches.items() if scales in used}
    objective = Objective(args.last_weight, args.text_dropped, args.memory)
    return Programs(nets, mesh, batches, args.pool, args.remat, objective)


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
    params = start_params(config, nets, args.restart, args.fresh_text)
    train(
        nets,
        optim.start(programs.packing.pack(params), programs.optimizer),
        parallel.put(tokenizer, mesh),
        parallel.put(sprites, mesh),
        maker(args, collection, sprites),
        mesh,
        programs,
        setting=Setting.of(args),
        budget=Budget(until, tuple(args.span), args.max_steps),
        save=lambda params, _: store.save(args.out, "transformer", params),
    )


if __name__ == "__main__":
    main()
