"""Kernels for Hopper GPUs in Mosaic, the GPU dialect of Pallas: `backend` is the way in."""
