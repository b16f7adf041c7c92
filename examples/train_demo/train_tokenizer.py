"""Stage 3: train the BSQ tokenizer on single pictures and scenes, bounded by the wall clock.

Run `python -m examples.train_demo.train_tokenizer --seconds 180 --out runs/demo`. Every step draws
new pictures on the accelerator. The loss is L1, squared error, differences of neighbouring pixels
and structural similarity at three resolutions; there is no adversarial and no perceptual term.
Half of each batch is decoded with some bits flipped, which teaches the decoder to live with the
small mistakes of a transformer. Quantisation is straight-through with a commitment term.
"""

import argparse
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from examples.train_demo import optim, parallel, store
from examples.train_demo.captions import empty_recipe, stack
from examples.train_demo.compose import compose
from examples.train_demo.feed import Feeder, make_chunk
from examples.train_demo.models import SCHEDULE, SIZES, Network, initial
from examples.train_demo.pictures import SIDE, Collection, load_sprites
from sparvar_jax.models.bsq_vae import BsqVae
from sparvar_jax.models.quantizer import quantise

PEAK_RATE = 1.5e-3
COMMITMENT = 0.25
FLIP_STRENGTH = 0.1


def _pool(x: Array, size: int) -> Array:
    window = (1, size, size, 1)
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1, 1, 1, 1), "VALID") / size**2


def dissimilarity(x: Float[Array, "B h w 3"], y: Float[Array, "B h w 3"]) -> Float[Array, ""]:
    """1 - SSIM with a uniform 7x7 window, of pictures in -1..1."""
    mx, my = _pool(x, 7), _pool(y, 7)
    vx, vy = _pool(x * x, 7) - mx * mx, _pool(y * y, 7) - my * my
    cov = _pool(x * y, 7) - mx * my
    c1, c2 = 0.02**2, 0.06**2
    ssim = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return 1 - jnp.mean(ssim)


def reconstruction_loss(x: Float[Array, "B h w 3"], y: Float[Array, "B h w 3"]) -> Array:
    """How far `y` is from the true pictures `x`."""
    error = y - x
    edges = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (1, 2))
    loss = jnp.mean(jnp.abs(error)) + 6 * jnp.mean(error**2) + 0.5 * edges
    for _ in range(3):
        loss = loss + 0.05 * dissimilarity(x, y)
        x, y = (
            jax.image.resize(z, (len(z), z.shape[1] // 2, z.shape[2] // 2, 3), "linear")
            for z in (x, y)
        )
    return loss


def tokenizer_loss(model: BsqVae, images: Float[Array, "B h w 3"], key: Array) -> tuple[Array, Any]:
    """Loss, and the mean squared errors without and with flipped bits."""
    latent = model.encode(images)
    half = len(images) // 2
    clean = quantise(latent[:half], SCHEDULE.sizes).code_sum
    flipped = quantise(latent[half:], SCHEDULE.sizes, flip=(key, FLIP_STRENGTH)).code_sum
    codes = jax.lax.stop_gradient(jnp.concatenate([clean, flipped]))
    commitment = jnp.mean((latent[:half] - codes[:half]) ** 2)
    decoded = model.decoder(latent + jax.lax.stop_gradient(codes - latent))
    loss = reconstruction_loss(images, decoded) + COMMITMENT * commitment
    error = jnp.mean((jnp.clip(decoded, -1, 1) - images) ** 2, axis=(1, 2, 3))
    return loss, {
        "clean": jnp.mean(error[:half]),
        "flipped": jnp.mean(error[half:]),
        "commitment": commitment,
    }


def psnr(error: float) -> float:
    """PSNR in dB of a mean squared error of pictures in -1..1."""
    return float(10 * np.log10(4 / max(error, 1e-12)))


def make_step(network: Network, packing: optim.Packing, optimizer: Any, mesh: Any) -> Any:
    """The training step `(state, sprites, recipes, seed, rate) -> state, metrics`."""

    def step(state: optim.TrainState, sprites: Array, recipes: Any, seed: Array, rate: Array):
        images, key = compose(sprites, recipes), parallel.device_key(seed)

        def loss(params: Any) -> tuple[Array, Any]:
            return tokenizer_loss(network.assemble(params), images, key)

        grads, metrics = jax.grad(loss, has_aux=True)(packing.unpack(state.params))
        grads, metrics = parallel.mean((packing.pack(grads), metrics))
        return optim.apply(state, grads, rate, optimizer), metrics

    inputs = (parallel.WHOLE, parallel.WHOLE, parallel.SPLIT, parallel.WHOLE, parallel.WHOLE)
    return parallel.spread(step, mesh, inputs, (parallel.WHOLE, parallel.WHOLE))


@dataclass(frozen=True)
class Program:
    """The compiled step and what its state is made with."""

    step: Any
    packing: optim.Packing
    optimizer: Any


def compile_step(network: Network, mesh: Any, batch: int, pictures: int) -> Program:
    """The training step compiled ahead, for `pictures` sprites; needs no data yet."""
    optimizer = optim.make_optimizer(muon=False)
    packing = optim.Packing(network.like, muon=False)
    sprites = jax.ShapeDtypeStruct((pictures, SIDE, SIDE, 4), jnp.uint8)
    recipes = stack([empty_recipe(np.random.default_rng(0))] * batch)
    arguments = (
        parallel.abstract(optim.abstract_state(network.like, packing, optimizer), mesh),
        parallel.abstract(sprites, mesh),
        parallel.abstract(recipes, mesh, parallel.SPLIT),
        np.uint32(0),
        np.float32(0),
    )
    compiled = make_step(network, packing, optimizer, mesh).lower(*arguments).compile()
    return Program(compiled, packing, optimizer)


def train(
    program: Program,
    params: Any,
    sprites: Array,
    collection: Collection,
    mesh: Any,
    *,
    seconds: float,
    batch: int,
    peak: float = PEAK_RATE,
    max_steps: int | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Averaged parameters after at most `seconds` of a compiled step, and a record of the run."""
    state = parallel.put(optim.start(program.packing.pack(params), program.optimizer), mesh)
    feeder = Feeder(lambda seed: make_chunk(collection, collection.train, batch, seed, 0.6))
    began, shown, count, values = time.time(), time.time(), 0, {}
    waiting: deque[Any] = deque()
    for chunk in feeder:
        fraction = (time.time() - began) / seconds
        if fraction >= 1 or count == max_steps:
            break
        rate = np.float32(optim.learning_rate(peak, fraction, count))
        state, metrics = program.step(state, sprites, chunk["recipes"], np.uint32(count), rate)
        count += 1
        waiting.append(metrics)
        if len(waiting) > 2:
            values = {k: float(v) for k, v in waiting.popleft().items()}
            if time.time() - shown > 10:
                shown = time.time()
                print(
                    f"tokenizer step {count} {fraction:.0%} PSNR {psnr(values['clean']):.2f} "
                    f"flipped {psnr(values['flipped']):.2f} "
                    f"commitment {values['commitment']:.4f}",
                    flush=True,
                )
    feeder.close()
    record = {"steps": count, "batch": batch, "seconds": round(time.time() - began)}
    print(f"tokenizer: {record}", flush=True)
    return program.packing.averaged(state), record


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=PEAK_RATE)
    parser.add_argument("--size", choices=SIZES, default="shipped")
    parser.add_argument("--things", type=int, help="only so many things (rehearsal)")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--restart", action="store_true", help="start from the weights in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    args = parser.parse_args()
    mesh = parallel.make_mesh()
    collection, sprites = load_sprites(args.things)
    config = SIZES[args.size].tokenizer
    network = Network.of(BsqVae, config)
    params = (
        store.load(args.out, "tokenizer", network.like)
        if args.restart
        else initial(BsqVae, config, 0)
    )
    program = compile_step(network, mesh, args.batch, len(collection.pictures))
    average, _ = train(
        program,
        params,
        parallel.put(sprites, mesh),
        collection,
        mesh,
        seconds=args.seconds,
        batch=args.batch,
        peak=args.rate,
        max_steps=args.max_steps,
    )
    store.save(args.out, "tokenizer", average)


if __name__ == "__main__":
    main()
