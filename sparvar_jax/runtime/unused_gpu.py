"""Says when a GPU stands idle because of how Python and jax are installed."""

from __future__ import annotations

import sys
from pathlib import Path

import jax

DRIVER = Path("/proc/driver/nvidia/gpus")
"""Where the NVIDIA driver of Linux lists its devices."""
_NEEDS = (3, 12)


def advice(
    driver: Path = DRIVER,
    python: tuple[int, int] = sys.version_info[:2],
    platforms: str | None = None,
) -> str | None:
    """What to install where an NVIDIA GPU is here and jax does not use it; None where all is well.

    platforms: what the user had chosen by `JAX_PLATFORMS`, to whom nothing is said.
    """
    if platforms or jax.default_backend() != "cpu":
        return None
    try:
        present = any(driver.iterdir())
    except OSError:
        return None
    if not present:
        return None
    if python < _NEEDS:
        return (
            f"an NVIDIA GPU is here, but jax {jax.__version__} runs on the CPU: for Python "
            f"{python[0]}.{python[1]} there is jax 0.10 alone, and the GPU needs 0.11; make an "
            "environment with Python 3.12 or newer and install 'sparvar-jax[cuda13]' there"
        )
    return (
        f"an NVIDIA GPU is here, but jax {jax.__version__} runs on the CPU: install "
        "'sparvar-jax[cuda13]', or set JAX_PLATFORMS=cpu if this is meant"
    )
