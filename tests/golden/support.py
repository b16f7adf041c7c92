"""Access to stored golden arrays: pairs of `<stem>.json` and `<stem>.safetensors` in one folder.

The folder is `SPARVAR_GOLDEN_DIR`, or `../shared/golden` seen from the repository root. A sidecar
describes every tensor and the configuration that made it, so a test needs nothing but a stem:

    @pytest.mark.parametrize("stem", golden_stems("bsq_vae_*"))
    def test_decode(stem): sidecar, tensors = load_golden(stem)

Keep the stem in the test id (it is there when the stem itself is the parameter): the summary at
the end of a run counts files by it, and `conftest.py` drops tests whose parameter list is empty.
"""

import fnmatch
import json
import os
import pathlib
from typing import Any

import numpy as np
from safetensors.numpy import load_file

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def golden_folder() -> pathlib.Path:
    """The folder of golden files; it may not exist."""
    named = os.environ.get("SPARVAR_GOLDEN_DIR")
    return pathlib.Path(named) if named else REPOSITORY.parent / "shared" / "golden"


def golden_stems(pattern: str = "*") -> list[str]:
    """Sorted stems that match a shell pattern and have both files; empty without a folder."""
    sidecars = golden_folder().glob("*.json")
    stems = (path.stem for path in sidecars if path.with_suffix(".safetensors").exists())
    return sorted(stem for stem in stems if fnmatch.fnmatch(stem, pattern))


def load_sidecar(stem: str) -> dict[str, Any]:
    """The JSON description alone: cheap enough for building parameter lists during collection."""
    return json.loads((golden_folder() / f"{stem}.json").read_text())


def load_golden(stem: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The sidecar and every tensor in its stored dtype (weights are float16: see `state_dict`)."""
    return load_sidecar(stem), load_file(golden_folder() / f"{stem}.safetensors")


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
