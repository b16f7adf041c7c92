"""Jobs of prompts on a Ray cluster: every worker loads the model once and draws batch after batch.

Ray schedules, restarts and reports; which pictures there are, and which are missing, is told by the
folder, so that a job that was stopped goes on wherever it runs again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.pipelines.prompt_jobs import PromptJob, claim, draw_batch, drawer
from sparvar_jax.runtime.hosts import Host


class PromptMapper:
    """Draws batches of a job; for `ray.data.Dataset.map_batches` over their numbers as `id`.

    model, options: as of `Pipeline.from_checkpoint`. drawing: of every call.
    """

    def __init__(
        self,
        job: PromptJob,
        out: str | Path,
        model: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
        drawing: Mapping[str, Any] | None = None,
    ):
        self._job, self._out = job, Path(out)
        pipe = Pipeline.from_checkpoint(model, **(options or {}))
        self._draw, self._describe = drawer(pipe, drawing or {})

    def __call__(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batches numbered `id`, and how many pictures of each were missing and are drawn."""
        drawn = [
            draw_batch(self._job, int(index), self._draw, self._out, self._describe)
            for index in rows["id"]
        ]
        return {"id": np.asarray(rows["id"]), "drawn": np.asarray(drawn)}


def run_on_ray(
    job: PromptJob,
    out: str | Path,
    model: str | Path | None = None,
    *,
    workers: int = 1,
    gpus: float = 1,
    options: Mapping[str, Any] | None = None,
    drawing: Mapping[str, Any] | None = None,
) -> int:
    """Draw what is missing of a job on the Ray cluster in use; returns how many pictures that was.

    out: a folder that all workers share. workers: how many, each with so many `gpus`. Other
    arguments as of `PromptMapper`. Needs the extra `ray`.
    """
    import ray.data  # pyright: ignore[reportMissingImports]

    with claim(Path(out), job, Host()):
        # Items, not a range: tasks that make one wait for a core, and workers may hold them all.
        numbers = [{"id": index} for index in range(len(job.batches))]
        done = ray.data.from_items(numbers).map_batches(
            PromptMapper,
            fn_constructor_args=(job, str(out), model, options, drawing),
            batch_size=1,
            concurrency=workers,
            num_gpus=gpus,
        )
        return sum(row["drawn"] for row in done.take_all())
