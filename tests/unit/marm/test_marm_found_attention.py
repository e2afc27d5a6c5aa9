"""Attention to found rows: the kernel against gathering them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

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


def test_biases_that_lie_otherwise_are_read() -> None:
    rows, found = random_rows(30, 2, 16), random_found(3, 5, 30)
    kernel, q_MD = found_attention(2, 16, torch.float32, CPU), torch.randn(3, 32)
    other = replace(rows, bias_NH=rows.bias_NH.t().contiguous().t().double())
    got, expected = (kernel.attend(q_MD, of, found) for of in (other, rows))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k_ND", lambda x: x[:-1], "positions must be|values must be"),
        ("k_ND", lambda x: x.double(), "keys must be torch.float32"),
        ("k_ND", lambda x: x.t().contiguous().t(), "keys must be .* contiguous"),
        ("k_ND", lambda x: x.to("meta"), "keys must be .* on the CPU"),
        ("v_ND", lambda x: x[:-1], "values must be"),
        ("v_ND", lambda x: x.bfloat16(), "values must be torch.float32"),
        ("v_ND", lambda x: x[:, :16], "values must be"),
        ("bias_NH", lambda x: x[:-1], "biases must be"),
        ("null_H", lambda x: x[:1], "null logits must be"),
    ],
)
def test_rows_that_the_kernel_cannot_read_are_refused(
    name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    rows, found = random_rows(30, 2, 16), random_found(3, 5, 30)
    changed = replace(rows, **{name: change(getattr(rows, name))})
    kernel = found_attention(2, 16, torch.float32, CPU)
    assert isinstance(kernel, FoundKernel)
    with pytest.raises(ValueError, match=message):
        kernel.attend(torch.randn(3, 32), changed, found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: replace(it, position=it.position.int()), "positions must be torch.int64"),
        (lambda it: replace(it, position=it.position + 30), "positions must be of one of 30 rows"),
        (lambda it: replace(it, position=it.position - 30), "positions must be of one of 30 rows"),
        (lambda it: replace(it, position=it.position[:2]), "queries must be"),
        (lambda it: replace(it, valid=it.valid.long()), "validity must be torch.bool"),
        (lambda it: replace(it, valid=it.valid[:, :-1]), "validity must be"),
    ],
)
def test_positions_that_the_kernel_cannot_follow_are_refused(
    change: Callable[[Found], Found], message: str
) -> None:
    rows, found = random_rows(30, 2, 16), random_found(3, 5, 30)
    kernel = found_attention(2, 16, torch.float32, CPU)
    with pytest.raises(ValueError, match=message):
        kernel.attend(torch.randn(3, 32), rows, change(found))


def test_queries_that_the_kernel_cannot_read_are_refused() -> None:
    rows, found = random_rows(30, 2, 16), random_found(3, 5, 30)
    kernel = found_attention(2, 16, torch.float32, CPU)
    for queries in (torch.randn(3, 16), torch.randn(3, 32).double()):
        with pytest.raises(ValueError, match="queries must be"):
            kernel.attend(queries, rows, found)


@pytest.mark.parametrize(
    ("num_heads", "width", "dtype"),
    [(2, 12, torch.float32), (16, 64, torch.float32), (2, 16, torch.bfloat16)],
)
def test_what_the_kernel_cannot_do_is_gathered(
    num_heads: int, width: int, dtype: torch.dtype
) -> None:
    assert isinstance(found_attention(num_heads, width, dtype, CPU), GatheredAttention)
