"""Stage 4: train the transformer and its text encoder, bounded by the wall clock.

Run `python -m examples.train_demo.train_transformer --minutes 8 --out runs/demo` after stage 3.
Always the full 13-scale token sequence is meant, but a step may stop after 7, 10 or 13 scales
(prefix-progressive): the first scales decide what is drawn and cost next to nothing, the last cost
nearly everything and are mostly local. Bit-wise self-correction, text dropped for one picture in
ten, and both networks trained together.
"""

import argparse
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from examples.train_demo import optim, parallel, pool, store
from examples.train_demo.feed import Feeder, make_chunk
from examples.train_demo.forward import teacher_forced
from examples.train_demo.models import SCHEDULE, SIZES, DemoConfig, Network, initial, networks
from examples.train_demo.pictures import Collection, load_sprites
from sparvar_jax.models.infinity import Infinity
from sparvar_jax.models.t5 import T5Encoder, encode
from sparvar_jax.quantizer import quantise

PEAK_RATE = 3e-3
FLIP_STRENGTH = 0.2
TEXT_DROPPED = 0.1
REFILL = 64
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Course:
    """Which prefix lengths a part of the training cycles through, until a share of its time."""

    until: float
    cycle: tuple[int, ...]


COURSES = (Course(0.27, (7,)), Course(0.48, (10, 7)), Course(1.0, (13, 7, 13, 10)))
BATCHES = {7: 384, 10: 64, 13: 12}


def bit_losses(
    logits: Float[Array, "B T logits"], labels: tuple[Array, ...]
) -> tuple[Float[Array, "scales"], Float[Array, "scales"]]:
    """Mean cross-entropy of a bit, in nats, and share of right bits, for every scale."""
    pairs = logits.reshape(*logits.shape[:2], -1, 2)
    margin = pairs[..., 1] - pairs[..., 0]
    losses, right, offset = [], [], 0
    for label in labels:
        target = label.reshape(label.shape[0], -1, label.shape[-1])
        part = margin[:, offset : offset + target.shape[1]]
        offset += target.shape[1]
        losses.append(jnp.mean(jax.nn.softplus(jnp.where(target > 0, -part, part))))
        right.append(jnp.mean((part > 0) == (target > 0)))
    return jnp.stack(losses), jnp.stack(right)


def scale_weights(scales: int) -> np.ndarray:
    """Weights of the scales' mean losses: the square root of their tokens, summing to one."""
    tokens = np.array([s.tokens for s in SCHEDULE.scales[:scales]], np.float64)
    return (tokens**0.5 / np.sum(tokens**0.5)).astype(np.float32)


def losses_of_batch(
    nets: dict[str, Network],
    params: Any,
    batch: pool.Pool,
    key: Array,
    scales: int,
    *,
    drop: float = TEXT_DROPPED,
    flip: float = FLIP_STRENGTH,
    remat: bool = False,
) -> tuple[Array, Array]:
    """Per-scale bit losses and accuracies of a batch of the pool."""
    key_flip, key_drop = jax.random.split(key)
    quantised = quantise(batch["latents"], SCHEDULE.sizes, flip=(key_flip, flip) if flip else None)
    model = nets["transformer"].assemble(params["transformer"])
    text = encode(nets["text"].assemble(params["text"]), batch["ids"], batch["lengths"])
    dropped = jax.random.bernoulli(key_drop, drop, (text.shape[0], 1, 1))
    text = jnp.where(dropped, model.uncond_text[...][: text.shape[1]], text)
    logits = teacher_forced(
        model, text, batch["lengths"], quantised.inputs[: scales - 1], SCHEDULE, remat=remat
    )
    return bit_losses(logits, quantised.labels[:scales])


def make_step(
    nets: dict[str, Network],
    optimizer: Any,
    mesh: Any,
    scales: int,
    batch: int,
    remat: bool = False,
) -> Any:
    """The step of one prefix length: `(state, pool, seed, rate) -> state, losses`.

    `batch` counts the pictures of all devices together.
    """

    def step(state: optim.TrainState, data: pool.Pool, seed: Array, rate: Array):
        key_batch, key_rest = jax.random.split(parallel.device_key(seed))
        drawn = pool.draw(data, key_batch, batch // mesh.size)

        def loss(params: Any) -> tuple[Array, Array]:
            losses, _ = losses_of_batch(nets, params, drawn, key_rest, scales, remat=remat)
            return jnp.sum(losses * scale_weights(scales)), losses

        grads, losses = parallel.mean(jax.grad(loss, has_aux=True)(state.params))
        return optim.apply(state, grads, rate, optimizer), losses

    whole, split = parallel.WHOLE, parallel.SPLIT
    return parallel.spread(step, mesh, (whole, split, whole, whole), (whole, whole))


class Programs:
    """The compiled steps; longer prefixes compile in threads while something else trains.

    A step whose temporary memory does not fit is compiled again with rematerialisation.
    """

    def __init__(
        self, nets: dict[str, Network], mesh: Any, batches: dict[int, int], pool_size: int
    ):
        self._nets, self._mesh, self._began = nets, mesh, time.time()
        self.optimizer = optim.make_optimizer()
        params = {name: nets[name].like for name in ("transformer", "text")}
        state = jax.eval_shape(
            lambda: optim.start(
                jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params), self.optimizer
            )
        )
        code_width = nets["transformer"].config.bits
        data = jax.eval_shape(lambda: pool.empty(pool_size, SCHEDULE.final, code_width))
        self._arguments = (
            parallel.abstract(state, mesh),
            parallel.abstract(data, mesh, parallel.SPLIT),
            np.uint32(0),
            np.float32(0),
        )
        self._executor = ThreadPoolExecutor(len(batches))
        self._futures: dict[int, Future] = {
            scales: self._executor.submit(self._compile, scales, batch)
            for scales, batch in sorted(batches.items())
        }
        for scales, future in self._futures.items():
            future.add_done_callback(
                lambda f, s=scales: (
                    f.exception()
                    and print(
                        f"{s} scales do not compile, shorter ones go on: {f.exception()}",
                        flush=True,
                    )
                )
            )

    def _compile(self, scales: int, batch: int, remat: bool = False) -> Any:
        step = make_step(self._nets, self.optimizer, self._mesh, scales, batch, remat)
        compiled = step.lower(*self._arguments).compile()
        memory = compiled.memory_analysis()
        used = memory.temp_size_in_bytes if memory else 0
        print(
            f"{scales} scales compiled after {time.time() - self._began:.0f} s, "
            f"temporary memory {used / 2**30:.1f} GiB",
            flush=True,
        )
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", np.inf)
        if used > MEMORY_SHARE * limit and not remat:
            return self._compile(scales, batch, remat=True)
        return compiled

    def wait(self) -> None:
        """Until the shortest prefix's step is ready."""
        self._futures[min(self._futures)].result()

    def pick(self, scales: int) -> tuple[int, Any]:
        """The step of this prefix length, or of the longest shorter one that is ready."""
        ready = [
            s
            for s, f in self._futures.items()
            if s <= scales and f.done() and f.exception() is None
        ]
        chosen = max(ready) if ready else min(self._futures)
        return chosen, self._futures[chosen].result()


def courses(fraction: float, count: int) -> int:
    """The prefix length of step `count` after a fraction of the time."""
    course = next((c for c in COURSES if fraction < c.until), COURSES[-1])
    return course.cycle[count % len(course.cycle)]


def fill(
    size: int,
    nets: dict[str, Network],
    mesh: Any,
    refill: Any,
    tokenizer: Any,
    sprites: Array,
    chunks: Any,
) -> pool.Pool:
    """A pool full of freshly encoded pictures."""
    data = pool.empty(size, SCHEDULE.final, nets["transformer"].config.bits)
    data = parallel.put(data, mesh, parallel.SPLIT)
    for start in range(0, size, REFILL):
        data = refill(data, tokenizer, sprites, next(chunks), np.int32(start // mesh.size))
    return jax.block_until_ready(data)


def train(
    nets: dict[str, Network],
    params: Any,
    tokenizer: Any,
    sprites: Array,
    collection: Collection,
    mesh: Any,
    programs: Programs,
    *,
    until: float,
    pool_size: int,
    save: Any,
    max_steps: int | None = None,
) -> Any:
    """Averaged parameters of both networks; `save(params)` is called now and then.

    `until` is the `time.time()` at which to stop; the courses share what is left of it once the
    pool is full.
    """
    state = parallel.put(optim.start(params, programs.optimizer), mesh)
    refill = pool.make_refill(nets["tokenizer"], mesh)
    feeder = Feeder(lambda seed: make_chunk(collection, collection.train, REFILL, seed), 256)
    chunks = iter(feeder)
    began = time.time()
    data = fill(pool_size, nets, mesh, refill, tokenizer, sprites, chunks)
    print(f"pool of {pool_size} pictures in {time.time() - began:.0f} s", flush=True)
    programs.wait()
    first, shown, saved = time.time(), time.time(), time.time()
    count, pending, recent = 0, [], {}
    while (fraction := (time.time() - first) / max(until - first, 1)) < 1 and count != max_steps:
        scales, step = programs.pick(courses(fraction, count))
        rate = np.float32(optim.learning_rate(PEAK_RATE, fraction, count, 50))
        state, losses = step(state, data, np.uint32(count), rate)
        start = np.int32(count * REFILL % pool_size // mesh.size)
        data = refill(data, tokenizer, sprites, next(chunks), start)
        count += 1
        pending.append((scales, losses))
        if len(pending) > 2:
            # Waiting for an older step bounds the queue; its losses move to the host.
            done, values = pending.pop(0)
            recent[done] = (np.asarray(values), recent.get(done, (None, 0))[1] + 1)
        if time.time() - shown > 10:
            shown = time.time()
            report(count, fraction, recent)
        if time.time() - saved > 60:
            saved = time.time()
            save(state.average)
    feeder.close()
    report(count, 1.0, recent)
    return state.average


def report(count: int, fraction: float, recent: dict[int, tuple[np.ndarray, int]]) -> None:
    """Print the latest loss of every scale for every prefix length."""
    for scales, (losses, steps) in sorted(recent.items()):
        values = " ".join(f"{v:.3f}" for v in losses)
        print(f"step {count} {fraction:.0%} | {scales} scales x{steps}: {values}", flush=True)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--pool", type=int, default=32768)
    parser.add_argument("--size", choices=SIZES, default="shipped")
    parser.add_argument("--things", type=int, help="only so many things (rehearsal)")
    parser.add_argument(
        "--batches",
        type=int,
        nargs=3,
        default=list(BATCHES.values()),
        help="pictures a step at 7, 10 and 13 scales",
    )
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--restart", action="store_true", help="start from the weights in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    args = parser.parse_args()
    until = time.time() + 60 * args.minutes
    config, mesh = SIZES[args.size], parallel.make_mesh()
    nets = networks(config)
    programs = Programs(nets, mesh, dict(zip(BATCHES, args.batches, strict=True)), args.pool)
    collection, sprites = load_sprites(args.things)
    tokenizer = store.load(args.out, "tokenizer", nets["tokenizer"].like)
    params = start_params(config, nets, args.out if args.restart else None)
    average = train(
        nets,
        params,
        parallel.put(tokenizer, mesh),
        parallel.put(sprites, mesh),
        collection,
        mesh,
        programs,
        until=until,
        pool_size=args.pool,
        max_steps=args.max_steps,
        save=lambda p: store.save(args.out, "transformer", p),
    )
    store.save(args.out, "transformer", average)


def start_params(config: DemoConfig, nets: dict[str, Network], weights: Path | None) -> Any:
    """Fresh parameters of the transformer and its text encoder, or those saved in a folder."""
    if weights is not None:
        like = {name: nets[name].like for name in ("transformer", "text")}
        return store.load(weights, "transformer", like)
    return {
        "transformer": initial(Infinity, config.transformer, 1),
        "text": initial(T5Encoder, config.text, 2),
    }


if __name__ == "__main__":
    main()
