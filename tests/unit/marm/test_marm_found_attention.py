"""Attention to found rows: the kernel against gathering them."""

from __future__ import annotations

import pytest
import torch

from marm.found_attention import (
    FoundKernel,
    GatheredAttention,
    SearchedRows,
    found_attention,
)
from marm.kernels.found_code import FoundShape
from marm.kernels.native_code import Registers, host_registers
from marm.search import Found

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(host_registers() is None, reason="no fused multiply-add here")

REGISTERS = [Registers(8, 16), Registers(4, 32)]
if host_registers() == Registers(16, 32):
    REGISTERS.append(Registers(16, 32))


def random_rows(num_rows: int, num_heads: int, width: int) -> SearchedRows:
    both = torch.randn(2, num_rows, num_heads * width)
    return SearchedRows(*both, torch.randn(num_rows, num_heads), torch.randn(num_heads))


def random_found(num_candidates: int, num_found: int, num_rows: int) -> Found:
    position = torch.rand(num_candidates, num_rows).argsort(dim=1)[:, :num_found]
    return Found(position, torch.rand(num_candidates, num_found) < 0.7)


@pytest.mark.parametrize("registers", REGISTERS, ids=lambda it: f"{it.lanes} lanes")
@pytest.mark.parametrize(("num_heads", "width"), [(1, 16), (4, 16), (2, 32), (1, 64)])
@pytest.mark.parametrize("scale", [0.3, 1000.0])
def test_the_kernel_equals_gathering(
    num_heads: int, width: int, registers: Registers, scale: float
) -> None:
    torch.manual_seed(0)
    shape = FoundShape.of(num_heads, width, registers)
    if shape is None:
        assert num_heads * width > registers.lanes * registers.count // 2
        return
    for num_candidates, num_found, num_rows in [(1, 1, 1), (20, 16, 40), (9, 33, 50)]:
        rows = random_rows(num_rows, num_heads, width)
        found = random_found(num_candidates, num_found, num_rows)
        q_MD = torch.randn(num_candidates, num_heads * width) * scale
        expected = GatheredAttention().attend(q_MD, rows, found)
        got = FoundKernel(shape).attend(q_MD, rows, found)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * max(1.0, scale / 30))


def test_who_found_nothing_attends_to_the_null_key() -> None:
    rows, found = random_rows(30, 2, 16), random_found(3, 5, 30)
    kernel = found_attention(2, 16, torch.float32, CPU)
    assert isinstance(kernel, FoundKernel)
    nothing = Found(found.position, torch.zeros_like(found.valid))
    assert kernel.attend(torch.randn(3, 32), rows, nothing).abs().max() < 1e-30


def test_nan_in_is_nan_out() -> None:
    rows, found = random_rows(30, 2, 16), Found(torch.tensor([[3], [4]]), torch.ones(2, 1).bool())
    rows.k_ND[3, 0] = float("nan")
    kernel, q_MD = found_attention(2, 16, torch.float32, CPU), torch.randn(2, 32)
    expected = GatheredAttention().attend(q_MD, rows, found).isnan()
    assert torch.equal(kernel.attend(q_MD, rows, found).isnan(), expected)
    assert expected[0, :16].all()


@pytest.mark.parametrize(
    ("num_heads", "width", "dtype"),
    [(2, 12, torch.float32), (16, 64, torch.float32), (2, 16, torch.bfloat16)],
)
def test_what_the_kernel_cannot_do_is_gathered(
    num_heads: int, width: int, dtype: torch.dtype
) -> None:
    assert isinstance(found_attention(num_heads, width, dtype, CPU), GatheredAttention)
