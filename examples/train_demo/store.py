"""Training weights on disk: float16 safetensors in files of at most 15 MiB, by dotted path."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from examples.train_demo.deepen import deepened
from sparvar_jax.weights import checkpoint
from sparvar_jax.weights.storage import SCALE_SUFFIX

FILE_BYTES = 15 << 20


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Nested parameters to `a.0.kernel` -> array."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [".".join(str(getattr(step, "key", step)) for step in path) for path, _ in leaves]
    return {name: np.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}


def save(directory: Path, name: str, tree: Any) -> bool:
    """Write `tree` as `<name>.0.safetensors`, `<name>.1.safetensors`, ... in float16.

    Files appear complete or not at all. Weights that are not finite are not written: what was
    saved before stays, and the answer is False.
    """
    directory.mkdir(parents=True, exist_ok=True)
    groups: list[dict[str, np.ndarray]] = [{}]
    used = 0
    for path, array in flatten(tree).items():
        array = np.ascontiguousarray(array.astype(np.float16))
        if not np.isfinite(array).all():
            print(f"{name} is not saved: {path} is not finite", flush=True)
            return False
        if used + array.nbytes > FILE_BYTES:
            groups.append({})
            used = 0
        groups[-1][path] = array
        used += array.nbytes
    files = [directory / f"{name}.{index}.safetensors" for index in range(len(groups))]
    for group, file in zip(groups, files, strict=True):
        save_file(group, file.with_suffix(".new"))
    for file in files:
        os.replace(file.with_suffix(".new"), file)
    return True


def load(directory: Path, name: str, like: Any, depth: int | None = None) -> Any:
    """Read what `save` (or `storage.write_safetensors`) wrote, shaped and typed as `like`.

    `directory` may also be an exported model: its int8 rounding is soon trained away. depth: of the
    transformer that is made of it, which may be deeper. Raises ValueError where a parameter is
    missing or has another shape.
    """
    exported = (directory / checkpoint.CONFIG).is_file()
    found = _read_model(directory, name) if exported else _read_files(directory, name)
    found = found if depth is None else deepened(found, depth)
    wanted: Mapping[str, Any] = {
        ".".join(str(getattr(step, "key", step)) for step in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(like)[0]
    }
    wrong = [p for p, leaf in wanted.items() if p not in found or found[p].shape != leaf.shape]
    if wrong:
        raise ValueError(
            f"{directory}/{name}*.safetensors does not fit the model at {wrong[:5]}: "
            "train the stage again, or give the sizes it was trained with"
        )
    leaves = [found[path].astype(leaf.dtype) for path, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _read_files(directory: Path, name: str) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob(f"{name}*.safetensors")):
        found |= load_file(file)
    for path in [path for path in found if path.endswith(SCALE_SUFFIX)]:
        kernel = path.removesuffix(SCALE_SUFFIX)
        found[kernel] = found[kernel] * found.pop(path)
    return found


def _read_model(directory: Path, name: str) -> dict[str, np.ndarray]:
    if name == "tokenizer":
        return checkpoint.part_reader(directory, name).restore()
    # The text encoder is trained, and so saved, together with the transformer.
    return {
        f"{part}.{path}": array
        for part in ("transformer", "text")
        for path, array in checkpoint.part_reader(directory, part).restore().items()
    }
