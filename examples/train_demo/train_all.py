"""Stages 3 and 4 in one process, so that everything compiles while data is drawn.

Run `python -m examples.train_demo.train_all --seconds 560 --out runs/demo` after stages 1 and 2.
`--seconds` bounds everything, compilation included; weights are saved at least every 45 seconds, so
that a run which is cut off loses little. The tokenizer starts from `start/tokenizer.safetensors`,
which has learnt for 102 seconds already.
"""

import argparse
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from examples.train_demo import optim, parallel, resume, store, train_tokenizer, train_transformer
from examples.train_demo.course import Budget, Record, Used
from examples.train_demo.feed import chosen, maker
from examples.train_demo.models import SIZES, DemoConfig, Network, initial, networks
from examples.train_demo.pictures import load, render
from examples.train_demo.programs import BATCHES, Programs
from examples.train_demo.train_transformer import (
    Setting,
    make_programs,
    start_params,
)
from sparvar_jax.models.bsq_vae import BsqVae

START = Path(__file__).with_name("start")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=560, help="of everything")
    parser.add_argument(
        "--tokenizer-seconds", type=float, default=95, help="0 leaves the tokenizer as it is"
    )
    parser.add_argument("--tokenizer-batch", type=int, default=64)
    parser.add_argument("--tokenizer-rate", type=float, default=8e-4)
    parser.add_argument(
        "--tokenizer-from",
        type=Path,
        default=START,
        help="folder of the first tokenizer weights; one without them starts from nothing",
    )
    parser.add_argument(
        "--state",
        type=Path,
        help="folder of the whole state of a course that several calls share: go on from it",
    )
    parser.add_argument("--course-seconds", type=float, help="how long they train all together")
    parser.add_argument("--course-steps", type=int, help="or how many steps")
    parser.add_argument(
        "--used", type=float, default=0.0, help="seconds of it that are over (weights alone came)"
    )
    train_transformer.add_arguments(parser)
    return parser.parse_args()


def first_tokenizer(folder: Path, config: DemoConfig, network: Network) -> Any:
    """The weights of a folder, or fresh ones where it holds none of this size."""
    try:
        return store.load(folder, "tokenizer", network.like)
    except ValueError as error:
        print(f"starting the tokenizer from nothing: {error}", flush=True)
        return initial(BsqVae, config.tokenizer, 0)


def train_and_save_tokenizer(
    args: argparse.Namespace, step: Future | None, params: Any, *data: Any
) -> tuple[Any, dict[str, Any]]:
    """Averaged weights, saved if they were trained and are finite, and what the card says."""
    found: dict[str, Any] = {}
    if step is not None:
        params, found = train_tokenizer.train(
            step.result(),
            params,
            *data,
            seconds=args.tokenizer_seconds,
            batch=args.tokenizer_batch,
            peak=args.tokenizer_rate,
            max_steps=args.max_steps,
        )
    store.save(args.out, "tokenizer", params)
    return params, found


def main() -> None:
    """Train both stages and save after each."""
    began, args = time.time(), arguments()
    config, mesh = SIZES[args.size], parallel.make_mesh()
    nets = networks(config)
    collection, drawings = load(limit=args.things)
    with ThreadPoolExecutor(1) as executor:
        compiling = (
            executor.submit(
                train_tokenizer.compile_step,
                nets["tokenizer"],
                mesh,
                args.tokenizer_batch,
                len(drawings),
            )
            if args.tokenizer_seconds > 0
            else None
        )
        programs = make_programs(args, nets, mesh)
        pixels = render(drawings)
        sprites = parallel.put(pixels, mesh)
        print(f"{len(drawings)} pictures after {time.time() - began:.0f} s", flush=True)
        folder = args.restart or args.tokenizer_from
        tokenizer, trained = train_and_save_tokenizer(
            args, compiling, first_tokenizer(folder, config, nets["tokenizer"]),
            sprites, collection, mesh,
        )  # fmt: skip

    state, used, earlier = first_state(args, config, nets, programs)
    things = len(chosen(args, collection))

    def save(params: Any, record: Record) -> None:
        if store.save(args.out, "transformer", params):
            write_record(args, args.out, things, earlier, trained, record)

    def keep(state: optim.TrainState, used: Used, record: Record) -> None:
        write_record(args, args.state, things, earlier, trained, record)
        resume.save(args.state, state, used)

    train_transformer.train(
        nets,
        state,
        parallel.put(tokenizer, mesh),
        sprites,
        maker(args, collection, pixels),
        mesh,
        programs,
        setting=Setting.of(args),
        budget=Budget(
            began + args.seconds,
            tuple(args.span),
            args.max_steps,
            args.course_seconds,
            args.course_steps,
            used,
        ),
        save=save,
        keep=keep if args.state else None,
    )
    print(f"ended after {time.time() - began:.0f} s", flush=True)


def first_state(
    args: argparse.Namespace, config: DemoConfig, nets: dict[str, Network], programs: Programs
) -> tuple[optim.TrainState, Used, list[dict[str, Any]]]:
    """What training goes on from, what of the course is over, and the runs before this one."""
    resumed = None if args.state is None else resume.load(args.state, programs.state)
    if resumed is not None:
        state, used = resumed
        print(f"going on after {used.seconds:.0f} s and {used.steps} steps", flush=True)
        return state, used, earlier_runs(args.state)
    params = start_params(config, nets, args.restart, args.fresh_text)
    state = optim.start(programs.packing.pack(params), programs.optimizer)
    return state, Used(args.used), earlier_runs(args.restart)


def earlier_runs(folder: Path | None) -> list[dict[str, Any]]:
    """What `training.json` of a folder says of the weights that this run goes on from."""
    file = None if folder is None else folder / "training.json"
    return json.loads(file.read_text()) if file is not None and file.exists() else []


def write_record(
    args: argparse.Namespace,
    folder: Path,
    pictures: int,
    earlier: list[dict[str, Any]],
    tokenizer: dict[str, Any],
    record: Record,
) -> None:
    """`training.json` in a folder: one entry a run, the runs it went on from before it."""
    entry = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "span": list(args.span),
        "pictures": pictures,
        "tokenizer": tokenizer,
        "transformer_seconds": round(record.seconds),
        "scenes": args.scenes,
        "variety": args.variety,
        "plain_style": args.plain_style,
        "other_names": args.other_names,
        "rate": [args.rate, args.constant, args.final_rate],
        "last_weight": args.last_weight,
        "text_dropped": args.text_dropped,
        "text_until": args.text_until,
        "memory": args.memory,
        "batches": dict(zip(map(str, BATCHES), args.batches, strict=True)),
        "steps": {str(k): v for k, v in sorted(record.steps.items())},
        "training_losses": {str(k): v for k, v in sorted(record.losses.items())},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps([*earlier, entry], indent=1) + "\n")


if __name__ == "__main__":
    main()
