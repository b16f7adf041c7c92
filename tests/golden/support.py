"""Access to stored arrays: pairs of `<stem>.json` and `<stem>.safetensors`, in two folders.

Golden files, which the released code wrote, lie in `SPARVAR_GOLDEN_DIR`, or in `../shared/golden`
seen from the repository root. Fixtures, which the PyTorch twins wrote in the same format, lie in
the repository, so that every clone checks parity. A sidecar describes every tensor and the
configuration that made it, so a test needs nothing but a stem:

    @pytest.mark.parametrize("stem", golden_stems("bsq_vae_*"))
    def test_decode(stem): sidecar, tensors = load_golden(stem)

Keep the stem in the test id (it is there when the stem itself is the parameter): the summary at
the end of a run counts files by it, and `conftest.py` drops tests whose parameter list is empty.
"""

import fnmatch
import json
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from safetensors.numpy import load_file

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
FIXTURES = REPOSITORY / "tests" / "fixtures"


def golden_folder() -> pathlib.Path:
    """The folder of golden files; it may not exist."""
    named = os.environ.get("SPARVAR_GOLDEN_DIR")
    return pathlib.Path(named) if named else REPOSITORY.parent / "shared" / "golden"


def stems_in(folder: pathlib.Path) -> set[str]:
    """Stems that have both files; empty without a folder."""
    return {p.stem for p in folder.glob("*.json") if p.with_suffix(".safetensors").exists()}


def golden_stems(pattern: str = "*") -> list[str]:
    """Sorted stems of golden files and fixtures that match a shell pattern."""
    stems = stems_in(golden_folder()) | stems_in(FIXTURES)
    return sorted(stem for stem in stems if fnmatch.fnmatch(stem, pattern))


def file_of(stem: str, suffix: str) -> pathlib.Path:
    """Where a stem's file lies; the golden folder comes first."""
    golden = golden_folder() / f"{stem}{suffix}"
    return golden if golden.exists() else FIXTURES / f"{stem}{suffix}"


def load_sidecar(stem: str) -> dict[str, Any]:
    """The JSON description alone: cheap enough for building parameter lists during collection."""
    return json.loads(file_of(stem, ".json").read_text())


def load_golden(stem: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The sidecar and every tensor in its stored dtype (weights are float16: see `state_dict`)."""
    return load_sidecar(stem), load_file(file_of(stem, ".safetensors"))


def coverage(test_ids: Iterable[str]) -> list[str]:
    """Lines that say how many golden files and fixtures took part in tests with these ids."""
    ids, folder = list(test_ids), golden_folder()
    golden = stems_in(folder)
    lines = [
        _counted("golden files", golden, ids, folder)
        if golden
        else f"no golden files in {folder}: set SPARVAR_GOLDEN_DIR to check against them"
    ]
    return [*lines, _counted("fixtures", stems_in(FIXTURES) - golden, ids, FIXTURES)]


def _counted(what: str, stems: set[str], ids: list[str], folder: pathlib.Path) -> str:
    checked = {stem for stem in stems if any(re.search(rf"\b{re.escape(stem)}\b", i) for i in ids)}
    line = f"{what} checked: {len(checked)} of {len(stems)} (folder {folder})"
    missed = sorted(stems - checked)
    return line + (f"; not checked: {', '.join(missed)}" if missed else "")


def state_dict(
    tensors: dict[str, np.ndarray], prefix: str = "state_dict."
) -> dict[str, np.ndarray]:
    """Weights of a golden file under their released names, floating ones widened to float32."""
    weights = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            floating = np.issubdtype(value.dtype, np.floating)
            weights[key.removeprefix(prefix)] = value.astype(np.float32) if floating else value
    return weights


def most_exempt(total: int, share: float = 1e-3) -> float:
    """How many of `total` values may lie so close to a border that rounding may move them.

    A share of them, and what chance adds in a small file: three standard deviations of a count
    that has this mean. 3 of 1,360 pass, 5 of 1,360 do not, nor do 1,200 of a million.
    """
    return total * share + 3 * (total * share) ** 0.5
