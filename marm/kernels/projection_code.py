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
from marm.kernels.vector_code import F32, VectorCode

BLOCK_ROWS = 48

_WIDEST = 2048  # a block of rows lies on the stack
_ROWS = 6  # of a tile of sums
_EPSILON = 1e-5  # that of torch's norms, unless they are told otherwise


@dataclass(frozen=True)
class ProjectionShape:
    """Columns of the sources, and of the products."""

    sources: tuple[int, ...]
    products: int
    columns: int  # of a product
    lanes: int
    vectors: int  # of a tile of columns

    @staticmethod
    def of(
        sources: tuple[int, ...], products: int, columns: int, registers: Registers
    ) -> ProjectionShape | None:
        """None where rows are too wide or widths don't come out even, which is left to others."""
        vectors = 4 if registers.count >= 32 else 2
        lanes = registers.lanes
        whole = all(width % lanes == 0 for width in sources)
        if not whole or columns % (lanes * vectors) or sum(sources) > _WIDEST:
            return None
        return ProjectionShape(sources, products, columns, lanes, vectors)

    @property
    def tile(self) -> int:
        """Columns of a tile."""
        return self.lanes * self.vectors


@cache
def compile_projection(shape: ProjectionShape) -> NativeKernel:
    """The kernel for some widths. A task is a block of `BLOCK_ROWS` rows.

    Arguments: addresses of the weights, ``[K / tile, C, tile]``, of the offsets ``[K]`` and of the
    products ``[P, room, D]``; N; the numbers from product to product; then for each source its
    address and the numbers from row to row.
    """
    arity = 5 + 2 * len(shape.sources)
    return NativeKernel(_Projection(shape).task, arity, shape.lanes)


class _Projection:
    def __init__(self, shape: ProjectionShape) -> None:
        self._shape, self._width = shape, sum(shape.sources)

    def task(self, code: VectorCode, values: Sequence[ir.Value]) -> None:
        build, shape = code.build, self._shape
        task, *addresses = values[:4]
        weights, offsets, out = (build.inttoptr(x, F32.as_pointer()) for x in addresses)
        num_rows, apart, *sources = values[4:]
        first = code.times(task, BLOCK_ROWS)
        count = code.smaller(build.sub(num_rows, first), code.literal(BLOCK_ROWS))
        rows = code.scratch(BLOCK_ROWS * self._width)
        start = 0
        for i, width in enumerate(shape.sources):
            address, stride = sources[2 * i : 2 * i + 2]
            source = build.inttoptr(address, F32.as_pointer())
            with code.loop(code.literal(0), count, 1) as row:
                place = code.times(build.add(first, row.index), stride)
                into = code.at(rows, code.times(row.index, self._width))
                _standardise(code, code.at(source, place), code.at(into, start), width)
            start += width
        out = code.at(out, code.times(first, shape.columns))
        with code.loop(
            code.literal(0), code.literal(shape.products * shape.columns), shape.tile
        ) as tile:
            weight = code.at(weights, code.times(tile.index, self._width))
            offset = code.at(offsets, tile.index)
            of_product = build.sdiv(tile.index, code.literal(shape.columns))
            product = code.at(out, code.times(of_product, apart))
            of_tile = code.at(product, build.srem(tile.index, code.literal(shape.columns)))
            whole = code.times(build.sdiv(count, code.literal(_ROWS)), _ROWS)
            for begin, end, together in ((code.literal(0), whole, _ROWS), (whole, count, 1)):
                with code.loop(begin, end, together) as row:
                    self._project(
                        code,
                        code.at(rows, code.times(row.index, self._width)),
                        (weight, offset),
                        code.at(of_tile, code.times(row.index, shape.columns)),
                        together,
                    )

    def _project(
        self,
        code: VectorCode,
        rows: ir.Value,
        parameters: tuple[ir.Value, ir.Value],
        out: ir.Value,
        together: int,
    ) -> None:
        weight, offset = parameters
        vectors = range(self._shape.vectors)
        start = [code.load(offset, code.lanes * j) for _ in range(together) for j in vectors]
        unrolled = 4  # widths are multiples of the lanes
        with code.loop(code.literal(0), code.literal(self._width), unrolled, start) as loop:
            sums = list(loop.carried)
            for step in range(unrolled):
                c = code.build.add(loop.index, code.literal(step))
                of_c = code.at(weight, code.times(c, self._shape.tile))
                w = [code.load(of_c, code.lanes * j) for j in vectors]
                for r in range(together):
                    x = code.spread(code.at(rows, r * self._width), c)
                    for j in vectors:
                        i = r * len(vectors) + j
                        sums[i] = code.multiply_add(x, w[j], sums[i])
            loop.next = sums
        for r in range(together):
            for j in vectors:
                place = r * self._shape.columns + code.lanes * j
                code.store(loop.carried[r * len(vectors) + j], out, place)


def _standardise(code: VectorCode, source: ir.Value, into: ir.Value, width: int) -> None:
    """One row with mean 0 and variance 1, as `nn.LayerNorm` without weights has it."""
    build = code.build
    places = range(0, width, code.lanes)
    x = [code.load(source, place) for place in places]
    share = ir.Constant(F32, 1.0 / width)
    mean = code.spread_number(build.fmul(code.total(x), share))
    rest = [build.fsub(vector, mean) for vector in x]
    variance = build.fmul(code.total([build.fmul(y, y) for y in rest]), share)
    root = build.module.declare_intrinsic("llvm.sqrt", [F32])
    deviation = build.call(root, [build.fadd(variance, ir.Constant(F32, _EPSILON))])
    scale = code.spread_number(build.fdiv(ir.Constant(F32, 1.0), deviation))
    for y, place in zip(rest, places, strict=True):
        code.store(build.fmul(y, scale), into, place)
