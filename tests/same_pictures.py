"""Pictures of fixed seeds, drawn before the package was rearranged, and what they were.

`python -m tests.same_pictures` prints the digests of this environment, with the flags that tests
have; `--quick` compiles without LLVM's optimisation, as they do unless asked. An entry is worth
something only if the code that drew is known to draw what it should: the code of these drew, with
the demo model before, the pictures of commit a25a3c8, before any module moved; on Intel's processor
up to rounding, and with the tokens of the others for classes. Code that passes where there is an
entry may add one for another environment with `--write`, which also stores the pictures where there
are none. A demo model trained anew needs both afresh.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import platform
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxlib
import numpy as np
from flax import nnx

from sparvar_jax.models.var import Var, VarConfig
from sparvar_jax.models.vqvae import Vqvae, VqvaeConfig
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.weights import checkpoint
from tests.compiling import set_flags

DIGESTS = Path(__file__).parent / "fixtures" / "same_pictures.json"
PICTURES = DIGESTS.with_suffix(".npz")
PROMPTS = ("a rocket above a red apple on a dark green background", "a smiling cat")
LABELS = (1, 3)
SEED = 20
PLANS = {
    "text": {
        "dense": "dense",
        "paper": "sparvar-paper",
        "fast": "sparvar-fast",
        "composed": "adaptive(0.6,block=64,sinks=2)+drop_uncond(1)",
    },
    "class": {
        "dense": "dense",
        # The presets' own windows and budgets leave nothing out of so few tokens.
        "paper": "sparvar(0,sinks=2,windows=(1,2,3),block=64,"
        "columns_options=(('group',64),('multiple',16)))",
        "fast": "sparvar(0,sinks=2,windows=(1,2,3),form='boxes',"
        "columns_options=(('granularity',8),('multiple',8)))",
        "composed": "cs4a(keep=0.3,group=16,multiple=8,granularity=8,mapping='relative',"
        "sinks=2)+skip_last_scales(1)",
    },
}
TRANSFORMER = VarConfig(
    3, 128, 2, sides=(1, 3, 6, 10, 16), classes=5, vocab=48, code_width=8, dtype="float32"
)
TOKENIZER = VqvaeConfig(48, 8, base_width=32, multipliers=(1, 2), blocks=1)

Drawing = tuple[np.ndarray, tuple[np.ndarray, ...]]
"""Pictures uint8 [B, height, width, 3], and the tokens of every scale."""


@functools.cache
def pipe(family: str) -> Pipeline:
    """The demo model, or a class-conditional one whose weights no library's draws decide."""
    if family == "text":
        return Pipeline.from_checkpoint(None, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        for part, kind, module, config, gain in (
            ("transformer", "var", Var, TRANSFORMER, 2),  # attention that differs from a mean
            ("tokenizer", "vqvae", Vqvae, TOKENIZER, 0.5),  # pictures in the middle of the range
        ):
            checkpoint.write_part(
                folder,
                part,
                _parameters(module, config, gain),
                config={"kind": kind, **checkpoint.config_to_json(config)},
                source={"made": "from the names of parameters"},
                form="safetensors",
            )
        return Pipeline.from_checkpoint(folder, dtype="float32")


def _parameters(module: type, config, gain: float) -> dict[str, np.ndarray]:
    """Dotted path -> values of deviation gain / sqrt(inputs), the same everywhere.

    RandomState's bits are frozen, and multiplication and addition are all that is done to them.
    """
    abstract = nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))
    parameters = {}
    for path, leaf in checkpoint.abstract_parameters(abstract).items():
        uniform = np.random.RandomState(zlib.crc32(path.encode())).random_sample(leaf.shape)
        inputs = max(1, math.prod(leaf.shape[:-1])) if path.endswith("kernel") else 100
        value = (uniform - 0.5) * gain * math.sqrt(12 / inputs) + path.endswith(".scale")
        parameters[path] = value.astype(leaf.dtype)
    return parameters


def draw(family: str, plan: str) -> Drawing:
    """Two pictures of one plan, and the tokens that the loop returns for the same call."""
    asked = {"plan": PLANS[family][plan], "seed": SEED}
    model, subject = pipe(family), PROMPTS if family == "text" else LABELS
    if family == "text":
        asked |= {"size": "0.06M", "guidance": 2.0, "temperature": 0.7, "top_p": 0.95}
    else:
        asked |= {"guidance": 1.5, "top_k": 20, "top_p": 0.9}
    request, pictures = model.request(subject, **asked), model(subject, **asked)
    run = model.generator.run
    _, outputs = run(request.plan, request.condition, request.controls, request.keys)
    return pictures, tuple(np.asarray(output.tokens) for output in outputs)


def draw_all() -> Iterator[tuple[str, Drawing]]:
    """Every drawing under its name, such as "text/paper"."""
    for family, plans in PLANS.items():
        for plan in plans:
            yield f"{family}/{plan}", draw(family, plan)


def digests(drawing: Drawing) -> dict[str, str]:
    """sha256 of the pictures and of all tokens, as int32."""
    pictures, tokens = drawing
    joined = np.concatenate([part.reshape(-1) for part in tokens]).astype("<i4")
    return {
        "pictures": hashlib.sha256(np.ascontiguousarray(pictures).tobytes()).hexdigest(),
        "tokens": hashlib.sha256(joined.tobytes()).hexdigest(),
    }


def environment() -> str:
    """What the last bit of a float32 sum on a CPU can depend on.

    Versions decide the programs; the processor, which instructions sum; its caches and cores, how
    sums are parted; LLVM's optimisation and XLA's flags, in which order they run.
    """
    quick = jax.config.values["jax_disable_most_optimizations"]
    parts = (
        f"jax {jax.__version__}",
        f"jaxlib {jaxlib.__version__}",
        _processor(),
        _caches(),
        f"{_cores()} cores",
        "quick" if quick else "optimised",
        os.environ.get("XLA_FLAGS", ""),
    )
    return ", ".join(part for part in parts if part)


def _processor() -> str:
    """Architecture, model and vector instructions, as far as the system tells."""
    file = Path("/proc/cpuinfo")
    first = file.read_text().partition("\n\n")[0].splitlines() if file.exists() else []
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)
    }
    model = [facts[key] for key in ("vendor_id", "cpu family", "model") if key in facts]
    flags = facts.get("flags", "").split()
    vectors = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in flags]
    return " ".join((platform.machine(), *model, *vectors))


def _caches() -> str:
    """Sizes of the caches of a core, the nearest first, as far as the system tells."""
    files = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return "caches " + "/".join(file.read_text().strip() for file in files) if files else ""


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def stored_digests() -> dict[str, dict[str, dict[str, str]]]:
    """Environment -> drawing -> what -> digest."""
    return json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {}


def stored_pictures() -> dict[str, np.ndarray]:
    """Drawing -> pictures, uint8 [B, height, width, 3]."""
    with np.load(PICTURES) as file:
        return dict(file)


def main() -> None:
    """Print, and where asked store, what this environment draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="compile as the tests do")
    parser.add_argument("--write", action="store_true", help="store the entry")
    asked = parser.parse_args()
    set_flags()
    jax.config.update("jax_disable_most_optimizations", asked.quick)
    drawn = dict(draw_all())
    entry = {environment(): {name: digests(drawing) for name, drawing in drawn.items()}}
    print(json.dumps(entry, indent=1))
    if asked.write:
        DIGESTS.write_text(json.dumps(stored_digests() | entry, indent=1) + "\n")
        if not PICTURES.exists():
            np.savez_compressed(PICTURES, **{name: drawing[0] for name, drawing in drawn.items()})


if __name__ == "__main__":
    main()
