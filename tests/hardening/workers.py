"""What processes that tests kill are busy with: the real writers, slowed down."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from sparvar_jax.cli import stopping
from sparvar_jax.pipelines import sampling_jobs
from sparvar_jax.pipelines.sampling_jobs import SampleJob
from sparvar_jax.weights.large_file import whole_files

JOB = SampleJob((3, 1, 7), per_class=7, batch=4, seed=100, settings=(("model", "fake"),))


def fake_draw(labels, seeds):
    """Pictures that only depend on class and seed."""
    return np.stack(
        [
            np.random.default_rng([label, seed]).integers(0, 256, (6, 5, 3), np.uint8)
            for label, seed in zip(labels, seeds, strict=True)
        ]
    )


def sample_slowly(out: str) -> None:
    """A sampling job; joining is slowed down as well, so that kills strike there too."""
    join = sampling_jobs._join

    def slow(*args):
        time.sleep(0.03)
        join(*args)
        time.sleep(0.03)

    def draw(labels, seeds):
        time.sleep(0.02)
        return fake_draw(labels, seeds)

    sampling_jobs._join = slow
    with stopping.cleanly():
        sampling_jobs.run_job(JOB, draw, out)


def write_pictures(folder: str | Path) -> None:
    """Two files as `generate` writes them."""
    paths = [Path(folder) / f"{index}.png" for index in range(2)]
    with stopping.cleanly(), whole_files(paths) as temporaries:
        for temporary in temporaries:
            time.sleep(0.04)
            temporary.write_bytes(b"who")
            time.sleep(0.03)
            temporary.write_bytes(b"whole")
