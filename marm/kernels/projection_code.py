"""Code of the projection kernel: rows are standardised and projected while they are in cache.

Vectors hold neighbouring columns of the product. For a block of rows

    x[n, c] = (source[n, c] - mean over c) / deviation over c         per source, into the cache
    out[k // D, n, k % D] = offset[k] + sum over c of x[n, c] * weight[c, k]     in registers

Shape legend: N rows; C columns of all sources together; K = P*D columns of P products; n, c, k of
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from llvmlite import ir

from marm.kernels.native_code import NativeKernel, Registers
from marm.kernels.product_code import BLOCK_ROWS, WIDEST, ColumnTile, Place, Product, standardise
from marm.kernels.vector_code import VectorCode


@dataclass(frozen=True)
class ProjectionShape:
    """Columns of the sources, and of the products."""

    sources: tuple[int, ...]
    products: int
    columns: int  # of a product
    tile: ColumnTile

    @staticmethod
    def of(
        sources: tuple[int, ...], products: int, columns: int, registers: Registers
    ) -> ProjectionShape | None:
        """None where rows are too wide or widths don't come out even, which is left to others."""
        tile = ColumnTile.of(registers)
        whole = all(width % tile.lanes == 0 for width in sources)
        if not whole or columns % tile.columns or sum(sources) > WIDEST:
            return None
        return ProjectionShape(sources, products, columns, tile)


@cache
def compile_projection(shape: ProjectionShape) -> NativeKernel:
    """The kernel for some widths. A task is a block of rows.

    Arguments: N; rows of a block, at most `BLOCK_ROWS`; addresses of the weights, tile by tile as
    `Product` wants them, of the offsets ``[K]`` and of the products ``[P, room, D]``; the numbers
    from product to product; then for each source its address and the numbers from row to row.
    """
    arity = 6 + 2 * len(shape.sources)
    return NativeKernel(_Projection(shape).task, arity, shape.tile.lanes)


class _Projection:
    def __init__(self, shape: ProjectionShape) -> None:
        self._shape, self._width = shape, sum(shape.sources)
        self._product = Product(self._width, shape.products * shape.columns, shape.tile)

    def task(self, code: VectorCode, values: Sequence[ir.Value]) -> None:
        build, columns = code.build, self._shape.columns
        task, num_rows, at_once = values[:3]
        weights, offsets, out = (code.pointer(x) for x in values[3:6])
        apart, *sources = values[6:]
        first = build.mul(task, at_once)
        count = code.smaller(build.sub(num_rows, first), at_once)
        rows = self._standardised(code, sources, first, count)
        out = code.at(out, code.times(first, columns))

        def store(sums: ir.Value, place: Place) -> None:
            row, column = place
            of_product = code.times(build.sdiv(column, code.literal(columns)), apart)
            within = build.srem(column, code.literal(columns))
            product = code.at(out, build.add(of_product, within))
            code.store(sums, product, code.times(row, columns))

        block = (rows, self._width, count)
        self._product.emit(code, block, weights, lambda place: code.load(offsets, place[1]), store)

    def _standardised(
        self, code: VectorCode, sources: Sequence[ir.Value], first: ir.Value, count: ir.Value
    ) -> ir.Value:
        """Rows of a block with their sources side by side."""
        build = code.build
        rows, start = code.scratch(BLOCK_ROWS * self._width), 0
        for i, width in enumerate(self._shape.sources):
            address, stride = sources[2 * i : 2 * i + 2]
            source = code.pointer(address)
            with code.loop(code.literal(0), count, 1) as row:
                place = code.times(build.add(first, row.index), stride)
                into = code.at(rows, code.times(row.index, self._width))
                standardise(code, code.at(source, place), code.at(into, start), width)
            start += width
        return rows
