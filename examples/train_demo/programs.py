"""The compiled training steps of the transformer, one for every prefix length.

All of them compile in threads from shapes alone, so that nothing waits for data or weights; the
batch sizes are chosen so that a step fits in memory as it is: about 30 to 40 GiB of temporary
memory each on an H100.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from examples.train_demo import optim, parallel, pool
from examples.train_demo.forward import teacher_forced
from examples.train_demo.models import SCHEDULE, Network
from sparvar_jax.models.quantizer import quantise
from sparvar_jax.models.t5 import encode

FLIP_STRENGTH = 0.2
LAST_SCALES = 3
TEXT = "text"
BATCHES = {5: 640, 7: 128, 10: 40, 13: 8}
# Measuring every matrix product in three programs at once takes a minute and gains next to
# nothing over the library's own choice.
COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0}


@dataclass(frozen=True)
class Objective:
    """What a step minimises, and what it keeps.

    last_weight: how many times their usual weight the losses of the last three of the 13 scales
    have. text_dropped: share of pictures that are learnt without their caption. memory: steps that
    the average of the weights looks back, see `optim.apply`.
    """

    last_weight: float = 1.0
    text_dropped: float = 0.1
    memory: int | None = None


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


def scale_weights(scales: int, last_weight: float = 1.0) -> np.ndarray:
    """Weights of the scales' mean losses, summing to one: between one a scale and one a token.

    The first scales, a few tokens each, decide what is drawn; the last three of the 13 decide how
    sharp it is, and their weights are multiplied by `last_weight`.
    """
    weights = np.array([s.tokens for s in SCHEDULE.scales[:scales]], np.float64) ** 0.35
    weights[len(SCHEDULE) - LAST_SCALES :] *= last_weight
    return (weights / np.sum(weights)).astype(np.float32)


def losses_of_batch(
    nets: dict[str, Network],
    params: Any,
    batch: pool.Pool,
    key: Array,
    scales: int,
    remat: bool,
    text_dropped: float = Objective.text_dropped,
) -> Float[Array, "scales"]:
    """Per-scale bit losses of a batch of the pool, with flipped input bits and dropped text."""
    key_flip, key_drop = jax.random.split(key)
    quantised = quantise(batch["latents"], SCHEDULE.sizes, flip=(key_flip, FLIP_STRENGTH))
    model = nets["transformer"].assemble(params["transformer"])
    text = encode(nets["text"].assemble(params["text"]), batch["ids"], batch["lengths"])
    dropped = jax.random.bernoulli(key_drop, text_dropped, (text.shape[0], 1, 1))
    text = jnp.where(dropped, model.uncond_text[...][: text.shape[1]], text)
    logits = teacher_forced(
        model, text, batch["lengths"], quantised.inputs[: scales - 1], SCHEDULE, remat=remat
    )
    return bit_losses(logits, quantised.labels[:scales])[0]


def make_step(
    nets: dict[str, Network],
    packing: optim.Packing,
    optimizer: Any,
    mesh: Any,
    scales: int,
    batch: int,
    remat: bool,
    objective: Objective,
) -> Any:
    """The step of one prefix length: `(state, pool, seed, rates) -> state, losses`.

    `batch` counts the pictures of all devices together. rates: of the transformer and of the text
    encoder.
    """
    weights = scale_weights(scales, objective.last_weight)

    def step(state: optim.TrainState, data: pool.Pool, seed: Array, rates: Array):
        key_batch, key_rest = jax.random.split(parallel.device_key(seed))
        drawn = pool.draw(data, key_batch, batch // mesh.size)

        def loss(params: Any) -> tuple[Array, Array]:
            dropped = objective.text_dropped
            losses = losses_of_batch(nets, params, drawn, key_rest, scales, remat, dropped)
            return jnp.sum(losses * weights), losses

        grads, losses = jax.grad(loss, has_aux=True)(packing.unpack(state.params))
        grads, losses = parallel.mean((packing.pack(grads), losses))
        apart, memory = (TEXT, rates[1]), objective.memory
        after = optim.apply(state, grads, rates[0], optimizer, apart=apart, memory=memory)
        return after, losses

    whole, split = parallel.WHOLE, parallel.SPLIT
    return parallel.spread(step, mesh, (whole, split, whole, whole), (whole, whole))


class Programs:
    """The compiled steps; those that are not ready or do not compile are done without."""

    def __init__(
        self,
        nets: dict[str, Network],
        mesh: Any,
        batches: dict[int, int],
        pool_size: int,
        remat: bool = False,
        objective: Objective = Objective(),
    ):
        self.optimizer = optim.make_optimizer()
        self._began = time.time()
        params = {name: nets[name].like for name in ("transformer", TEXT)}
        self.packing = optim.Packing(params, muon=True, apart=TEXT)
        self.state = state = optim.abstract_state(params, self.packing, self.optimizer)
        code_width = nets["transformer"].config.bits
        data = jax.eval_shape(lambda: pool.empty(pool_size, SCHEDULE.final, code_width))
        self._arguments = (
            parallel.abstract(state, mesh),
            parallel.abstract(data, mesh, parallel.SPLIT),
            np.uint32(0),
            np.zeros(2, np.float32),
        )
        executor = ThreadPoolExecutor(len(batches))
        self._futures: dict[int, Future] = {}
        for scales, batch in sorted(batches.items()):
            step = make_step(
                nets, self.packing, self.optimizer, mesh, scales, batch, remat, objective
            )
            self._futures[scales] = executor.submit(self._compile, step, scales)
            self._futures[scales].add_done_callback(lambda f, s=scales: _complain(f, s))
        executor.shutdown(wait=False)

    def _compile(self, step: Any, scales: int) -> Any:
        lowered = step.lower(*self._arguments)
        try:
            compiled = lowered.compile(COMPILER_OPTIONS)
        except jax.errors.JaxRuntimeError as error:
            print(f"{scales} scales: compiling with all defaults after {error}", flush=True)
            compiled = lowered.compile()
        memory = compiled.memory_analysis()
        used = memory.temp_size_in_bytes / 2**30 if memory else 0
        print(
            f"{scales} scales compiled after {time.time() - self._began:.0f} s, "
            f"temporary memory {used:.1f} GiB",
            flush=True,
        )
        return compiled

    def wait(self) -> None:
        """Until the shortest prefix's step is ready; raises what its compiler raised."""
        self._futures[min(self._futures)].result()

    def pick(self, scales: int) -> tuple[int, Any]:
        """The step of this prefix length, or of the longest shorter one that is ready."""
        ready = [s for s, f in self._futures.items() if s <= scales and _usable(f)]
        chosen = max(ready, default=min(self._futures))
        return chosen, self._futures[chosen].result()


def _usable(future: Future) -> bool:
    return future.done() and future.exception() is None


def _complain(future: Future, scales: int) -> None:
    if future.exception() is not None:
        print(f"{scales} scales do not compile: {future.exception()}", flush=True)
