"""Stages 3 and 4 in one process, so that the transformer compiles while the tokenizer trains.

Run `python -m examples.train_demo.train_all --tokenizer-minutes 2.3 --minutes 9 --out runs/demo`
after stages 1 and 2. `--minutes` bounds everything, compilation included.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from examples.train_demo import parallel, store, train_tokenizer, train_transformer
from examples.train_demo.models import SIZES, initial, networks
from examples.train_demo.pictures import load, render
from examples.train_demo.train_transformer import BATCHES, Programs, start_params
from sparvar_jax.models.bsq_vae import BsqVae


def main() -> None:
    """Train both stages and save after each."""
    began = time.time()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--tokenizer-minutes", type=float, default=2.5)
    parser.add_argument("--tokenizer-batch", type=int, default=64)
    parser.add_argument("--tokenizer-rate", type=float, default=train_tokenizer.PEAK_RATE)
    parser.add_argument(
        "--restart-tokenizer", action="store_true", help="start from the tokenizer in --out"
    )
    parser.add_argument("--batches", type=int, nargs=3, default=list(BATCHES.values()))
    parser.add_argument("--pool", type=int, default=32768)
    parser.add_argument("--size", choices=SIZES, default="shipped")
    parser.add_argument("--things", type=int, help="only so many things (rehearsal)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    args = parser.parse_args()
    config, mesh = SIZES[args.size], parallel.make_mesh()
    nets = networks(config)
    collection, drawings = load(limit=args.things)
    with ThreadPoolExecutor(1) as executor:
        compiling = executor.submit(
            train_tokenizer.compile_step,
            nets["tokenizer"],
            mesh,
            args.tokenizer_batch,
            len(drawings),
        )
        sprites = parallel.put(render(drawings), mesh)
        print(f"rendered after {time.time() - began:.0f} s", flush=True)
        step = compiling.result()
    print(
        f"{len(collection.pictures)} pictures after {time.time() - began:.0f} s on {mesh.size} "
        "devices",
        flush=True,
    )
    programs: list[Programs] = []

    def compile_transformer() -> None:
        batches = dict(zip(BATCHES, args.batches, strict=True))
        programs.append(Programs(nets, mesh, batches, args.pool))

    first = (
        store.load(args.out, "tokenizer", nets["tokenizer"].like)
        if args.restart_tokenizer
        else initial(BsqVae, config.tokenizer, 0)
    )
    tokenizer = train_tokenizer.train(
        step,
        first,
        sprites,
        collection,
        mesh,
        minutes=args.tokenizer_minutes,
        batch=args.tokenizer_batch,
        peak=args.tokenizer_rate,
        started=compile_transformer,
    )
    store.save(args.out, "tokenizer", tokenizer)
    average = train_transformer.train(
        nets,
        start_params(config, nets, None),
        tokenizer,
        sprites,
        collection,
        mesh,
        programs[0],
        until=began + 60 * args.minutes,
        pool_size=args.pool,
        save=lambda params: store.save(args.out, "transformer", params),
    )
    store.save(args.out, "transformer", average)


if __name__ == "__main__":
    main()
