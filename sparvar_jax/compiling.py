"""How the programs of this package are compiled: the one place that knows XLA's options."""

from __future__ import annotations

from typing import Any

import jax


def compile_lowered(lowered: jax.stages.Lowered) -> Any:
    """The executable of a lowered program, with the options that suit the default device.

    On a GPU matrix products stay with cuBLAS: choosing between it and Triton takes most of the
    time that compilation takes, and products by Triton lose the epilogues with bias and GELU.
    """
    gpu = jax.default_backend() == "gpu"
    return lowered.compile({"xla_gpu_enable_triton_gemm": False} if gpu else None)
