"""GPUs that the portable kernels are assembled for: one of every family, by its published numbers.

Nothing here was measured. Bandwidth in bytes a second, products in 16-bit floating-point operations
a second with float32 sums and without structured sparsity, clock in GHz.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """kind: the device's name, as CUDA gives it; capability: (major, minor)."""

    kind: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_kib: int
    l2_mib: int
    memory_gib: int
    bandwidth: float
    products: float
    clock: float

    @property
    def family(self) -> str:
        """The compute capability as text."""
        return "{}.{}".format(*self.capability)

    def target(self) -> str:
        """What XLA is told of a device that is not there (a GpuTargetConfigProto)."""
        major, minor = self.capability
        shared = self.shared_kib * 1024
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024  threads_per_warp: 32
              shared_memory_per_block: 49152  shared_memory_per_block_optin: {shared}
              shared_memory_per_core: {shared + 1024}
              threads_per_core_limit: 1536  core_count: {self.multiprocessors}  fpus_per_core: 128
              block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
              memory_bandwidth: {int(self.bandwidth)}  l2_cache_size: {self.l2_mib << 20}
              clock_rate_ghz: {self.clock}  device_memory_size: {self.memory_gib << 30}
              registers_per_core_limit: 65536  registers_per_block_limit: 65536
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 13 }}
            device_description_str: "{self.kind}"
        """


GPUS = {
    gpu.family: gpu
    for gpu in (
        Gpu(kind="NVIDIA A100-SXM4-80GB", capability=(8, 0), multiprocessors=108, shared_kib=163,
            l2_mib=40, memory_gib=80, bandwidth=2.04e12, products=312e12, clock=1.41),
        Gpu(kind="NVIDIA A10", capability=(8, 6), multiprocessors=72, shared_kib=99,
            l2_mib=6, memory_gib=24, bandwidth=0.6e12, products=125e12, clock=1.70),
        Gpu(kind="NVIDIA GeForce RTX 4090", capability=(8, 9), multiprocessors=128, shared_kib=99,
            l2_mib=72, memory_gib=24, bandwidth=1.01e12, products=165e12, clock=2.52),
        Gpu(kind="NVIDIA H100 80GB HBM3", capability=(9, 0), multiprocessors=132, shared_kib=227,
            l2_mib=50, memory_gib=80, bandwidth=3.35e12, products=989e12, clock=1.98),
        Gpu(kind="NVIDIA B200", capability=(10, 0), multiprocessors=148, shared_kib=227,
            l2_mib=126, memory_gib=180, bandwidth=8.0e12, products=2250e12, clock=1.97),
        Gpu(kind="NVIDIA RTX PRO 6000 Blackwell Server Edition", capability=(12, 0),
            multiprocessors=188, shared_kib=99, l2_mib=128, memory_gib=96, bandwidth=1.6e12,
            products=500e12, clock=2.6),
    )
}  # fmt: skip
"""Family -> the GPU that stands for it."""
