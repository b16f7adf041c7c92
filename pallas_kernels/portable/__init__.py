"""Kernels for every NVIDIA GPU since Ampere in Triton, through Pallas: `backend` is the way in."""
