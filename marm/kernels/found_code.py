"""Code of the kernel for attention to found rows: nothing is gathered, rows are read in place.

Vectors hold neighbouring columns of a row. For a candidate, with its query in registers,

    logit[h, k] = bias[row k, h] + sum over the columns of head h of q * key of row k
    weight = 2 ** (logit - largest), the null key's logit among them
    out = sum over k of weight * value of row k, divided by the sum of weights

Shape legend: M candidates, K found rows of each, N rows, H heads, E head width, D = H*E.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from llvmlite import ir

from marm.kernels.native_code import NativeKernel, Registers
from marm.kernels.vector_code import I8, I64, VectorCode

TASK_CANDIDATES = 8


@dataclass(frozen=True)
class FoundShape:
    """Heads, and vectors of each."""

    num_heads: int
    head_vectors: int
    lanes: int

    @staticmethod
    def of(num_heads: int, head_width: int, registers: Registers) -> FoundShape | None:
        """None where a row doesn't fill half of the registers or less, in whole vectors a head."""
        vectors, rest = divmod(head_width, registers.lanes)
        if rest or num_heads * vectors > registers.count // 2:
            return None
        return FoundShape(num_heads, vectors, registers.lanes)

    @property
    def dim(self) -> int:
        """Width of a row, D."""
        return self.num_heads * self.head_vectors * self.lanes

    def padded(self, num_found: int) -> int:
        """Length of a head's logits: those of the found rows and the null key, whole vectors."""
        return (num_found // self.lanes + 1) * self.lanes


@cache
def compile_found(shape: FoundShape) -> NativeKernel:
    """The kernel for some heads. A task is `TASK_CANDIDATES` candidates.

    Arguments: addresses of queries ``[M, D]``, keys and values ``[N, D]``, biases ``[N, H]`` and
    null logits ``[H]``, all logits in units of log2; of the positions ``[M, K]`` (64 bits) and
    whether each is one (8 bits), of scratch ``[M, H, padded K]`` and of the output ``[M, D]``; then
    M, K and padded K.
    """
    return NativeKernel(_Found(shape).task, 12, shape.lanes)


class _Found:
    def __init__(self, shape: FoundShape) -> None:
        self._shape = shape
        self._vectors = shape.num_heads * shape.head_vectors
        self._dim = shape.dim

    def task(self, code: VectorCode, values: Sequence[ir.Value]) -> None:
        build, num_heads = code.build, self._shape.num_heads
        queries, keys, weighted, bias, null = (code.pointer(x) for x in values[1:6])
        position = build.inttoptr(values[6], I64.as_pointer())
        valid = build.inttoptr(values[7], I8.as_pointer())
        scratch, out = (code.pointer(x) for x in values[8:10])
        num_candidates, num_found, padded = values[10:13]
        first = code.times(values[0], TASK_CANDIDATES)
        end = code.smaller(build.add(first, code.literal(TASK_CANDIDATES)), num_candidates)
        with code.loop(first, end, 1) as candidate:
            m = candidate.index
            of_m = code.times(m, num_found)
            found = (code.at(position, of_m), code.at(valid, of_m), num_found)
            logits = code.at(scratch, code.times(m, code.times(padded, num_heads)))
            self._fill(code, logits, null, num_found, padded)
            self._logits(
                code,
                code.at(queries, code.times(m, self._dim)),
                (keys, bias),
                found,
                (logits, padded),
            )
            sums = [
                _softmax(code, code.at(logits, code.times(padded, h)), padded)
                for h in range(num_heads)
            ]
            self._mix(
                code,
                code.at(out, code.times(m, self._dim)),
                weighted,
                found,
                (logits, padded, sums),
            )

    def _fill(
        self,
        code: VectorCode,
        logits: ir.Value,
        null: ir.Value,
        num_found: ir.Value,
        padded: ir.Value,
    ) -> None:
        """No row anywhere, and the null key behind the found rows."""
        size = code.times(padded, self._shape.num_heads)
        with code.loop(code.literal(0), size, code.lanes) as loop:
            code.store(code.splat(float("-inf")), logits, loop.index)
        for h in range(self._shape.num_heads):
            number = code.build.load(code.at(null, h))
            place = code.build.add(code.times(padded, h), num_found)
            code.build.store(number, code.at(logits, place))

    def _logits(
        self,
        code: VectorCode,
        query: ir.Value,
        rows: tuple[ir.Value, ir.Value],
        found: tuple[ir.Value, ir.Value, ir.Value],
        into: tuple[ir.Value, ir.Value],
    ) -> None:
        (keys, bias), (position, valid, num_found), (logits, padded) = rows, found, into
        build, shape = code.build, self._shape
        q = [code.load(query, code.lanes * i) for i in range(self._vectors)]
        with code.loop(code.literal(0), num_found, 1) as loop:
            is_row = build.trunc(build.load(code.at(valid, loop.index)), ir.IntType(1))
            with build.if_then(is_row):
                row = build.load(code.at(position, loop.index))
                key = code.at(keys, code.times(row, self._dim))
                of_row = code.at(bias, code.times(row, shape.num_heads))
                for h in range(shape.num_heads):
                    own = range(h * shape.head_vectors, (h + 1) * shape.head_vectors)
                    product = code.splat(0.0)
                    for i in own:
                        product = code.multiply_add(q[i], code.load(key, code.lanes * i), product)
                    logit = build.fadd(code.total([product]), build.load(code.at(of_row, h)))
                    place = build.add(code.times(padded, h), loop.index)
                    build.store(logit, code.at(logits, place))

    def _mix(
        self,
        code: VectorCode,
        out: ir.Value,
        weighted: ir.Value,
        found: tuple[ir.Value, ir.Value, ir.Value],
        weights: tuple[ir.Value, ir.Value, list[ir.Value]],
    ) -> None:
        (position, _, num_found), (logits, padded, sums) = found, weights
        build, shape = code.build, self._shape
        with code.loop(code.literal(0), num_found, 1, [code.splat(0.0)] * self._vectors) as loop:
            row = build.load(code.at(position, loop.index))
            value = code.at(weighted, code.times(row, self._dim))
            for i in range(self._vectors):
                place = code.times(padded, i // shape.head_vectors)
                weight = code.spread(logits, build.add(place, loop.index))
                of_row = code.load(value, code.lanes * i)
                loop.next.append(code.multiply_add(weight, of_row, loop.carried[i]))
        for i in range(self._vectors):
            total = code.spread_number(sums[i // shape.head_vectors])
            code.store(build.fdiv(loop.carried[i], total), out, code.lanes * i)


def _softmax(code: VectorCode, logits: ir.Value, length: ir.Value) -> ir.Value:
    """Logits become weights with a largest one of 1; their sum."""
    with code.loop(code.literal(0), length, code.lanes, [code.splat(float("-inf"))]) as loop:
        loop.next.append(code.larger(loop.carried[0], code.load(logits, loop.index)))
    largest = code.spread_number(code.largest(loop.carried[0]))
    with code.loop(code.literal(0), length, code.lanes, [code.splat(0.0)]) as loop:
        weight = code.exp2(code.build.fsub(code.load(logits, loop.index), largest))
        code.store(weight, logits, loop.index)
        loop.next.append(code.build.fadd(loop.carried[0], weight))
    return code.total([loop.carried[0]])
