"""Every portable kernel built for GPUs that are not here: lowered, compiled by XLA, assembled.

    python -m benchmarks.assemble                  # needs pip install -e '.[assemble]', no GPU
    python -m benchmarks.assemble --families 8.0 9.0 --cases 'dense/*'

XLA compiles for a described device, with the Triton and the `ptxas` that a GPU's user has, and
tells what the assembler said. Writes benchmarks/results/assembled.json and .md: registers a thread,
shared memory a block, spilled bytes. Exits 1 where a kernel spills, does not fit a block's shared
memory, or is not built. That a kernel is assembled does not say that it was run.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _record as record
from benchmarks._options import parser_of
from benchmarks.gpus import GPUS, Gpu

ASSEMBLER = "nvidia-cuda-nvcc"
# What a child process says among what the assembler says.
_MARK, _NAMED, _FAILED = "assembling: ", "kernels: ", "failed: "
_KERNEL = re.compile(r'\bname = "(\w+)", num_stages')
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>[^']+)' for '(?P<target>[^']+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
_LAUNCH = re.compile(r"kCustomKernel \[[^]]*\] (\S+) grid: .*?shared_memory: (\d+) bytes")


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel of one call; shared memory and spills in bytes."""

    family: str
    case: str
    kernel: str
    target: str
    registers: int
    shared: int
    spills: int


def build(gpu: Gpu, patterns: list[str]) -> None:
    """In a process of its own: compile every case, say its name before, and tell of failures."""
    import jax

    from benchmarks.assemble_cases import cases
    from benchmarks.described import Described

    device = Described(gpu)
    for name, (function, shapes) in cases().items():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            continue
        print(f"{_MARK}{name}", file=sys.stderr, flush=True)
        placed = device.put(list(shapes))
        function.__name__ = _program(name)
        try:
            with jax.sharding.use_abstract_mesh(device.mesh.abstract_mesh):
                traced = jax.jit(function).trace(*placed)
                lowered = traced.lower(lowering_platforms=("cuda",))
            names = sorted(set(_KERNEL.findall(lowered.as_text())))
            print(f"{_NAMED}{' '.join(names)}", file=sys.stderr, flush=True)
            lowered.compile()
        except Exception as error:  # whatever a compiler raises: the table says it
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"{_FAILED}{reason}", file=sys.stderr, flush=True)


def assemble(gpu: Gpu, patterns: list[str]) -> tuple[list[Row], list[str]]:
    """The rows of one family, and what is wrong with them."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TF_CPP_MIN_LOG_LEVEL": "0",
            "TF_CPP_VMODULE": "subprocess_compilation=2",
            "XLA_FLAGS": f"--xla_dump_to={folder} --xla_gpu_enable_libnvptxcompiler=false "
            "--xla_gpu_enable_libnvjitlink=false",
        }
        command = [sys.executable, "-m", "benchmarks.assemble", "--build", gpu.family]
        done = subprocess.run(
            [*command, "--cases", *patterns], env=environment, capture_output=True, text=True
        )
        launches = _launches(Path(folder))
    if done.returncode:
        return [], [f"{gpu.family}: {done.stderr.strip().splitlines()[-1]}"]
    rows, problems = [], []
    for part in done.stderr.split(_MARK)[1:]:
        case, _, said = part.partition("\n")
        found = _rows(gpu, case, said, launches)
        rows += found
        problems += [f"{gpu.family} {case}: {reason}" for reason in _wrong(gpu, found, said)]
    return rows, problems


def _launches(folder: Path) -> dict[str, dict[str, int]]:
    """Program -> kernel -> bytes of shared memory, from XLA's list of launches."""
    found: dict[str, dict[str, int]] = {}
    for file in folder.glob("*thunk_sequence.txt"):
        program = file.name.split(".")[1].removeprefix("jit_")
        kernels = found.setdefault(program, {})
        kernels |= {name: int(size) for name, size in _LAUNCH.findall(file.read_text())}
    return found


def _rows(gpu: Gpu, case: str, said: str, launches: dict[str, dict[str, int]]) -> list[Row]:
    """Our kernels in what the assembler said; XLA's own beside them are left out."""
    shared = launches.get(_program(case), {})
    ours = _after(_NAMED, said).split()
    found = {}
    for entry in _ENTRY.finditer(said):
        name = entry["name"]
        if name in ours:
            spills = int(entry["stores"]) + int(entry["loads"])
            found[name] = Row(
                gpu.family, case, name, entry["target"], int(entry["registers"]),
                shared.get(name, 0), spills,
            )  # fmt: skip
    return [found[name] for name in ours if name in found]


def _wrong(gpu: Gpu, rows: list[Row], said: str) -> list[str]:
    """Why a case does not pass."""
    reasons = [reason] if (reason := _after(_FAILED, said)) else []
    missing = set(_after(_NAMED, said).split()) - {row.kernel for row in rows}
    if not reasons and (missing or not rows):
        reasons.append(f"not assembled: {', '.join(sorted(missing)) or 'no kernel'}")
    for row in rows:
        if row.spills:
            reasons.append(f"{row.kernel} spills {row.spills} bytes")
        if row.shared > gpu.shared_kib * 1024:
            reasons.append(f"{row.kernel} needs {row.shared} bytes of shared memory")
    return reasons


def _after(mark: str, said: str) -> str:
    return next((line[len(mark) :] for line in said.splitlines() if line.startswith(mark)), "")


def _program(case: str) -> str:
    """A case's name as that of a compiled program."""
    return re.sub(r"\W", "_", case)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: a line a case and kernel, a column a family."""
    families = [family for family in GPUS if any(row["family"] == family for row in rows)]
    head = [f"sm_{family.replace('.', '')}" for family in families]
    lines = [
        "# Portable kernels, assembled for GPUs that are not here",
        "",
        "Made by `python -m benchmarks.assemble`. Registers a thread / KiB of shared memory a",
        "block; spilled bytes are named where there are any.",
        "",
        f"| case | kernel | {' | '.join(head)} |",
        f"| --- | --- |{' --- |' * len(head)}",
    ]
    cells = {(row["case"], row["kernel"], row["family"]): _cell(row) for row in rows}
    for case, kernel in dict.fromkeys((row["case"], row["kernel"]) for row in rows):
        each = [cells.get((case, kernel, family), "not built") for family in families]
        lines.append(f"| {case} | {kernel} | {' | '.join(each)} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    spilled = f", spills {row['spills']}" if row["spills"] else ""
    return f"{row['registers']} / {row['shared'] / 1024:.0f}{spilled}"


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """The results and their table. No device is asked for: there is none."""
    versions = record.versions() | {ASSEMBLER: importlib.metadata.version(ASSEMBLER)}
    header = {"device": "none", "versions": versions, "commit": record.commit()}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "assembled.json"
    file.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(rows))


def main() -> int:
    """Assemble for every family, show what is wrong, and write the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--families", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--cases", nargs="+", default=["*"], help="shell patterns of case names")
    parser.add_argument("--folder", help="where to write instead of benchmarks/results")
    parser.add_argument("--build", choices=GPUS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.build:
        build(GPUS[asked.build], asked.cases)
        return 0
    if importlib.util.find_spec("jax_plugins") is None:
        parser.error("this needs jax's CUDA plugin and ptxas: pip install -e '.[assemble]'")
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for family in asked.families:
        found, wrong = assemble(GPUS[family], asked.cases)
        rows += [dataclasses.asdict(row) for row in found]
        problems += wrong
        print(f"{family}: {len(found)} kernels, {len(wrong)} problems", flush=True)
    write(rows, Path(asked.folder) if asked.folder else record.RESULTS)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
