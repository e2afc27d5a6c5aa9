"""Code of the kernel that ends a layer: all its small products, while a block is in cache.

For a block of candidates, one after the other, into the cache

    y = x + context Wo + bo
    h = gelu(standardised(y) Ww + bw)        weight and bias of the norm are part of Ww and bw
    out = y + h Wn + bn

Shape legend: M candidates; D columns of x, context, y and out; W of h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from llvmlite import ir

from marm.kernels.native_code import NativeKernel, Registers
from marm.kernels.product_code import BLOCK_ROWS, WIDEST, ColumnTile, Place, Product, standardise
from marm.kernels.vector_code import LOG2_E, VectorCode

_ERFC_STEP = 0.3275911
_ERFC = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
"""Abramowitz and Stegun 7.1.26: ``erfc(z) = t (a1 + t (a2 + ..)) exp(-z^2)``, within 1.5e-7 for z
from 0 on, with ``t = 1 / (1 + step z)``."""


@dataclass(frozen=True)
class LayerEndShape:
    """Widths of a layer's output, and of its hidden units."""

    dim: int
    hidden: int
    tile: ColumnTile

    @staticmethod
    def of(dim: int, hidden: int, registers: Registers) -> LayerEndShape | None:
        """None where a block is too wide or widths don't come out even, left to others."""
        tile = ColumnTile.of(registers)
        is_even = dim % tile.columns == 0 and hidden % tile.columns == 0
        if not is_even or 2 * dim + hidden > WIDEST:
            return None
        return LayerEndShape(dim, hidden, tile)


@cache
def compile_layer_end(shape: LayerEndShape) -> NativeKernel:
    """The kernel for some widths. A task is a block of candidates.

    Arguments: M; candidates of a block, at most `BLOCK_ROWS`; addresses of x, context and out, each
    with the numbers from row to row; of Wo, Ww and Wn, tile by tile as `Product` wants them, and of
    bo, bw and bn.
    """
    return NativeKernel(_LayerEnd(shape).task, arity=14, lanes=shape.tile.lanes)


class _LayerEnd:
    def __init__(self, shape: LayerEndShape) -> None:
        self._dim, self._hidden = shape.dim, shape.hidden
        self._output = Product(shape.dim, shape.dim, shape.tile)
        self._wide = Product(shape.dim, shape.hidden, shape.tile)
        self._narrow = Product(shape.hidden, shape.dim, shape.tile)

    def task(self, code: VectorCode, values: Sequence[ir.Value]) -> None:
        build, dim, hidden = code.build, self._dim, self._hidden
        task, num_rows, at_once = values[:3]
        first = build.mul(task, at_once)
        count = code.smaller(build.sub(num_rows, first), at_once)
        x, context, out = (
            (code.at(code.pointer(address), build.mul(first, stride)), stride)
            for address, stride in zip(values[3:9:2], values[4:9:2], strict=True)
        )
        weights = [code.pointer(address) for address in values[9:12]]
        biases = [code.pointer(address) for address in values[12:15]]
        y, normed = (code.scratch(BLOCK_ROWS * dim) for _ in range(2))
        h = code.scratch(BLOCK_ROWS * hidden)

        def with_context(place: Place) -> ir.Value:
            return build.fadd(_load(code, x, place), code.load(biases[0], place[1]))

        def with_hidden(place: Place) -> ir.Value:
            return build.fadd(_load(code, (y, dim), place), code.load(biases[2], place[1]))

        self._output.emit(
            code,
            (*context, count),
            weights[0],
            with_context,
            lambda sums, place: _store(code, sums, (y, dim), place),
        )
        with code.loop(code.literal(0), count, 1) as row:
            start = code.times(row.index, dim)
            standardise(code, code.at(y, start), code.at(normed, start), dim)
        self._wide.emit(
            code,
            (normed, dim, count),
            weights[1],
            lambda place: code.load(biases[1], place[1]),
            lambda sums, place: _store(code, sums, (h, hidden), place),
        )
        # In a loop of its own: unrolled with the sums it would be most of the code.
        with code.loop(code.literal(0), code.times(count, hidden), code.lanes) as loop:
            code.store(_gelu(code, code.load(h, loop.index)), h, loop.index)
        self._narrow.emit(
            code,
            (h, hidden, count),
            weights[2],
            with_hidden,
            lambda sums, place: _store(code, sums, out, place),
        )


def _gelu(code: VectorCode, x: ir.Value) -> ir.Value:
    """``x Phi(x)``, as ``max(x, 0) - |x| erfc(|x| / sqrt 2) / 2``; NaN stays NaN."""
    build = code.build
    size = code.larger(x, build.fneg(x))
    steps = code.multiply_add(size, code.splat(_ERFC_STEP * 0.5**0.5), code.splat(1.0))
    t = build.fdiv(code.splat(1.0), steps)
    erfc = code.splat(_ERFC[-1])
    for coefficient in _ERFC[-2::-1]:
        erfc = code.multiply_add(erfc, t, code.splat(coefficient))
    half_square = build.fmul(build.fmul(x, x), code.splat(-0.5 * LOG2_E))
    erfc = build.fmul(build.fmul(erfc, t), code.exp2(half_square))
    half = build.fmul(build.fmul(size, code.splat(-0.5)), erfc)
    return build.fadd(code.larger(code.splat(0.0), x), half)


def _load(code: VectorCode, array: tuple[ir.Value, ir.Value | int], place: Place) -> ir.Value:
    return code.load(code.at(array[0], code.times(place[0], array[1])), place[1])


def _store(
    code: VectorCode, vector: ir.Value, array: tuple[ir.Value, ir.Value | int], place: Place
) -> None:
    code.store(vector, code.at(array[0], code.times(place[0], array[1])), place[1])
