"""Compiling and running kernels: what is refused, and where torch computes instead."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from marm.highest import highest
from marm.kernels import native_code
from marm.kernels.checked_address import address_of
from marm.kernels.native_code import SWITCH, NativeKernel, host_registers
from marm.precision import FullPrecision

WITHOUT_EXECUTABLE_PAGES = """
import ctypes, sys, torch
from marm.highest import highest
from marm.kernels.native_code import host_registers
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN
    sys.exit(77)
assert host_registers() is None
assert highest(torch.arange(40.0)[None], 1).tolist() == [[39]]
"""


@pytest.fixture
def asked_again() -> Iterator[None]:
    """What decides about kernels decides within the test, and once more after it."""
    host_registers.cache_clear()
    yield
    host_registers.cache_clear()


@pytest.mark.skipif(host_registers() is None, reason="no fused multiply-add here")
def test_another_number_of_arguments_is_refused() -> None:
    kernel = NativeKernel(lambda code, values: None, arity=2, lanes=4)
    kernel(3, 1, 2)
    with pytest.raises(TypeError, match="takes 2 arguments, got 1"):
        kernel(3, 1)


@pytest.mark.usefixtures("asked_again")
def test_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    assert host_registers() is None
    assert FullPrecision().registers(torch.device("cpu")) is None
    assert highest(torch.arange(40.0)[None], 1).tolist() == [[39]]


@pytest.mark.usefixtures("asked_again")
def test_a_misspelt_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "Off")
    with pytest.raises(ValueError, match="MARM_KERNELS must be on or off, got 'Off'"):
        host_registers()


@pytest.mark.usefixtures("asked_again")
def test_what_cannot_be_compiled_is_left_to_torch_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(module: object) -> None:
        raise RuntimeError("no such target")

    monkeypatch.setenv(SWITCH, "on")
    monkeypatch.setattr(native_code, "_cpu_registers", lambda: native_code.Registers(4, 32))
    monkeypatch.setattr(native_code, "_compiled", refuse)
    with caplog.at_level(logging.WARNING, native_code.__name__):
        assert host_registers() is None
        assert host_registers() is None
    assert [record.getMessage() for record in caplog.records] == [
        "kernels can't run here, torch computes instead, slower: no such target"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="the system's own prohibition is Linux's")
@pytest.mark.skipif(host_registers() is None, reason="no fused multiply-add here")
def test_a_process_without_executable_pages_takes_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXECUTABLE_PAGES], capture_output=True, text=True, timeout=60
    )
    if done.returncode == 77:
        pytest.skip("this kernel can't forbid executable pages")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("kernels can't run here") == 1


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 4, dtype=torch.float64),
        torch.zeros(4, 3),
        torch.zeros(4, 3).t(),
        torch.zeros(3, 4, device="meta"),
    ],
    ids=["dtype", "shape", "strides", "device"],
)
def test_an_address_is_of_what_was_expected(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"x must be torch.float32 on the CPU of shape \(3, 4\)"):
        address_of("x", x, (3, 4))


def test_an_address_is_where_a_tensor_begins() -> None:
    x = torch.zeros(5, 4)
    assert address_of("x", x, (5, 4)) == x.data_ptr()
    assert address_of("x", x[1:, :2], (4, 2), strides=(4, 1)) == x.data_ptr() + 16
    with pytest.raises(ValueError, match=r"with strides \(2, 1\); got .* with strides \(4, 1\)"):
        address_of("x", x[1:, :2], (4, 2), strides=(2, 1))
