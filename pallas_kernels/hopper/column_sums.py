"""Column sums of attention on Hopper: the mass every key gets from each group of queries.

A second pass over the scores with the log-sum-exp known. Scores are computed transposed, keys by
queries, so that the sum over queries is a row reduction in registers. A work item is a tile of keys
of one (row, head), which stays in shared memory while the query groups stream past.
"""

# Mosaic GPU's references are dynamic: pyright cannot follow their attributes and operators.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false, reportOperatorIssue=false

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper import _mosaic as mosaic
from pallas_kernels.hopper.tuning import ColumnSumsConfig


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Static sizes of a call."""

    heads: int
    groups: int
    group: int
    key_tiles: int


def column_sums_kernel(
    q: Float[Array, "n T D"],
    k: Float[Array, "m S D"],
    lse: Float[Array, "n G group"],
    key_tiles: int,
    config: ColumnSumsConfig,
    *,
    scale: float,
    ctas: int,
) -> Float[Array, "n G X"]:
    """Sums over `key_tiles` tiles of keys; lse in base 2, +inf for queries that do not exist."""
    heads, groups, group = lse.shape
    shape = _Shape(heads, groups, group, key_tiles)
    block_k, head_dim = config.block_k, q.shape[-1]
    buffers = dict(
        k_smem=mosaic.tiled_smem((2, block_k, head_dim), q.dtype),
        q_smem=mosaic.tiled_smem((config.stages, group, head_dim), q.dtype),
        lse_smem=plgpu.SMEM((config.stages, 1, group), jnp.float32),
        sum_smem=plgpu.SMEM((2 * block_k,), jnp.float32),
        k_full=plgpu.Barrier(num_barriers=2),
        k_empty=plgpu.Barrier(num_arrivals=config.consumers, num_barriers=2),
        q_full=plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
        q_empty=plgpu.Barrier(num_arrivals=config.consumers, num_barriers=config.stages),
    )

    def column_sums_body(q_gmem, k_gmem, lse_gmem, out_gmem, **scratch):
        call = _ColumnSums((q_gmem, k_gmem, lse_gmem, out_gmem), scratch, config, shape, scale)
        mosaic.dispatch(config.consumers, call.consume, call.produce)

    return mosaic.kernel(
        column_sums_body,
        out_type=jax.ShapeDtypeStruct((heads, groups, key_tiles * block_k), jnp.float32),
        grid=(min(ctas, heads * key_tiles),),
        num_threads=config.consumers + 1,
        scratch_types=buffers,
        compiler_params=mosaic.compiler_params(),
    )(q, k, lse.reshape(heads, groups, 1, group))


class _ColumnSums:
    """The two roles of the kernel."""

    def __init__(self, gmem, scratch, config: ColumnSumsConfig, shape: _Shape, scale: float):
        self.q_gmem, self.k_gmem, self.lse_gmem, self.out_gmem = gmem
        self.config, self.shape, self.scale = config, shape, scale
        for name, ref in scratch.items():
            setattr(self, name, ref)

    def for_items(self, body) -> None:
        """Run `body(number, head, tile)` for this CTA's key tiles."""
        cta, ctas, mine = mosaic.share(self.shape.heads * self.shape.key_tiles)

        @pl.loop(0, mine)
        def _(number):
            item = cta + number * ctas
            head, tile = lax.div(item, self.shape.key_tiles), lax.rem(item, self.shape.key_tiles)
            body(number, head, tile)

    def produce(self) -> None:
        """Bring key tiles and query groups in."""
        plgpu.set_max_registers(self.config.producer_registers, action="decrease")
        groups, group, block_k = self.shape.groups, self.shape.group, self.config.block_k

        def body(number, head, tile):
            buffer = lax.rem(number, 2)
            plgpu.barrier_wait(self.k_empty.at[buffer])
            keys = pl.ds(tile * block_k, block_k)
            plgpu.copy_gmem_to_smem(
                self.k_gmem.at[head, keys], self.k_smem.at[buffer], self.k_full.at[buffer]
            )

            @pl.loop(0, groups)
            def _(index):
                stage = lax.rem(number * groups + index, self.config.stages)
                plgpu.barrier_wait(self.q_empty.at[stage])
                full = self.q_full.at[stage]
                rows = pl.ds(index * group, group)
                plgpu.copy_gmem_to_smem(self.q_gmem.at[head, rows], self.q_smem.at[stage], full)
                plgpu.copy_gmem_to_smem(
                    self.lse_gmem.at[head, index], self.lse_smem.at[stage], full
                )

        self.for_items(body)

    def consume(self, warpgroup) -> None:
        """Own 64 keys: their scores with every query group, exponentials, sums."""
        plgpu.set_max_registers(self.config.consumer_registers, action="increase")
        for stage in range(self.config.stages):
            plgpu.barrier_arrive(self.q_empty.at[stage])
        for buffer in range(2):
            plgpu.barrier_arrive(self.k_empty.at[buffer])
        self.turns = mosaic.Turns(warpgroup, self.config.consumers)
        self.turns.open()

        def body(number, head, tile):
            buffer = lax.rem(number, 2)
            plgpu.barrier_wait(self.k_full.at[buffer])
            keys = self.k_smem.at[buffer, pl.ds(warpgroup * 64, 64)]
            first = tile * self.config.block_k + warpgroup * 64

            @pl.loop(0, self.shape.groups)
            def _(index):
                number_of_group = number * self.shape.groups + index
                sums = self._group(keys, number_of_group)
                self._store(sums, head, index, first, warpgroup, number_of_group)

            plgpu.barrier_arrive(self.k_empty.at[buffer])

        self.for_items(body)
        plgpu.wait_smem_to_gmem(0)

    def _group(self, keys, number) -> Float[Array, "64"]:
        stage = lax.rem(number, self.config.stages)
        plgpu.barrier_wait(self.q_full.at[stage])
        self.turns.take()

        def multiply(scores_ref):
            plgpu.wgmma(scores_ref, keys, mosaic.transposed(self.q_smem.at[stage]))
            self.turns.give()
            return scores_ref[...]

        scores = pl.run_scoped(multiply, plgpu.ACC((64, self.shape.group), jnp.float32))
        lse = mosaic.load(self.lse_smem.at[stage, 0], mosaic.COLUMN)
        plgpu.barrier_arrive(self.q_empty.at[stage])
        shifted = scores * (self.scale * mosaic.LOG2E) - lax.broadcast_in_dim(
            lse, scores.shape, [1]
        )
        return jnp.exp2(shifted).sum(axis=1)

    def _store(self, sums, head, index, first, warpgroup, number) -> None:
        """Two buffers a warpgroup, so that a store has a whole step to leave."""
        place = (lax.rem(number, 2) * self.config.consumers + warpgroup) * 64
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        self.sum_smem[pl.ds(place, 64)] = sums
        plgpu.commit_smem()
        target = self.out_gmem.at[head, index, pl.ds(first, 64)]
        plgpu.copy_smem_to_gmem(self.sum_smem.at[pl.ds(place, 64)], target)
