"""Code that kernels share: rows are standardised, and multiplied with a weight, while in cache.

Vectors hold neighbouring columns of a product. A weight lies tile by tile, ``[K / tile, C, tile]``:
a tile of columns is read from front to back for some rows at a time.

Shape legend: C columns of a row, K of a product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from llvmlite import ir

from marm.kernels.native_code import Registers
from marm.kernels.vector_code import F32, VectorCode

BLOCK_ROWS = 48
"""Rows of a task, at most."""

WIDEST = 2048
"""Numbers of a row, of all that a task keeps of it on its stack."""

EPSILON = 1e-5
"""That of torch's norms, unless they are told otherwise."""

_TOGETHER = (6, 2, 1)  # rows of a tile of sums: as many as fit, then the rest of a block
_UNROLLED = 4  # widths are multiples of the lanes

Place = tuple[ir.Value, ir.Value]
"""Row within the block, and column."""


def even_blocks(num_rows: int) -> tuple[int, int]:
    """How many tasks, and rows of each: if rows allow, torch's threads have equally many."""
    num_threads = torch.get_num_threads()
    rounds = -(-num_rows // (BLOCK_ROWS * num_threads))
    at_once = max(_TOGETHER[0], -(-num_rows // max(1, rounds * num_threads)))
    return -(-num_rows // at_once), at_once


@dataclass(frozen=True)
class ColumnTile:
    """Columns whose sums are in registers at a time."""

    lanes: int
    vectors: int

    @staticmethod
    def of(registers: Registers) -> ColumnTile:
        """So many that the sums of `_TOGETHER` rows fill the registers."""
        return ColumnTile(registers.lanes, 4 if registers.count >= 32 else 2)

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return self.lanes * self.vectors


@dataclass(frozen=True)
class Product:
    """A block of rows times a weight, a tile of sums in registers at a time."""

    width: int  # C
    columns: int  # K
    tile: ColumnTile

    def emit(
        self,
        code: VectorCode,
        rows: tuple[ir.Value, ir.Value | int, ir.Value],
        weight: ir.Value,
        begin: Callable[[Place], ir.Value],
        end: Callable[[ir.Value, Place], None],
    ) -> None:
        """Write the code.

        Args:
            code: where to.
            rows: address of the block, numbers from row to row, how many rows.
            weight: address, see above.
            begin: the vector that the sums at a place begin with.
            end: does what is to be done with the sums at a place.
        """
        build, count, step = code.build, rows[2], self.tile.columns
        with code.loop(code.literal(0), code.literal(self.columns), step) as column:
            of_tile = code.at(weight, code.times(column.index, self.width))
            first = code.literal(0)
            for together in _TOGETHER:
                groups = build.sdiv(build.sub(count, first), code.literal(together))
                stop = build.add(first, code.times(groups, together))
                with code.loop(first, stop, together) as row:
                    self._sums(code, rows, of_tile, (row.index, column.index), together, begin, end)
                first = stop

    def _sums(
        self,
        code: VectorCode,
        rows: tuple[ir.Value, ir.Value | int, ir.Value],
        weight: ir.Value,
        first: Place,
        together: int,
        begin: Callable[[Place], ir.Value],
        end: Callable[[ir.Value, Place], None],
    ) -> None:
        build, vectors = code.build, range(self.tile.vectors)
        each = [build.add(first[0], code.literal(r)) for r in range(together)]
        x = [code.at(rows[0], code.times(row, rows[1])) for row in each]
        places = [
            (row, build.add(first[1], code.literal(code.lanes * j)))
            for row in each
            for j in vectors
        ]
        start = [begin(place) for place in places]
        with code.loop(code.literal(0), code.literal(self.width), _UNROLLED, start) as loop:
            sums = list(loop.carried)
            for step in range(_UNROLLED):
                c = build.add(loop.index, code.literal(step))
                of_c = code.at(weight, code.times(c, self.tile.columns))
                w = [code.load(of_c, code.lanes * j) for j in vectors]
                for r in range(together):
                    number = code.spread(x[r], c)
                    for j in vectors:
                        i = r * len(vectors) + j
                        sums[i] = code.multiply_add(number, w[j], sums[i])
            loop.next = sums
        for vector, place in zip(loop.carried, places, strict=True):
            end(vector, place)


def standardise(code: VectorCode, source: ir.Value, into: ir.Value, width: int) -> None:
    """One row with mean 0 and variance 1, as `nn.LayerNorm` without weights has it."""
    build = code.build
    places = range(0, width, code.lanes)
    x = [code.load(source, place) for place in places]
    share = ir.Constant(F32, 1.0 / width)
    mean = code.spread_number(build.fmul(code.total(x), share))
    rest = [build.fsub(vector, mean) for vector in x]
    variance = build.fmul(code.total([build.fmul(y, y) for y in rest]), share)
    root = build.module.declare_intrinsic("llvm.sqrt", [F32])
    deviation = build.call(root, [build.fadd(variance, ir.Constant(F32, EPSILON))])
    scale = code.spread_number(build.fdiv(ir.Constant(F32, 1.0), deviation))
    for y, place in zip(rest, places, strict=True):
        code.store(build.fmul(y, scale), into, place)
