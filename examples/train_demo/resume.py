"""The whole state of a training on disk, so that the next call goes on as if nothing had happened.

Float32 parameters, optimizer state and averages of the shipped size take 254 MB: they stay
where the training runs. What travels are the weights alone (`store.py`).
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from examples.train_demo.course import Used
from examples.train_demo.optim import TrainState

STATE, USED = "state.npz", "used"


def save(folder: Path, state: TrainState, used: Used) -> None:
    """Write the state and what was used of the course; the file appears complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state))]
    arrays = {str(index): leaf for index, leaf in enumerate(leaves)}
    new = folder / f"new-{STATE}"
    np.savez(new, **arrays, **{USED: np.array(json.dumps([used.seconds, used.steps]))})
    os.replace(new, folder / STATE)


def load(folder: Path, like: TrainState) -> tuple[TrainState, Used] | None:
    """What `save` wrote, or None where nothing was.

    Raises ValueError where it is of another training: other sizes, or another optimizer.
    """
    if not (folder / STATE).is_file():
        return None
    wanted, structure = jax.tree.flatten(like)
    with np.load(folder / STATE, allow_pickle=False) as file:
        found: list[Any] = [file[str(i)] for i in range(len(wanted)) if str(i) in file.files]
        fits = len(file.files) == len(wanted) + 1 and len(found) == len(wanted)
        if not fits or any(
            (a.shape, a.dtype) != (b.shape, b.dtype) for a, b in zip(found, wanted, strict=True)
        ):
            raise ValueError(
                f"{folder / STATE} is of another training than this one: give its sizes, or "
                "remove it to begin anew"
            )
        seconds, steps = json.loads(str(file[USED]))
    return jax.tree.unflatten(structure, found), Used(float(seconds), int(steps))
