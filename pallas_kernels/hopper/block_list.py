"""Dense and block-sparse attention on Hopper: one persistent kernel that walks lists of key blocks.

A work item is one query block of one (row, head). The producer brings query and key blocks in with
TMA and runs ahead across work items. Key blocks with hidden rows come first in a list; their scores
are masked and their values come from a small patched copy, so that nothing hidden is multiplied.
Where the caller vouches for finite values there is no copy.
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
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import _mosaic as mosaic
from pallas_kernels.hopper._pipeline import Item, Pipeline, scratch
from pallas_kernels.hopper.tuning import BlockListConfig


@dataclasses.dataclass(frozen=True)
class BlockListInputs:
    """Device arrays of one call; n = R * H, items are numbered (n, query block) in row-major order.

    indices [tables, cap], counts [tables], specials [tables]: lists, their lengths and how many of
    their first blocks have hidden rows; tables is the number of query blocks (shared) or of items.
    keep [blocks * block_k]: 1.0 where a key is visible.
    order [ctas, steps], lengths [ctas]: work items of every CTA.
    patch [n, specials * block_k, D]: values of blocks with hidden rows, zeroed there;
    slots [blocks]: place of a block in the patch. None where hidden values are known to be finite.
    """

    q: Float[Array, "n T D"]
    k: Float[Array, "m S D"]
    v: Float[Array, "m S D"]
    keep: Float[Array, " X"]
    indices: Int[Array, "tables cap"]
    counts: Int[Array, " tables"]
    specials: Int[Array, " tables"]
    order: Int[Array, "ctas steps"]
    lengths: Int[Array, " ctas"]
    patch: Float[Array, "n P D"] | None = None
    slots: Int[Array, " blocks"] | None = None

    def arrays(self) -> dict[str, Array]:
        """The operands that are there, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def block_list_attention(
    inputs: BlockListInputs, config: BlockListConfig, softmax: mosaic.Softmax, heads: int
) -> tuple[Float[Array, "R T C"], Float[Array, "n T2"]]:
    """Token-major output and natural log-sum-exp (padded to whole query blocks); n = R * heads."""
    n, queries, head_dim = inputs.q.shape
    tiles = pl.cdiv(queries, config.block_q)
    operands = inputs.arrays()

    def block_list_kernel(*refs, **scratch_refs):
        gmem = dict(zip([*operands, "out", "lse"], refs, strict=True))
        shared = inputs.counts.shape[0] == tiles
        _BlockList(gmem, scratch_refs, config, softmax, heads, tiles, shared).run()

    buffers = scratch(config, head_dim, inputs.q.dtype)
    buffers["lse_smem"] = plgpu.SMEM((config.block_q,), jnp.float32)
    return mosaic.kernel(
        block_list_kernel,
        out_type=(
            jax.ShapeDtypeStruct((n // heads, queries, heads * head_dim), inputs.q.dtype),
            jax.ShapeDtypeStruct((n, tiles * config.block_q), jnp.float32),
        ),
        grid=(inputs.order.shape[0],),
        num_threads=config.consumers + 1,
        scratch_types=buffers,
        compiler_params=mosaic.compiler_params(),
    )(*operands.values())


class _BlockList(Pipeline):
    """Items are query blocks, stages are key blocks."""

    def __init__(self, gmem, scratch_refs, config, softmax, heads, tiles: int, shared: bool):
        super().__init__(gmem, scratch_refs, config, softmax, heads)
        self.tiles, self.shared = tiles, shared

    def item(self, number, first) -> Item:
        index = self.gmem["order"][self.cta, number]
        head, tile = lax.div(index, self.tiles), lax.rem(index, self.tiles)
        table = tile if self.shared else index
        item = Item(number, head, tile, table, jnp.maximum(self.gmem["counts"][table], 1), first)
        item.specials = self.gmem["specials"][table]
        return item

    def produce(self) -> None:
        plgpu.set_max_registers(self.config.producer_registers, action="decrease")

        def body(item: Item):
            plgpu.barrier_wait(self.q_empty.at[item.buffer])
            self.load_queries(item)
            pl.loop(0, item.stages)(lambda step: self._bring(item, step))

        self.for_items(body)

    def _bring(self, item: Item, step) -> None:
        block_k = self.config.block_k
        stage = self.stage(item, step)
        block = self.gmem["indices"][item.table, step]
        keys = pl.ds(block * block_k, block_k)
        plgpu.barrier_wait(self.k_empty.at[stage])
        plgpu.copy_gmem_to_smem(
            self.gmem["k"].at[item.head, keys], self.k_smem.at[stage], self.k_full.at[stage]
        )
        plgpu.barrier_wait(self.v_empty.at[stage])
        into = self.v_smem.at[stage], self.v_full.at[stage]

        def whole():
            plgpu.copy_gmem_to_smem(self.gmem["v"].at[item.head, keys], *into)

        if "patch" not in self.gmem:
            whole()
            return
        pl.when(step >= item.specials)(whole)

        @pl.when(step < item.specials)
        def _patched():
            place = pl.ds(self.gmem["slots"][block] * block_k, block_k)
            plgpu.copy_gmem_to_smem(self.gmem["patch"].at[item.head, place], *into)

    def hide(self, scores, item: Item, step, ahead):
        """Hidden keys of a special block; a list of length zero hides everything."""

        def masked():
            keys = self.gmem["indices"][item.table, step] * self.config.block_k
            keep = mosaic.load(
                self.gmem["keep"].at[pl.ds(keys, self.config.block_k)], mosaic.COLUMN
            )
            keep = keep * (self.gmem["counts"][item.table] > 0).astype(jnp.float32)
            return jnp.where(lax.broadcast_in_dim(keep, scores.shape, [1]) > 0, scores, -jnp.inf)

        return lax.cond(step < item.specials, masked, lambda: scores)
