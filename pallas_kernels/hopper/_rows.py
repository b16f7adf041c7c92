"""Lane-level code of the row gather: `cp.async` copies of single cache rows into swizzled tiles.

TMA on Hopper copies boxes and cannot follow a list of rows. A warpgroup copies with 16 bytes a
lane: a row of D elements takes D/8 lanes. Destinations follow the 128-byte swizzle that WGMMA
reads: 16-byte chunk c of row r lands at chunk c ^ (r % 8) of its 1024-byte tile of 8 rows and 64
columns.
"""

# Mosaic GPU's references are dynamic: pyright cannot follow their attributes and operators.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false, reportOperatorIssue=false

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector
from jaxtyping import Array, Int

_VOTE_BARRIER = 7
_SPLAT = plgpu.Layout.WG_SPLAT
_THREADS = 128


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _const(value: int, kind: ir.Type | None = None) -> ir.Value:
    return mgpu.utils.c(value, kind or _i32())


def _thread() -> ir.Value:
    thread = arith.index_cast(_i32(), gpu.thread_id(gpu.Dimension.x))
    return arith.remui(thread, _const(_THREADS))


def _offset(pointer: ir.Value, nbytes: ir.Value) -> ir.Value:
    return mgpu.utils.getelementptr(pointer, [nbytes], ir.IntegerType.get_signless(8))


def _to_i64(value: ir.Value) -> ir.Value:
    return arith.extsi(ir.IntegerType.get_signless(64), value)


def _asm(text: str, *args: ir.Value, constraints: str, result: ir.Type | None = None):
    return llvm.inline_asm(
        result or ir.Type.parse("!llvm.void"), list(args), text, constraints, has_side_effects=True
    )


@dataclass(frozen=True)
class RowGather:
    """Shapes of a gather of `keys` rows a stage; `granularity` rows per list entry.

    `hidden` are static [start, stop) ranges of rows whose keys do not count; they are filled with
    zeros instead of being read.
    """

    keys: int
    head_dim: int
    cache_rows: int
    granularity: int
    hidden: tuple[tuple[int, int], ...]

    @property
    def lanes(self) -> int:
        """Lanes that copy one row."""
        return self.head_dim // 8

    @property
    def passes(self) -> int:
        """Copies of one lane in a stage."""
        return self.keys * self.lanes // _THREADS

    def read_rows(self, lists, table, first, count) -> tuple[Int[Array, "128"], ...]:
        """Cache rows this thread copies in the stage that starts at list position `first`.

        Positions at and beyond `count` and hidden rows give -1.
        """
        layout = plgpu.Layout.WG_STRIDED((_THREADS,), vec_size=1)
        row = plgpu.ShapeDtypeStruct((_THREADS,), jnp.int32, layout)
        capacity = lists.shape[-1]

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), _SPLAT, _SPLAT, _SPLAT), return_type=(row,) * self.passes
        )
        def emit(_, lists, table, first, count):
            table, first, count = (x.registers.item() for x in (table, first, count))
            base = mgpu.utils.memref_ptr(lists)
            start = arith.muli(table, _const(capacity))
            lane_row = arith.divui(_thread(), _const(self.lanes))
            rows = []
            for number in range(self.passes):
                shift = arith.addi(lane_row, _const(number * _THREADS // self.lanes))
                rows.append(self._row(base, start, arith.addi(first, shift), count, capacity))
            return tuple(self._as_array(value) for value in rows)

        return emit(lists, table, first, count)

    def _row(self, base, start, position, count, capacity: int) -> ir.Value:
        entry = arith.divui(position, _const(self.granularity))
        last = arith.divui(arith.subi(count, _const(1)), _const(self.granularity))
        entry = arith.minsi(arith.minsi(entry, last), _const(capacity - 1))
        entry = arith.addi(start, entry)
        unit = llvm.load(_i32(), _offset(base, arith.muli(entry, _const(4))))
        within = arith.remui(position, _const(self.granularity))
        row = arith.addi(arith.muli(unit, _const(self.granularity)), within)
        bad = arith.cmpi(arith.CmpIPredicate.sge, position, count)
        for begin, end in self.hidden:
            distance = arith.subi(row, _const(begin))
            inside = arith.cmpi(arith.CmpIPredicate.ult, distance, _const(end - begin))
            bad = arith.ori(bad, inside)
        return arith.select(bad, _const(-1), row)

    def _as_array(self, value: ir.Value) -> mgpu.FragmentedArray:
        register = vector.broadcast(ir.VectorType.get((1,), _i32()), value)
        return mgpu.FragmentedArray(
            _registers=np.array([register], dtype=object),
            _layout=mgpu.WGStridedFragLayout((_THREADS,), 1),
            _is_signed=True,
        )

    def copy(self, cache, head, rows, buffer) -> None:
        """Start copying `rows` of one head into a [keys, D] buffer, as one `cp.async` group."""
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        layout = plgpu.Layout.WG_STRIDED((_THREADS,), vec_size=1)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.RefType(transforms), _SPLAT, *[layout] * self.passes)
        )
        def emit(_, cache, buffer, head, *rows):
            source = mgpu.utils.memref_ptr(cache)
            target = mgpu.utils.memref_ptr(buffer)
            target = llvm.ptrtoint(_i32(), target)
            base = arith.muli(head.registers.item(), _const(self.cache_rows))
            self._copies(source, target, base, [self._scalar(row) for row in rows])
            _asm("cp.async.commit_group;", constraints="")

        emit(cache, buffer, head, *rows)

    def _scalar(self, row: mgpu.FragmentedArray) -> ir.Value:
        return vector.extract(
            row.registers.item(), dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0])
        )

    def _copies(self, source, target, base, rows) -> None:
        thread = _thread()
        chunk = arith.remui(thread, _const(self.lanes))
        lane_row = arith.divui(thread, _const(self.lanes))
        row_in_tile = arith.remui(lane_row, _const(8))
        column_tile = arith.divui(chunk, _const(8))
        swizzled = arith.xori(arith.remui(chunk, _const(8)), row_in_tile)
        tile_row = arith.divui(lane_row, _const(8))
        tile = arith.addi(arith.muli(tile_row, _const(self.head_dim // 64)), column_tile)
        place = arith.muli(tile, _const(1024))
        place = arith.addi(place, arith.muli(row_in_tile, _const(128)))
        place = arith.addi(place, arith.muli(swizzled, _const(16)))
        target = arith.addi(target, place)
        source = _offset(source, _to_i64(arith.muli(chunk, _const(16))))
        row_bytes = self.head_dim * 2
        for number, row in enumerate(rows):
            seen = arith.cmpi(arith.CmpIPredicate.sge, row, _const(0))
            size = arith.select(seen, _const(16), _const(0))
            index = _to_i64(arith.addi(base, arith.maxsi(row, _const(0))))
            address = _offset(
                source, arith.muli(index, _const(row_bytes, ir.IntegerType.get_signless(64)))
            )
            _asm(
                "cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2;",
                arith.addi(target, _const(number * _THREADS // self.lanes * row_bytes)),
                address,
                size,
                constraints="r,l,r",
            )

    def publish(self, rows, buffer, stage) -> None:
        """Write a stage's rows (for masks) and whether any is hidden, before its barrier.

        The buffer holds the rows of all stages and then one flag per stage.
        """
        layout = plgpu.Layout.WG_STRIDED((_THREADS,), vec_size=1)
        stages = buffer.shape[0] // (self.keys + 1)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SPLAT, *[layout] * self.passes))
        def emit(_, buffer, stage, *rows):
            rows = [self._scalar(row) for row in rows]
            stage = stage.registers.item()
            base = llvm.ptrtoint(_i32(), mgpu.utils.memref_ptr(buffer))
            flag = arith.addi(arith.muli(stage, _const(4)), _const(stages * self.keys * 4))
            flag = arith.addi(base, flag)
            lane_row = arith.divui(_thread(), _const(self.lanes))
            lane_row = arith.addi(lane_row, arith.muli(stage, _const(self.keys)))
            target = arith.addi(base, arith.muli(lane_row, _const(4)))
            lowest = rows[0]
            for number, row in enumerate(rows):
                place = arith.addi(target, _const(number * _THREADS // self.lanes * 4))
                _asm("st.shared.b32 [$0], $1;", place, row, constraints="r,r")
                lowest = arith.minsi(lowest, row)
            bad = arith.select(
                arith.cmpi(arith.CmpIPredicate.slt, lowest, _const(0)), _const(1), _const(0)
            )
            any_bad = _asm(
                "{ .reg .pred p, q; setp.ne.b32 p, $1, 0;"
                f" barrier.cta.red.or.pred q, {_VOTE_BARRIER}, {_THREADS}, p;"
                " selp.b32 $0, 1, 0, q; }",
                bad,
                constraints="=r,r",
                result=_i32(),
            )
            _asm("st.shared.b32 [$0], $1;", flag, any_bad, constraints="r,r")

        emit(buffer, stage, *rows)


def wait_copies(pending: int) -> None:
    """Wait until at most `pending` copy groups are in flight; make the rest visible to WGMMA."""

    @plgpu.inline_mgpu()
    def emit(_):
        _asm(f"cp.async.wait_group {pending};", constraints="")
        _asm("fence.proxy.async.shared::cta;", constraints="")

    emit()
