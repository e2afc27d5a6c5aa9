"""Code that finds the highest numbers of a row: a threshold by bisection, then who passes it.

Floats are ordered as their bits are, read as whole numbers and those of negative ones turned round.
Halving the whole numbers between the least and the greatest float takes 32 steps at most, whatever
the floats are. Only the threshold is translated. NaN passes every threshold.

Shape legend: M rows of N numbers, the K highest of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from llvmlite import ir

from marm.kernels.native_code import NativeKernel
from marm.kernels.vector_code import F32, I32, I64, Loop, VectorCode

TASK_ROWS = 8

_ALL_BUT_SIGN = 0x7FFFFFFF


@cache
def compile_highest(lanes: int) -> NativeKernel:
    """The kernel. A task is `TASK_ROWS` rows.

    Arguments: addresses of the numbers ``[M, N]`` and of the positions ``[M, K]`` (64 bits); M; N,
    not less than the lanes; K, not above N.
    """
    return NativeKernel(_task, 5, lanes)


def _task(code: VectorCode, values: Sequence[ir.Value]) -> None:
    build = code.build
    numbers = code.pointer(values[1])
    positions = build.inttoptr(values[2], I64.as_pointer())
    num_rows, length, wanted = values[3:]
    first = code.times(values[0], TASK_ROWS)
    end = code.smaller(build.add(first, code.literal(TASK_ROWS)), num_rows)
    with code.loop(first, end, 1) as row:
        of_row = _Row(code, code.at(numbers, code.times(row.index, length)), length)
        threshold = code.spread_number(_threshold(code, of_row, wanted))
        into = code.at(positions, code.times(row.index, wanted))
        above = of_row.collect(">", threshold, into, code.literal(0), wanted)
        of_row.collect("==", threshold, into, above, wanted)


class _Row:
    """The numbers of a row, a vector at a time."""

    def __init__(self, code: VectorCode, numbers: ir.Value, length: ir.Value) -> None:
        self._code, self._numbers, self._length = code, numbers, length

    def bounds(self) -> tuple[ir.Value, ir.Value]:
        """The least number and the greatest, NaN aside."""
        code = self._code
        start = [code.splat(float("inf")), code.splat(float("-inf"))]
        with self._vectors(start) as (loop, place, _):
            x = code.load(self._numbers, place)
            least, greatest = loop.carried
            loop.next += [code.lesser(least, x), code.larger(greatest, x)]
        return code.least(loop.carried[0]), code.largest(loop.carried[1])

    def count(self, threshold: ir.Value) -> ir.Value:
        """How many numbers are not below a threshold."""
        build = self._code.build
        with self._vectors([self._code.literal(0)]) as (loop, place, seen):
            bits = self._passing(">=", threshold, place, seen)
            loop.next.append(build.add(loop.carried[0], build.ctpop(bits)))
        return loop.carried[0]

    def collect(
        self, relation: str, threshold: ir.Value, into: ir.Value, found: ir.Value, wanted: ir.Value
    ) -> ir.Value:
        """Write down who passes until enough are found; how many that are."""
        code, build = self._code, self._code.build
        with self._vectors([found]) as (loop, place, seen):
            bits = self._passing(relation, threshold, place, seen)
            before = loop.carried[0]
            more = code.smaller(build.ctpop(bits), build.sub(wanted, before))
            with code.loop(code.literal(0), more, 1, [bits]) as each:
                rest = each.carried[0]
                position = build.add(place, build.cttz(rest, ir.Constant(ir.IntType(1), 1)))
                build.store(position, code.at(into, build.add(before, each.index)))
                each.next.append(build.and_(rest, build.sub(rest, code.literal(1))))
            loop.next.append(build.add(before, more))
        return loop.carried[0]

    def _passing(
        self, relation: str, threshold: ir.Value, place: ir.Value, seen: ir.Value
    ) -> ir.Value:
        code, build = self._code, self._code.build
        x = code.load(self._numbers, place)
        compare = build.fcmp_ordered if relation == "==" else build.fcmp_unordered
        bits = code.mask(compare(relation, x, threshold))
        return build.shl(build.lshr(bits, seen), seen)

    @contextmanager
    def _vectors(self, start: list[ir.Value]) -> Iterator[tuple[Loop, ir.Value, ir.Value]]:
        """A loop, with the place of a vector and how many of its numbers were seen before: the last
        vector ends with the row and overlaps its neighbour."""
        code, build = self._code, self._code.build
        last = build.sub(self._length, code.literal(code.lanes))
        with code.loop(code.literal(0), self._length, code.lanes, start) as loop:
            place = code.smaller(loop.index, last)
            yield loop, place, build.sub(loop.index, place)


def _threshold(code: VectorCode, row: _Row, wanted: ir.Value) -> ir.Value:
    """The greatest float that as many numbers as wanted are not below, or one with as many."""
    build = code.build
    least, greatest = row.bounds()
    before, low = build.block, _order(code, least)
    high = build.add(_order(code, greatest), code.literal(1))
    step, halve, after = (build.append_basic_block() for _ in range(3))
    build.branch(step)
    build.position_at_end(step)
    reached, missed = build.phi(I64), build.phi(I64)
    reached.add_incoming(low, before)
    missed.add_incoming(high, before)
    gap = build.sub(missed, reached)
    build.cbranch(build.icmp_signed(">", gap, code.literal(1)), halve, after)
    build.position_at_end(halve)
    middle = build.add(reached, build.ashr(gap, code.literal(1)))
    passing = row.count(code.spread_number(_float(code, middle)))
    enough = build.icmp_signed(">=", passing, wanted)
    just = build.icmp_signed("==", passing, wanted)
    next_reached = build.select(enough, middle, reached)
    end = build.select(
        just, build.add(middle, code.literal(1)), build.select(enough, missed, middle)
    )
    reached.add_incoming(next_reached, build.block)
    missed.add_incoming(end, build.block)
    build.branch(step)
    build.position_at_end(after)
    return _float(code, reached)


def _order(code: VectorCode, number: ir.Value) -> ir.Value:
    """A whole number that is ordered as floats are."""
    bits = code.build.bitcast(number, I32)
    return code.build.sext(_turned(code, bits), I64)


def _float(code: VectorCode, order: ir.Value) -> ir.Value:
    return code.build.bitcast(_turned(code, code.build.trunc(order, I32)), F32)


def _turned(code: VectorCode, bits: ir.Value) -> ir.Value:
    negative = code.build.ashr(bits, ir.Constant(I32, 31))
    return code.build.xor(bits, code.build.and_(negative, ir.Constant(I32, _ALL_BUT_SIGN)))
