"""Code of the attention kernel: one pass over the keys, weights in the first-level cache.

Vectors hold neighbouring candidates, so keys and values are read where the projection left them:
row by row, one number at a time, spread over a vector. Queries are turned into such vectors first.
For a block of rows and a tile of candidates

    w[n, m] = 2 ** (bias[n] + sum over e of k[n, e] * q[e, m])        in registers, then stored
    sums[m] += sum over n of w[n, m]
    mixed[e, m] += sum over n of v[n, e] * w[n, m]

and at the end ``out[m, e] = mixed[e, m] / sums[m]``. Powers of two, as the base of the logarithm
costs one product with queries and biases instead of one with every weight. The bias of the last row
is subtracted from all.

Shape legend: M candidates, padded to whole tiles; N rows; E head width; m, n, e of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from llvmlite import ir

from marm.kernels.native_code import NativeKernel, Registers
from marm.kernels.vector_code import F32, LOG2_E, VectorCode

_BLOCK_ROWS = 96  # weights of a block and a tile take 24 KiB, queries of a tile 8
_LINE = 16  # numbers of a line of the cache


@dataclass(frozen=True)
class Tiling:
    """How the sums of a product are spread over the registers."""

    lanes: int
    vectors: int  # of a tile of candidates
    rows: int  # that a tile's logits are formed of at a time
    columns: int  # of the values, weighted at a time

    @staticmethod
    def of(registers: Registers) -> Tiling:
        """24 sums in flight where they fit, with the operands beside them."""
        if registers.count >= 32:
            return Tiling(registers.lanes, vectors=4, rows=6, columns=4)
        return Tiling(registers.lanes, vectors=2, rows=6, columns=4)

    @property
    def candidates(self) -> int:
        """Candidates of a tile."""
        return self.lanes * self.vectors


@cache
def compile_attention(head_width: int, tiling: Tiling) -> NativeKernel:
    """The kernel for heads of ``head_width``. A task is some tiles of one head.

    Arguments, after the number of tasks, with T tiles of t candidates:

    - addresses: queries ``[H, M, E]``, keys and values ``[H, N, E]``, biases ``[H, N]``, outputs
      ``[M, H, E]``; sums of weights ``[H, T, t]``, those of nobody among them; scratch memory
      ``[H, 2, T, E, t]``;
    - M, N, T, tiles of a task, tasks of a head;
    - strides: from head to head and from candidate to candidate of the queries, from head to head
      and from row to row of keys and of values, from head to head of the biases, and from candidate
      to candidate of the outputs.
    """
    emitter = _Attention(head_width, tiling)
    return NativeKernel(emitter.task, arity=18, lanes=tiling.lanes)


class _Attention:
    def __init__(self, head_width: int, tiling: Tiling) -> None:
        self._width, self._tiling = head_width, tiling
        self._tile = tiling.candidates

    def task(self, code: VectorCode, values: Sequence[ir.Value]) -> None:
        build, tile, width = code.build, self._tile, self._width
        task, *addresses = values[:8]
        num_candidates, num_rows, num_tiles, at_once, per_head = values[8:13]
        query_head, query_row, head_stride, self._stride, bias_head, out_row = values[13:]
        queries, keys, weighted, bias, out, sums, scratch = (
            code.pointer(address) for address in addresses
        )
        head = build.sdiv(task, per_head)
        first = code.times(build.srem(task, per_head), at_once)
        end = code.smaller(build.add(first, at_once), num_tiles)
        before = code.times(head, num_tiles)
        tiled = code.at(scratch, code.times(before, 2 * tile * width))
        mixed = code.at(tiled, code.times(num_tiles, tile * width))
        sums = code.at(sums, code.times(before, tile))
        queries = code.at(queries, code.times(head, query_head))
        keys, weighted = (code.at(x, code.times(head, head_stride)) for x in (keys, weighted))
        bias = code.at(bias, code.times(head, bias_head))
        out = code.at(out, code.times(head, width))
        self._clear(code, sums, first, end, tile)
        for array in (tiled, mixed):
            self._clear(code, array, first, end, tile * width)
        asked = _Candidates(first, end, num_candidates, tile, width)
        asked.into_tiles(code, (queries, query_row), tiled)
        null = build.load(code.at(bias, build.sub(num_rows, code.literal(1))))
        weights = code.scratch(_BLOCK_ROWS * tile)
        with code.loop(code.literal(0), num_rows, _BLOCK_ROWS) as block:
            count = code.smaller(build.sub(num_rows, block.index), code.literal(_BLOCK_ROWS))
            offset = code.times(block.index, self._stride)
            of_block = [code.at(keys, offset), code.at(weighted, offset)]
            with code.loop(first, end, 1) as part:
                wide = code.times(part.index, tile * width)
                self._weights(
                    code,
                    (of_block[0], code.at(bias, block.index), null, count),
                    code.at(tiled, wide),
                    code.at(sums, code.times(part.index, tile)),
                    weights,
                )
                self._mix(code, of_block[1], count, code.at(mixed, wide), weights)
        asked.out_of_tiles(code, mixed, sums, (out, out_row))

    def _clear(
        self, code: VectorCode, array: ir.Value, first: ir.Value, end: ir.Value, size: int
    ) -> None:
        with code.loop(code.times(first, size), code.times(end, size), code.lanes) as loop:
            code.store(code.splat(0.0), array, loop.index)

    def _weights(
        self,
        code: VectorCode,
        rows: tuple[ir.Value, ir.Value, ir.Value, ir.Value],
        queries: ir.Value,
        sums: ir.Value,
        scratch: ir.Value,
    ) -> None:
        keys, bias, null, count = rows
        step = self._tiling.rows
        whole = code.times(code.build.sdiv(count, code.literal(step)), step)
        for start, stop, together in ((code.literal(0), whole, step), (whole, count, 1)):
            with code.loop(start, stop, together) as loop:
                self._some_weights(
                    code,
                    [
                        code.at(
                            keys,
                            code.times(code.build.add(loop.index, code.literal(r)), self._stride),
                        )
                        for r in range(together)
                    ],
                    (code.at(bias, loop.index), null),
                    queries,
                    sums,
                    code.at(scratch, code.times(loop.index, self._tile)),
                )

    def _some_weights(
        self,
        code: VectorCode,
        keys: list[ir.Value],
        biases: tuple[ir.Value, ir.Value],
        queries: ir.Value,
        sums: ir.Value,
        weights: ir.Value,
    ) -> None:
        """Weights of a few rows, all in registers until they are stored."""
        for key in keys:  # those of the next block; a head's rows lie too far apart to be foreseen
            following = code.at(key, code.times(self._stride, _BLOCK_ROWS))
            for place in range(0, self._width, _LINE):
                code.fetch(code.at(following, place))
        vectors = range(self._tiling.vectors)
        bias, null = biases
        start = []
        for r in range(len(keys)):
            above = code.build.fsub(code.build.load(code.at(bias, r)), null)
            power = code.spread_number(code.build.fmul(above, ir.Constant(F32, LOG2_E)))
            start += [power for _ in vectors]
        unrolled = 4 if self._width % 4 == 0 else 1
        with code.loop(code.literal(0), code.literal(self._width), unrolled, start) as loop:
            logits = list(loop.carried)
            for step in range(unrolled):
                e = code.build.add(loop.index, code.literal(step))
                query = code.at(queries, code.times(e, self._tile))
                q = [code.load(query, code.lanes * j) for j in vectors]
                for r, key in enumerate(keys):
                    k = code.spread(key, e)
                    for j in vectors:
                        i = r * len(vectors) + j
                        logits[i] = code.multiply_add(k, q[j], logits[i])
            loop.next = logits
        for j in vectors:
            total = code.load(sums, code.lanes * j)
            of_rows = None
            for r in range(len(keys)):
                weight = code.exp2(loop.carried[r * len(vectors) + j])
                code.store(weight, weights, r * self._tile + code.lanes * j)
                of_rows = weight if of_rows is None else code.build.fadd(of_rows, weight)
            code.store(code.build.fadd(total, of_rows), sums, code.lanes * j)

    def _mix(
        self, code: VectorCode, rows: ir.Value, count: ir.Value, out: ir.Value, scratch: ir.Value
    ) -> None:
        """Values of a block, weighted, a few columns at a time."""
        together = self._tiling.columns
        whole = self._width - self._width % together
        if whole:
            with code.loop(code.literal(0), code.literal(whole), together) as loop:
                self._mix_columns(code, rows, count, out, scratch, loop.index, together)
        if self._width > whole:
            rest = self._width - whole
            self._mix_columns(code, rows, count, out, scratch, code.literal(whole), rest)

    def _mix_columns(
        self,
        code: VectorCode,
        rows: ir.Value,
        count: ir.Value,
        out: ir.Value,
        scratch: ir.Value,
        first: ir.Value,
        together: int,
    ) -> None:
        vectors = range(self._tiling.vectors)
        values, out = code.at(rows, first), code.at(out, code.times(first, self._tile))
        # Sums of a block start at zero: added one by one, thousands of rows lose two digits.
        start = [code.splat(0.0)] * (together * len(vectors))
        with code.loop(code.literal(0), count, 1, start) as loop:
            weights = code.at(scratch, code.times(loop.index, self._tile))
            w = [code.load(weights, code.lanes * j) for j in vectors]
            row = code.at(values, code.times(loop.index, self._stride))
            for e in range(together):
                v = code.spread(row, e)
                for j in vectors:
                    i = e * len(vectors) + j
                    loop.next.append(code.multiply_add(v, w[j], loop.carried[i]))
        for e in range(together):
            for j in vectors:
                place = e * self._tile + code.lanes * j
                total = code.build.fadd(code.load(out, place), loop.carried[e * len(vectors) + j])
                code.store(total, out, place)


@dataclass(frozen=True)
class _Candidates:
    """Those of some tiles of a head: from rows into tiles, and back."""

    first: ir.Value  # tile
    end: ir.Value
    count: ir.Value  # of all candidates; the last tile may have places for more
    tile: int
    width: int

    def into_tiles(
        self, code: VectorCode, rows: tuple[ir.Value, ir.Value], tiled: ir.Value
    ) -> None:
        """Their queries, in units of log2; places of nobody stay as they are."""
        scale = ir.Constant(F32, LOG2_E)
        with code.loop(*self._theirs(code), 1) as loop:
            row, place = self._places(code, rows, loop.index)
            with code.loop(code.literal(0), code.literal(self.width), 1) as e:
                number = code.build.load(code.at(row, e.index))
                into = code.at(tiled, code.build.add(place, code.times(e.index, self.tile)))
                code.build.store(code.build.fmul(number, scale), into)

    def out_of_tiles(
        self,
        code: VectorCode,
        tiled: ir.Value,
        sums: ir.Value,
        rows: tuple[ir.Value, ir.Value],
    ) -> None:
        """Their outputs, divided by the sums of their weights."""
        with code.loop(*self._theirs(code), 1) as loop:
            row, place = self._places(code, rows, loop.index)
            one = ir.Constant(F32, 1.0)
            share = code.build.fdiv(one, code.build.load(code.at(sums, loop.index)))
            with code.loop(code.literal(0), code.literal(self.width), 1) as e:
                of = code.at(tiled, code.build.add(place, code.times(e.index, self.tile)))
                number = code.build.fmul(code.build.load(of), share)
                code.build.store(number, code.at(row, e.index))

    def _theirs(self, code: VectorCode) -> tuple[ir.Value, ir.Value]:
        return code.times(self.first, self.tile), code.smaller(
            code.times(self.end, self.tile), self.count
        )

    def _places(
        self, code: VectorCode, rows: tuple[ir.Value, ir.Value], candidate: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """The address of a candidate's row, and its first place in the tiles."""
        tile = code.literal(self.tile)
        of_tile = code.times(code.build.sdiv(candidate, tile), self.tile * self.width)
        place = code.build.add(of_tile, code.build.srem(candidate, tile))
        return code.at(rows[0], code.build.mul(candidate, rows[1])), place
