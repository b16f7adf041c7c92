"""Compiling all that a server may draw, before anyone asks."""

from __future__ import annotations

from sparvar_jax.models.text_tokens import BUCKETS
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.runtime.progress import Progress
from sparvar_jax.serve.menu import Menu
from sparvar_jax.serve.settings import Settings


def warm_up(pipe: Pipeline, settings: Settings, progress: Progress | None = None) -> int:
    """Compile every bucket at every batch size; returns how many there were.

    The first batch of each plan is also drawn once, which finds what compiling cannot: memory.
    progress: called with the stage "compile" after each.
    """
    menu = Menu(pipe, settings)
    jobs = [(bucket, batch) for bucket in menu.buckets() for batch in settings.batches]
    for done, (bucket, batch) in enumerate(jobs, 1):
        prompts = [_text(pipe, bucket.prompt)] * batch
        guided = {}
        if bucket.negative is not None:
            guided["negative"] = [_text(pipe, bucket.negative)] * batch
        pipe.warm_up(prompts, **bucket.options, **guided)
        if progress:
            progress("compile", done, len(jobs))
    for plan in menu.plans:
        bucket = next(bucket for bucket in menu.buckets() if bucket.plan == plan)
        pipe([_text(pipe, bucket.prompt)] * settings.largest, **bucket.options)
    return len(jobs)


def _text(pipe: Pipeline, padded: int) -> str:
    """A prompt that is padded to so many tokens."""
    shorter = max((bucket for bucket in BUCKETS if bucket < padded), default=0)
    for words in range(1, padded + 1):
        text = " ".join(["a"] * words)
        if pipe.text_lengths([text])[0][0] > shorter:
            return text
    raise ValueError(f"the tokenizer makes no prompt of {shorter + 1} tokens out of {text!r}")
