"""How the programs of this package are compiled: the one place that knows XLA's options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from sparvar_jax.runtime import programs
from sparvar_jax.runtime.settings import fixed


def compile_lowered(lowered: jax.stages.Lowered) -> Any:
    """The executable of a lowered program, with the options that suit the default device.

    On a GPU matrix products stay with cuBLAS: choosing between it and Triton takes most of the
    time that compilation takes, and products by Triton lose the epilogues with bias and GELU.
    """
    gpu = jax.default_backend() == "gpu"
    return lowered.compile({"xla_gpu_enable_triton_gemm": False} if gpu else None)


def compile_traced(traced: jax.stages.Traced, file: Path | None) -> Any:
    """The executable of a traced program: the one kept in `file`, or a new one, kept there.

    file: what `programs.place` says; None keeps nothing.
    """
    kept = None if file is None else programs.load(file, traced)
    if kept is not None:
        return kept
    with fixed():
        lowered = traced.lower()
    compiled = compile_lowered(lowered)
    if file is not None:
        programs.keep(file, compiled)
    return compiled
