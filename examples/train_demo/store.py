"""Training weights on disk: float16 safetensors in files of at most 15 MiB, by dotted path."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

FILE_BYTES = 15 << 20


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Nested parameters to `a.0.kernel` -> array."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [".".join(str(getattr(step, "key", step)) for step in path) for path, _ in leaves]
    return {name: np.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}


def save(directory: Path, name: str, tree: Any) -> None:
    """Write `tree` as `<name>.0.safetensors`, `<name>.1.safetensors`, ... in float16."""
    directory.mkdir(parents=True, exist_ok=True)
    groups: list[dict[str, np.ndarray]] = [{}]
    used = 0
    for path, array in flatten(tree).items():
        array = np.ascontiguousarray(array.astype(np.float16))
        if used + array.nbytes > FILE_BYTES:
            groups.append({})
            used = 0
        groups[-1][path] = array
        used += array.nbytes
    for index, group in enumerate(groups):
        save_file(group, directory / f"{name}.{index}.safetensors")


def load(directory: Path, name: str, like: Any) -> Any:
    """Read what `save` wrote into the structure, shapes and dtypes of `like`.

    Raises ValueError where a parameter is missing or has another shape.
    """
    found: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob(f"{name}.*.safetensors")):
        found |= load_file(file)
    wanted: Mapping[str, Any] = {
        ".".join(str(getattr(step, "key", step)) for step in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(like)[0]
    }
    wrong = [p for p, leaf in wanted.items() if p not in found or found[p].shape != leaf.shape]
    if wrong:
        raise ValueError(
            f"{directory}/{name}.*.safetensors does not fit the model at {wrong[:5]}: "
            "train the stage again, or give the sizes it was trained with"
        )
    leaves = [found[path].astype(leaf.dtype) for path, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
