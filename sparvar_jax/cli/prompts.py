"""`sparvar generate --prompts`: a file of prompts to a folder of pictures, by many processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sparvar_jax.cli import console, options


@dataclasses.dataclass(frozen=True)
class Job:
    """What `sparvar generate --prompts` is asked for."""

    prompts: Path
    out: Path
    model: Path | None
    batch: int
    kind: dict[str, Any]
    """How the model is loaded: dtype, weights, stream, cache, devices."""
    drawing: dict[str, Any]
    """Options of the pipeline's call."""
    hosts: tuple[str | None, int | None, int | None] = (None, None, None)

    def run(self) -> None:
        """Draw what is missing, and say how much there is."""
        from sparvar_jax.pipelines import prompt_files, prompt_jobs
        from sparvar_jax.pipelines.loading import model_folder
        from sparvar_jax.pipelines.pipeline import Pipeline
        from sparvar_jax.runtime import hosts

        if self.out.suffix.lower() == ".png":
            raise ValueError(f"many prompts go into a folder: give --out DIR, got {self.out}")
        drawing = dict(self.drawing)
        entries = prompt_files.read_prompts(self.prompts, drawing.pop("seed"))
        host = hosts.join(*self.hosts)
        console.use_compilation_cache()
        folder = model_folder(self.model)
        options.check_draws(folder, "prompts")
        settings = {**drawing, **self.kind, "model": options.fingerprint(folder)}
        del settings["devices"]  # pictures do not depend on them
        told = tuple((name, str(value)) for name, value in sorted(settings.items()))
        job = prompt_jobs.PromptJob(entries, self.batch, told)
        with console.progress() as report:
            pipe = Pipeline.from_checkpoint(folder, **self.kind, progress=report)
            draw, describe = prompt_jobs.drawer(pipe, drawing)
            drawn = prompt_jobs.run_prompts(
                job, draw, self.out, describe=describe, host=host, progress=report
            )
        share = f"process {host.index} of {host.count}: " if host.count > 1 else ""
        console.say(f"{self.out}: {share}{drawn} pictures drawn, {len(entries)} in the whole job")
