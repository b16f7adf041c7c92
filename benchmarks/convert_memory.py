"""Peak memory and time of converting a checkpoint the size of Infinity-2B, with random weights.

    python -m benchmarks.convert_memory FOLDER [--preset infinity_2b] [--forms sharded flat]

writes the checkpoint under FOLDER (4.4 GB in bfloat16; as shards of at most 1 GB or one .pth),
converts it in a process of its own, and writes the peak of its resident memory (mapped pages of the
source included) beside the bound of twice the largest file plus 2 GiB into a results file.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sparvar_convert.torch_twin.infinity import Infinity

from benchmarks import _record as record
from sparvar_jax.models.infinity import InfinityConfig

SHARD_BYTES = 10**9
GIB = 2**30


def shapes(preset: str) -> Iterator[tuple[str, torch.Size, bool]]:
    """Released keys, shapes and whether the tensor is trained, without allocating any."""
    with torch.device("meta"):
        model = Infinity(InfinityConfig.preset(preset))
    trained = {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        yield name, tensor.shape, name in trained


def random_tensor(shape: torch.Size, trained: bool) -> torch.Tensor:
    if not trained:
        return torch.zeros(shape, dtype=torch.bfloat16)
    return torch.randn(shape, dtype=torch.bfloat16) * 0.02


def write_shards(folder: Path, preset: str) -> int:
    """A folder with an index, as the transformers library shards it; bytes of the largest file."""
    shards: list[list[tuple[str, torch.Size, bool]]] = [[]]
    size = 0
    for entry in shapes(preset):
        if size + 2 * entry[1].numel() > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += 2 * entry[1].numel()
    where = {}
    for number, entries in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({key: random_tensor(shape, t) for key, shape, t in entries}, folder / name)
        where |= {key: name for key, _, _ in entries}
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


def write_flat(folder: Path, preset: str) -> int:
    """One `.pth`; its bytes."""
    file = folder / "model.pth"
    torch.save({key: random_tensor(shape, t) for key, shape, t in shapes(preset)}, file)
    return file.stat().st_size


def convert(source: str, into: str) -> None:
    """Convert in this process and print seconds, peak bytes and parameters as JSON."""
    from sparvar_convert.run import convert_source

    start = time.perf_counter()
    done = convert_source(source, into)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": peak, "parameters": done.parameters}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="infinity_2b")
    parser.add_argument("--forms", nargs="+", choices=("sharded", "flat"), default=["sharded"])
    options = parser.parse_args()
    rows = [measure(options.folder, options.preset, form) for form in options.forms]
    record.write("convert", rows)


def measure(folder: Path, preset: str, form: str) -> dict[str, Any]:
    """One row: the checkpoint written, converted, measured and removed."""
    source, target = folder / form, folder / f"model_{form}"
    source.mkdir(parents=True)
    largest = (write_shards if form == "sharded" else write_flat)(source, preset)
    code = "import sys; from benchmarks.convert_memory import convert; convert(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(source), str(target)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(output.stdout.splitlines()[-1])
    shutil.rmtree(source)
    shutil.rmtree(target)
    row = {
        "preset": preset,
        "form": form,
        "parameters_b": result["parameters"] / 1e9,
        "largest_file_gib": largest / GIB,
        "peak_gib": result["peak"] / GIB,
        "bound_gib": 2 * largest / GIB + 2,
        "seconds": result["seconds"],
    }
    print(json.dumps(row))
    return row


if __name__ == "__main__":
    main()
