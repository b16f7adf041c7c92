"""Stage 5: write the trained weights as a model directory, int8 per channel.

Run `python -m examples.train_demo.export --weights runs/demo --out runs/model`; the shipped copy
is `sparvar_jax/demo`. Matrices and kernels become int8 with one scale an output channel, the rest
stays float32; whoever loads the directory gets back what every figure is measured on.
"""

import argparse
import hashlib
import shutil
from pathlib import Path
from typing import Any

from examples.train_demo import store, vocabulary
from examples.train_demo.models import SIZES, DemoConfig, networks
from sparvar_jax.weights import checkpoint

KINDS = {"transformer": "infinity", "tokenizer": "bsq_vae", "text": "t5"}
DEFAULTS = {
    "plan": "almost-lossless",
    "guidance": 3.0,
    "temperature": 0.5,
    "top_p": 0.97,
    "size": "1M",
    "aspect_ratio": 1.0,
}


def write_model(
    out: Path,
    config: DemoConfig,
    params: dict[str, Any],
    source: str,
    defaults: dict[str, Any] | None = None,
) -> None:
    """Write the three parts, and the sentencepiece file beside the text encoder."""
    for part, kind in KINDS.items():
        values = {"kind": kind, **checkpoint.config_to_json(getattr(config, part))}
        checkpoint.write_part(
            out,
            part,
            params[part],
            config=values,
            source={"made_by": source},
            defaults=DEFAULTS | (defaults or {}),
            form="int8",
        )
    shutil.copyfile(vocabulary.MODEL, out / "text" / "spiece.model")


def main() -> None:
    """Read the training weights, write the model directory, print its size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/model"))
    parser.add_argument("--size", choices=SIZES, default="shipped")
    parser.add_argument("--guidance", type=float, default=DEFAULTS["guidance"])
    parser.add_argument("--temperature", type=float, default=DEFAULTS["temperature"])
    args = parser.parse_args()
    config = SIZES[args.size]
    nets = networks(config)
    both = {name: nets[name].like for name in ("transformer", "text")}
    params = store.load(args.weights, "transformer", both)
    params["tokenizer"] = store.load(args.weights, "tokenizer", nets["tokenizer"].like)
    digest = hashlib.sha256()
    for file in sorted(args.weights.glob("*.safetensors")):
        digest.update(file.read_bytes())
    write_model(
        args.out,
        config,
        params,
        f"examples/train_demo, weights sha256 {digest.hexdigest()}",
        {"guidance": args.guidance, "temperature": args.temperature},
    )
    record = args.weights / "training.json"
    if record.exists():
        shutil.copyfile(record, args.out / record.name)
    for file in args.out.rglob("*.safetensors"):
        file.chmod(0o644)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
