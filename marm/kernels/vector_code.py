"""Machine code with vectors, written instruction by instruction: what kernels are made of.

A thin layer over llvmlite's builder that knows one vector width. Vectors live in registers, so that
a kernel says itself what is kept there, which no compiler of loops can be trusted with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from llvmlite import ir

I64, I32, I8, F32 = ir.IntType(64), ir.IntType(32), ir.IntType(8), ir.FloatType()

_EXP2 = (
    1.0000001192092896,
    0.6931469440460205,
    0.24022120237350464,
    0.05550713464617729,
    0.009675540961325169,
    0.0013276466634124517,
)
"""2**r for r in [-1/2, 1/2] as a polynomial, of least relative error (7.5e-8)."""

LOG2_E = math.log2(math.e)
"""Kernels raise 2, not e: logits are given to them in units of log2."""

LOWEST_POWER, HIGHEST_POWER = -125.0, 120.0
"""Powers of two are held between these: nothing overflows, and no result is denormal."""

_ROUND = 12582912.0  # 1.5 * 2**23: a sum with it keeps whole numbers only
_EXPONENT_BIAS = 127.0


@dataclass
class Loop:
    """A loop's counter, and the values that its rounds hand on; append the next ones to `next`."""

    index: ir.Value
    carried: list[ir.Value]
    next: list[ir.Value]


class VectorCode:
    """Code of one function, on vectors of ``lanes`` single-precision numbers.

    Addresses are pointers to single numbers, offsets and counts 64-bit integers.
    """

    def __init__(self, function: ir.Function, lanes: int) -> None:
        self.build = ir.IRBuilder(function.append_basic_block())
        self.lanes = lanes
        self._type, self._bits = ir.VectorType(F32, lanes), ir.VectorType(I32, lanes)

    def literal(self, value: int) -> ir.Constant:
        """A constant count or offset."""
        return ir.Constant(I64, value)

    def splat(self, value: float) -> ir.Constant:
        """A vector of one constant."""
        return ir.Constant(self._type, [value] * self.lanes)

    def pointer(self, address: ir.Value) -> ir.Value:
        """To the single number at an address that came as an integer."""
        return self.build.inttoptr(address, F32.as_pointer())

    def at(self, address: ir.Value, offset: ir.Value | int) -> ir.Value:
        """The address ``offset`` numbers further."""
        return self.build.gep(
            address, [self.literal(offset) if isinstance(offset, int) else offset]
        )

    def times(self, count: ir.Value, factor: ir.Value | int) -> ir.Value:
        """Product of integers."""
        return self.build.mul(count, self.literal(factor) if isinstance(factor, int) else factor)

    def smaller(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Minimum of two integers."""
        return self.build.select(self.build.icmp_signed("<", a, b), a, b)

    def load(self, address: ir.Value, offset: ir.Value | int = 0) -> ir.Value:
        """A vector from anywhere."""
        loaded = self.build.load(self._vector_at(address, offset))
        loaded.align = 4
        return loaded

    def store(self, vector: ir.Value, address: ir.Value, offset: ir.Value | int = 0) -> None:
        """A vector to anywhere."""
        self.build.store(vector, self._vector_at(address, offset)).align = 4

    def spread(self, address: ir.Value, offset: ir.Value | int = 0) -> ir.Value:
        """A vector of the one number at an address."""
        return self.spread_number(self.build.load(self.at(address, offset)))

    def fetch(self, address: ir.Value) -> ir.Value:
        """Ask for a line of the cache, to be read soon; any address will do."""
        pointer = I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        module = self.build.module
        function = module.globals.get("llvm.prefetch.p0")
        if function is None:
            function = ir.Function(module, kind, "llvm.prefetch.p0")
        arguments = [ir.Constant(I32, value) for value in (0, 3, 1)]  # to read, often, data
        self.build.call(function, [self.build.bitcast(address, pointer), *arguments])

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """``a * b + c``, rounded once."""
        kind = ir.FunctionType(self._type, [self._type] * 3)
        return self.build.call(self._intrinsic("llvm.fma", kind), [a, b, c])

    def total(self, vectors: Sequence[ir.Value]) -> ir.Value:
        """Sum of all numbers of some vectors, one number."""
        total = vectors[0]
        for vector in vectors[1:]:
            total = self.build.fadd(total, vector)
        reduce = self._intrinsic("llvm.vector.reduce.fadd", ir.FunctionType(F32, [F32, self._type]))
        # Without leave to change the order it would add one number after the other.
        return self.build.call(reduce, [ir.Constant(F32, -0.0), total], fastmath=("reassoc",))

    def larger(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Maximum of two vectors, number by number; NaN in ``b`` is passed over."""
        return self.build.select(self.build.fcmp_ordered(">", b, a), b, a)

    def lesser(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Minimum of two vectors, number by number; NaN in ``b`` is passed over."""
        return self.build.select(self.build.fcmp_ordered("<", b, a), b, a)

    def largest(self, vector: ir.Value) -> ir.Value:
        """Maximum of a vector's numbers."""
        reduce = self._intrinsic("llvm.vector.reduce.fmax", ir.FunctionType(F32, [self._type]))
        return self.build.call(reduce, [vector])

    def least(self, vector: ir.Value) -> ir.Value:
        """Minimum of a vector's numbers."""
        reduce = self._intrinsic("llvm.vector.reduce.fmin", ir.FunctionType(F32, [self._type]))
        return self.build.call(reduce, [vector])

    def mask(self, holds: ir.Value) -> ir.Value:
        """The outcomes of a comparison as bits of an integer, the first number's lowest."""
        bits = self.build.bitcast(holds, ir.IntType(self.lanes))
        return self.build.zext(bits, I64)

    def spread_number(self, number: ir.Value) -> ir.Value:
        """A vector of one number."""
        nothing = ir.Constant(self._type, ir.Undefined)
        first = self.build.insert_element(nothing, number, ir.Constant(I32, 0))
        return self.build.shuffle_vector(first, nothing, ir.Constant(self._bits, [0] * self.lanes))

    def exp2(self, x: ir.Value) -> ir.Value:
        """2**x within 2e-7, x held between `LOWEST_POWER` and `HIGHEST_POWER`; NaN stays NaN."""
        build = self.build
        low, high = self.splat(LOWEST_POWER), self.splat(HIGHEST_POWER)
        x = build.select(build.fcmp_ordered("<", x, low), low, x)
        x = build.select(build.fcmp_ordered(">", x, high), high, x)
        rounding = self.splat(_ROUND + _EXPONENT_BIAS)
        rounded = build.fadd(x, rounding)
        rest = build.fsub(x, build.fsub(rounded, rounding))
        power = self.splat(_EXP2[-1])
        for coefficient in _EXP2[-2::-1]:
            power = self.multiply_add(power, rest, self.splat(coefficient))
        # The low bits of the rounded number are the exponent already.
        exponent = build.shl(
            build.bitcast(rounded, self._bits), ir.Constant(self._bits, [23] * self.lanes)
        )
        return build.fmul(power, build.bitcast(exponent, self._type))

    def scratch(self, size: int) -> ir.Value:
        """So many numbers on the thread's stack, where the lines of the cache begin."""
        with self.build.goto_entry_block():
            array = self.build.alloca(ir.ArrayType(F32, size))
        array.align = 64
        return self.build.bitcast(array, F32.as_pointer())

    @contextmanager
    def loop(
        self, start: ir.Value, stop: ir.Value, step: int, carried: Sequence[ir.Value] = ()
    ) -> Iterator[Loop]:
        """What is written inside runs for ``start, start + step, ... < stop``.

        After the loop its `carried` values are those of the last round.
        """
        build, before = self.build, self.build.block
        head, body, after = (build.append_basic_block() for _ in range(3))
        build.branch(head)
        build.position_at_end(head)
        index = build.phi(I64)
        index.add_incoming(start, before)
        values = [build.phi(value.type) for value in carried]
        for value, initial in zip(values, carried, strict=True):
            value.add_incoming(initial, before)
        build.cbranch(build.icmp_signed("<", index, stop), body, after)
        build.position_at_end(body)
        loop = Loop(index, list(values), [])
        yield loop
        for value, following in zip(values, loop.next, strict=True):
            value.add_incoming(following, build.block)
        index.add_incoming(build.add(index, self.literal(step)), build.block)
        build.branch(head)
        build.position_at_end(after)

    def _intrinsic(self, name: str, kind: ir.FunctionType) -> ir.Function:
        """One of LLVM's own functions, for these vectors."""
        module, full_name = self.build.module, f"{name}.v{self.lanes}f32"
        function = module.globals.get(full_name)
        return ir.Function(module, kind, full_name) if function is None else function

    def _vector_at(self, address: ir.Value, offset: ir.Value | int) -> ir.Value:
        return self.build.bitcast(self.at(address, offset), self._type.as_pointer())
