"""The consumer side that every attention kernel here shares, and its walk over work items.

A CTA is persistent: it walks its work items, and every item is a list of key stages. Consumer
warpgroups own 64 queries each. Scores of one stage are in flight together with the output product
of the previous stage, so the softmax of one overlaps the arithmetic of the other; warpgroups take
turns on the tensor cores. The output leaves through the item's own query buffer, token-major
(`[R, T, H * D]`), so that the matrix product after attention reads it as it lies.
"""

# Mosaic GPU's references are dynamic: pyright cannot follow their attributes and operators.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper import _mosaic as mosaic


def scratch(config, head_dim: int, dtype, query_copies: int = 1) -> dict[str, Any]:
    """Shared memory and barriers; `query_copies` TMA copies fill one query buffer."""
    consumers, block_k, stages = config.consumers, config.block_k, config.stages
    buffers = config.query_buffers
    return dict(
        q_smem=mosaic.tiled_smem((buffers, config.block_q, head_dim), dtype),
        k_smem=mosaic.tiled_smem((stages, block_k, head_dim), dtype),
        v_smem=mosaic.tiled_smem((stages, block_k, head_dim), dtype),
        q_full=plgpu.Barrier(num_arrivals=query_copies, num_barriers=buffers),
        q_empty=plgpu.Barrier(num_arrivals=consumers, num_barriers=buffers),
        k_full=plgpu.Barrier(num_barriers=stages),
        k_empty=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
        v_empty=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    )


class Item:
    """One work item as every role sees it (all traced scalars).

    number: position in the CTA's list; head: index into R*H; tile: query tile of the head; table:
    row of the tables; stages: key stages; first: stages this CTA walked before.
    """

    def __init__(self, number, head, tile, table, stages, first):
        self.number, self.head, self.tile = number, head, tile
        self.table, self.stages, self.first = table, stages, first
        self.buffer: Any = None


class Pipeline:
    """Roles of a CTA. Subclasses bring in the keys (`produce`) and hide some (`hide`)."""

    def __init__(self, gmem: dict[str, Any], scratch: dict[str, Any], config, softmax, heads: int):
        self.gmem, self.config, self.softmax, self.heads = gmem, config, softmax, heads
        for name, ref in scratch.items():
            setattr(self, name, ref)
        self.cta = lax.axis_index("sm")

    def run(self) -> None:
        """Dispatch this warpgroup to its role."""
        mosaic.dispatch(self.config.consumers, self.consume, self.produce)

    def item(self, number, first) -> Item:
        """Describe the item at a position of this CTA's list."""
        raise NotImplementedError

    def produce(self) -> None:
        """Fill query, key and value buffers."""
        raise NotImplementedError

    def look_ahead(self, item: Item, step):
        """Start loading what `hide` will need, before the scores are there."""
        return None

    def hide(self, scores, item: Item, step, ahead):
        """Set the scores of hidden keys of a stage to -inf."""
        raise NotImplementedError

    def load_queries(self, item: Item) -> None:
        """Bring the item's consecutive queries in."""
        rows = pl.ds(item.tile * self.config.block_q, self.config.block_q)
        plgpu.copy_gmem_to_smem(
            self.gmem["q"].at[item.head, rows],
            self.q_smem.at[item.buffer],
            self.q_full.at[item.buffer],
        )

    def store_output(self, item: Item, warpgroup) -> None:
        """Copy the warpgroup's part of the query buffer, now output, to global memory."""
        row, columns = self.output_place(item)
        rows = pl.ds(item.tile * self.config.block_q + warpgroup * 64, 64)
        part = self.q_smem.at[item.buffer, pl.ds(warpgroup * 64, 64)]
        plgpu.copy_smem_to_gmem(part, self.gmem["out"].at[row, rows, columns])

    def output_place(self, item: Item):
        """Row of the batch and columns of the item's head in the token-major output."""
        head_dim = self.q_smem.shape[-1]
        columns = pl.ds(lax.rem(item.head, self.heads) * head_dim, head_dim)
        return lax.div(item.head, self.heads), columns

    def for_items(self, body):
        """Run `body(item)` for this CTA's items; returns the stages walked."""

        def item_loop(number, first):
            item = self.item(number, first)
            item.buffer = lax.rem(number, self.config.query_buffers)
            body(item)
            return first + item.stages

        return lax.fori_loop(0, self.gmem["lengths"][self.cta], item_loop, 0)

    def stage(self, item: Item, step):
        """Buffer of a step."""
        return lax.rem(item.first + step, self.config.stages)

    def consume(self, warpgroup) -> None:
        """Own 64 queries: scores, online softmax, output."""
        config = self.config
        plgpu.set_max_registers(config.consumer_registers, action="increase")
        for stage in range(config.stages):
            plgpu.barrier_arrive(self.k_empty.at[stage])
            plgpu.barrier_arrive(self.v_empty.at[stage])
        for buffer in range(config.query_buffers):
            plgpu.barrier_arrive(self.q_empty.at[buffer])
        self.turns = mosaic.Turns(warpgroup, config.consumers if config.turns else 1)
        self.turns.open()

        def body(item):
            plgpu.barrier_wait(self.q_full.at[item.buffer])
            if config.query_buffers > 1:
                pl.when(item.number > 0)(lambda: self._release(item.number - 1))
            self._attend(item, warpgroup)
            if config.query_buffers == 1:
                self._release(item.number)

        self.for_items(body)
        plgpu.wait_smem_to_gmem(0)

    def _release(self, number) -> None:
        """Hand a query buffer back once its output has left; with two buffers it has by now."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(self.q_empty.at[lax.rem(number, self.config.query_buffers)])

    def _attend(self, item: Item, warpgroup) -> None:
        q = self.q_smem.at[item.buffer, pl.ds(warpgroup * 64, 64)]
        top, total = self.softmax.start()
        scores = self._first_scores(item, q)
        weights, top, total, _ = self.softmax.step(scores, top, total)
        out = mosaic.zero_output(q.shape[-1])

        def step_loop(step, carry):
            return self._overlapped_step(item, q, step, *carry)

        carry = (out, weights.astype(q.dtype), top, total)
        out, weights, top, total = lax.fori_loop(1, item.stages, step_loop, carry)
        out = self._last_output(item, out, weights)
        self._finish(item, warpgroup, q, out, top, total)

    def _first_scores(self, item: Item, q) -> Float[Array, "64 N"]:
        stage = self.stage(item, 0)
        ahead = self.look_ahead(item, 0)
        plgpu.barrier_wait(self.k_full.at[stage])

        def multiply(scores):
            plgpu.wgmma(scores, q, mosaic.transposed(self.k_smem.at[stage]))
            return scores[...]

        scores = pl.run_scoped(multiply, plgpu.ACC((64, self.config.block_k), jnp.float32))
        scores = self.hide(scores, item, 0, ahead)
        plgpu.barrier_arrive(self.k_empty.at[stage])
        return scores

    def _last_output(self, item: Item, out, weights) -> Float[Array, "64 D"]:
        stage = self.stage(item, item.stages - 1)
        plgpu.barrier_wait(self.v_full.at[stage])

        def multiply(out_ref):
            plgpu.wgmma(out_ref, weights, self.v_smem.at[stage])

        out = pl.run_state(multiply)(plgpu.ACC.init(out))
        plgpu.barrier_arrive(self.v_empty.at[stage])
        return out

    def _overlapped_step(self, item: Item, q, step, out, weights, top, total):
        """Scores of this step, output of the previous one; the softmax hides behind the latter."""
        stage, previous = self.stage(item, step), self.stage(item, step - 1)
        ahead = self.look_ahead(item, step)
        plgpu.barrier_wait(self.k_full.at[stage])
        if not self.config.scores_first:
            plgpu.barrier_wait(self.v_full.at[previous])

        def multiply(scores_ref, out_ref):
            keys = mosaic.transposed(self.k_smem.at[stage])
            self.turns.take()
            if self.config.scores_first:
                plgpu.wgmma(scores_ref, q, keys)
                plgpu.barrier_wait(self.v_full.at[previous])
                plgpu.wgmma(out_ref, weights, self.v_smem.at[previous])
            else:
                plgpu.wgmma(out_ref, weights, self.v_smem.at[previous])
                plgpu.wgmma(scores_ref, q, keys)
            self.turns.give()
            in_flight = 1 if self.config.scores_first else 0
            return plgpu.wgmma_accumulator_load(scores_ref, wait_n=in_flight)

        def overlap(refs):
            out_ref, new_weights, *new_state = refs
            shape = (64, self.config.block_k)
            scores = pl.run_scoped(
                lambda scores_ref: multiply(scores_ref, out_ref), plgpu.ACC(shape, jnp.float32)
            )
            scores = self.hide(scores, item, step, ahead)
            plgpu.barrier_arrive(self.k_empty.at[stage])
            new_weights[...], *state = self.softmax.step(scores, top, total)
            for ref, value in zip(new_state, state, strict=True):
                ref[...] = value

        empty = jnp.zeros((64, self.config.block_k), jnp.float32)
        init = (plgpu.ACC.init(out), empty, top, total, top)
        out, new_weights, top, total, alpha = pl.run_state(overlap)(init)
        plgpu.barrier_arrive(self.v_empty.at[previous])
        if self.softmax.rescales:
            out = out * mosaic.spread(alpha, out)
        return out, new_weights.astype(weights.dtype), top, total

    def _finish(self, item: Item, warpgroup, q, out, top, total) -> None:
        inverse = 1.0 / jnp.maximum(total, 1e-37)
        q[...] = (out * mosaic.spread(inverse, out)).astype(q.dtype)
        rows = pl.ds(warpgroup * 64, 64)
        if "lse" in self.gmem:
            self.lse_smem[rows] = (top + jnp.log2(total)) * (1.0 / mosaic.LOG2E)
        plgpu.commit_smem()
        self.store_output(item, warpgroup)
        if "lse" in self.gmem:
            queries = pl.ds(item.tile * self.config.block_q + warpgroup * 64, 64)
            lse = self.gmem["lse"].at[item.head, queries]
            plgpu.copy_smem_to_gmem(self.lse_smem.at[rows], lse)
