"""Attention calls of real models: operands, sparsity and the float32 truth on samples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from pallas_kernels import boxes_table, reference, shapes
from pallas_kernels.sparsity import density

GROUP = 192
COLUMNS = {10: 784, 11: 1344, 12: 2128}
LOGIT_BOUND = 100.0


@dataclass(frozen=True)
class Case:
    """One benchmarked call; `kind` is the last part of the case's name."""

    shape: shapes.AttentionShape
    kind: str

    @property
    def name(self) -> str:
        return f"{self.shape.name}/{self.kind}"

    @property
    def scale(self) -> int:
        """Index of the square grid the queries form; HART's last grid is one of the same size."""
        return int(self.shape.name.rsplit("scale", 1)[1]) if "scale" in self.shape.name else 12


def all_cases() -> list[Case]:
    """Every case the targets name, and the same of the other models and scales."""
    cases = []
    for name, shape in shapes.SHAPES.items():
        if name == "hart":
            cases += [Case(shape, "dense"), Case(shape, "blocks-64")]
            continue
        kinds = ["dense", "csla-blocks", "csla-boxes", "columns-8", "columns-1"]
        kinds += ["decision"] if name.endswith("scale10") else []
        cases += [Case(shape, kind) for kind in kinds]
    return cases


@functools.lru_cache(maxsize=2)
def operands(shape: shapes.AttentionShape, rows: int) -> tuple[jax.Array, ...]:
    """bfloat16 q, k, v of cosine attention, clustered; rows past the keys hold NaN."""
    cache_rows = shapes.round_up(shape.keys, 128)

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key, 6)
        centres = jax.random.normal(keys[0], (8, shape.head_dim))
        made = []
        for number, length in enumerate((shape.queries, cache_rows)):
            lead = (rows, shape.heads, length)
            noise = jax.random.normal(keys[1 + number], (*lead, shape.head_dim))
            own = centres[jax.random.randint(keys[3 + number], lead, 0, 8)]
            x = noise + 0.5 * own
            made.append(x / jnp.linalg.norm(x, axis=-1, keepdims=True))
        v = jax.random.normal(keys[5], (rows, shape.heads, cache_rows, shape.head_dim))
        hidden = jnp.arange(cache_rows)[:, None] >= shape.keys
        q, k = 18.0 * made[0], jnp.where(hidden, jnp.nan, made[1])
        return tuple(x.astype(jnp.bfloat16) for x in (q, k, jnp.where(hidden, jnp.nan, v)))

    return jax.jit(draw)(jax.random.key(shape.queries + rows))


@functools.lru_cache(maxsize=8)
def geometry(scale: int) -> tuple[pk.Geometry, tuple[int, ...], int]:
    """Packed square grids up to a scale, their CSLA windows and sinks."""
    grids = shapes.SQUARE_GRIDS[: scale + 1]
    return pk.Geometry.packed(grids), shapes.CSLA_WINDOWS[: scale + 1], shapes.CSLA_SINKS


@functools.lru_cache(maxsize=8)
def blocks(case: Case) -> pk.BlockTable:
    """CSLA's 128x128 mask; for HART a random table of 64-wide blocks at its published density."""
    if case.kind == "csla-blocks":
        return pk.csla_blocks(*geometry(case.scale))
    shape = case.shape
    rng = np.random.default_rng(0)
    mask = rng.random((shape.queries // 128, -(-shape.keys // 64))) < 0.142
    mask[:, 0] = True
    return pk.blocks_from_mask(mask, shape.keys, block_k=64)


@functools.lru_cache(maxsize=2)
def columns(case: Case, rows: int) -> np.ndarray:
    """Random distinct runs per (row, head, group), ascending: int32 [R, H, G, K]."""
    shape = case.shape
    granularity = int(case.kind.rsplit("-", 1)[1])
    runs, kept = -(-shape.keys // granularity), COLUMNS[case.scale] // granularity
    lead = (rows, shape.heads, -(-shape.queries // GROUP))
    rng = np.random.default_rng(0)
    chosen = np.argpartition(rng.random((*lead, runs), np.float32), kept, -1)[..., :kept]
    return np.sort(chosen, -1).astype(np.int32)


def kept_share(case: Case, rows: int) -> float:
    """Kept share of the (query, key) pairs: what `tflops_kept` counts."""
    if case.kind in ("csla-blocks", "blocks-64"):
        return density(blocks(case), case.shape.queries)
    if case.kind == "csla-boxes":
        table = boxes_table.tile_keys(*geometry(case.scale))
        return float(table.valid.sum(1).mean() / case.shape.keys)
    if case.kind.startswith("columns"):
        return COLUMNS[case.scale] / case.shape.keys
    return 1.0


def ours(case: Case, rows: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The library's call on q, k, v, and what else it takes."""
    keys = case.shape.keys
    bound: dict[str, Any] = dict(logit_bound=LOGIT_BOUND)
    if case.kind == "dense":
        return lambda q, k, v: pk.attention(q, k, v, keys, **bound), ()
    if case.kind in ("csla-blocks", "blocks-64"):
        table = blocks(case)
        return lambda q, k, v: pk.block_sparse_attention(q, k, v, table, **bound), ()
    if case.kind == "csla-boxes":
        where = geometry(case.scale)
        return lambda q, k, v: pk.window_attention(q, k, v, *where, exact=False, **bound), ()
    if case.kind == "decision":
        return functools.partial(_decision, keys=keys, bound=bound), ()
    granularity = int(case.kind.rsplit("-", 1)[1])
    lists = jnp.asarray(columns(case, rows))

    def gather(q, k, v, lists):
        return pk.column_sparse_attention(
            q, k, v, lists, lists.shape[-1], kv_length=keys, granularity=granularity, **bound
        )

    return gather, (lists,)


def _decision(q, k, v, *, keys: int, bound: dict[str, Any]):
    out, sums = pk.attention_column_sums(q, k, v, keys, GROUP, **bound)
    return out, pk.select_columns(sums, COLUMNS[10])


def sampled_truth(case: Case, rows: int) -> list[tuple[tuple[slice, slice], np.ndarray]]:
    """Float32 outputs of the first and the last (row, head), with their places."""
    q, k, v = operands(case.shape, rows)
    places = [(slice(0, 1), slice(0, 1)), (slice(rows - 1, rows), slice(-1, None))]
    found = []
    for place in places:
        out, _ = jax.jit(reference.masked_attention)(
            q[place], k[place], v[place], _mask(case, rows, place)
        )
        found.append((place, np.asarray(out)))
    return found


def _mask(case: Case, rows: int, place: tuple[slice, slice]) -> jax.Array:
    shape = case.shape
    cache_rows = shapes.round_up(shape.keys, 128)
    if case.kind in ("dense", "decision"):
        return (jnp.arange(cache_rows) < shape.keys)[None, None, None]
    if case.kind in ("csla-blocks", "blocks-64"):
        return reference.block_mask(blocks(case), shape.queries, cache_rows)[None, None]
    if case.kind == "csla-boxes":
        where = geometry(case.scale)
        table, index = boxes_table.tile_keys(*where), boxes_table.tile_queries(where[0], 8, 16)
        mask = np.zeros((shape.queries + 1, cache_rows), bool)
        for tile, seen, at in zip(index, table.valid, table.rows, strict=True):
            mask[np.ix_(tile, at[seen])] = True
        return jnp.asarray(mask[: shape.queries])[None, None]
    granularity = int(case.kind.rsplit("-", 1)[1])
    lists = jnp.asarray(columns(case, rows)[place])
    counts = jnp.full(lists.shape[:3], lists.shape[3])
    mask = reference.column_mask(lists, counts, granularity, cache_rows)
    mask = jnp.repeat(mask, GROUP, 2)[:, :, : shape.queries]
    return mask & (jnp.arange(cache_rows) < shape.keys)
