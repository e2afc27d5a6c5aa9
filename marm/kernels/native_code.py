"""Compiling kernels for the CPU at hand, and running them on torch's threads.

llvmlite carries its own compiler; nothing else needs to be installed. A kernel takes a fraction of
a second and is kept for the life of the process. After a fork a kernel on several threads hangs in
the child, as torch's own operators do.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import platform
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from llvmlite import binding, ir

from marm.kernels.vector_code import I64, VectorCode

logger = logging.getLogger(__name__)

SWITCH = "MARM_KERNELS"
"""Environment variable: ``off`` leaves everything to torch."""

TASKS, NEXT_TASK = 0, 1
"""Positions of the two arguments that every kernel has: number of tasks, and 0."""

_compiling = threading.Lock()


@dataclass(frozen=True)
class Registers:
    """Vector registers of a CPU: numbers in each, and how many there are."""

    lanes: int
    count: int


@cache
def host_registers() -> Registers | None:
    """Those that kernels use in this process; None when no kernel can run, so that torch computes.

    That is on a CPU without fused multiply-add, where a first small kernel can't be compiled or
    computes something else (which is logged once), and with ``MARM_KERNELS=off``.

    Raises:
        ValueError: when that variable is neither ``on`` nor ``off``.
    """
    switch = os.environ.get(SWITCH, "on")
    if switch not in ("on", "off"):
        raise ValueError(f"{SWITCH} must be on or off, got {switch!r}")
    if switch == "off":
        return None
    try:
        registers = _cpu_registers()
        if registers is not None:
            _try_out(registers)
    except (OSError, RuntimeError) as error:
        logger.warning("kernels can't run here, torch computes instead, slower: %s", error)
        return None
    return registers


def _cpu_registers() -> Registers | None:
    features = binding.get_host_cpu_features()
    if features.get("avx512f", False):
        return Registers(16, 32)
    if features.get("avx2", False) and features.get("fma", False):
        return Registers(8, 16)
    return Registers(4, 32) if platform.machine() in ("aarch64", "arm64") else None


def _try_out(registers: Registers) -> None:
    """Compile a small kernel and run it.

    Raises:
        OSError: when the system forbids executable pages.
        RuntimeError: when it can't be compiled, or is wrong.
    """
    _require_executable_pages()

    def task(code: VectorCode, values: Sequence[ir.Value]) -> None:
        place = code.pointer(values[1])
        x = code.load(place)
        code.store(code.multiply_add(x, x, x), place)

    numbers = (ctypes.c_float * registers.lanes)(*range(registers.lanes))
    NativeKernel(task, 1, registers.lanes)(1, ctypes.addressof(numbers))
    if list(numbers) != [i * i + i for i in range(registers.lanes)]:
        raise RuntimeError(f"a kernel of {registers.lanes} lanes computed {list(numbers)}")


def _require_executable_pages() -> None:
    """LLVM doesn't look whether it got them: without, the first call would end the process."""
    if os.name != "posix":
        return
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as page:
        start = ctypes.c_char.from_buffer(page)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        failed = protect(ctypes.addressof(start), len(page), mmap.PROT_READ | mmap.PROT_EXEC)
        number = ctypes.get_errno()
        del start
    if failed:
        raise OSError(number, f"no executable pages ({os.strerror(number)})")


class NativeKernel:
    """A compiled function over numbered tasks that threads take in turn."""

    def __init__(
        self, emit_task: Callable[[VectorCode, Sequence[ir.Value]], None], arity: int, lanes: int
    ) -> None:
        """Compile it.

        Args:
            emit_task: writes the code of one task, given its number and then the arguments.
            arity: number of the arguments, `TASKS` and `NEXT_TASK` not counted.
            lanes: width of the vectors.
        """
        module = _module(emit_task, arity, lanes)
        with _compiling:
            self._engine = _compiled(module)
        address = self._engine.get_function_address("run")
        self._address = address
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
        self._arity = arity

    def __call__(self, num_tasks: int, *arguments: int) -> None:
        """Run all tasks on as many threads as torch uses, this one among them.

        Arguments are counts, strides and addresses; what is there must live until this returns.
        Python's lock is free meanwhile, and any number of threads may call at once.

        Raises:
            TypeError: for another number of arguments.
        """
        if len(arguments) != self._arity:
            raise TypeError(f"this kernel takes {self._arity} arguments, got {len(arguments)}")
        values = (ctypes.c_int64 * (2 + len(arguments)))(num_tasks, 0, *arguments)
        # All of torch's threads, or one: a smaller team would end the others, to be started again.
        num_threads = torch.get_num_threads() if num_tasks > 1 else 1
        in_parallel = _openmp()
        if num_threads > 1 and in_parallel is not None:
            in_parallel(self._address, ctypes.addressof(values), num_threads, 0)
        else:
            self._run(ctypes.addressof(values))


@cache
def _openmp() -> Callable[..., None] | None:
    """The OpenMP run-time that torch has loaded: a second pool of threads would compete with its
    own, which spin for a while after each operator. None where torch was built without it."""
    run = (
        getattr(ctypes.CDLL(None), "GOMP_parallel", None) if platform.system() == "Linux" else None
    )
    if run is not None:
        run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        run.restype = None
    return run


def _module(
    emit_task: Callable[[VectorCode, Sequence[ir.Value]], None], arity: int, lanes: int
) -> ir.Module:
    module = ir.Module()
    module.triple = binding.get_process_triple()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64.as_pointer()]), "run")
    code = VectorCode(function, lanes)
    build, given = code.build, function.args[0]
    values = [build.load(code.at(given, i)) for i in range(2 + arity)]
    take, work, leave = (build.append_basic_block() for _ in range(3))
    build.branch(take)
    build.position_at_end(take)
    task = build.atomic_rmw("add", code.at(given, NEXT_TASK), code.literal(1), "monotonic")
    build.cbranch(build.icmp_signed("<", task, values[TASKS]), work, leave)
    build.position_at_end(leave)
    build.ret_void()
    build.position_at_end(work)
    emit_task(code, [task, *values[2:]])
    build.branch(take)
    return module


def _compiled(module: ir.Module) -> binding.ExecutionEngine:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        jit=True,
    )
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    # Kernels are unrolled and in vectors already.
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine
