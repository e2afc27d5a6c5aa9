"""The attention kernel against torch's fused attention, in double precision."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from marm.attention_kernel import KernelAttention
from marm.dense_attention import FusedAttention
from marm.kernels.attention_code import Tiling
from marm.kernels.native_code import Registers, host_registers
from marm.precision import FullPrecision

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(host_registers() is None, reason="no fused multiply-add here")

TILINGS = [Tiling.of(Registers(8, 16)), Tiling.of(Registers(4, 32))]
if host_registers() == Registers(16, 32):
    TILINGS.append(Tiling.of(Registers(16, 32)))

Case = tuple[Tensor, Tensor, Tensor, Tensor]


def random_case(
    num_candidates: int, num_rows: int, num_heads: int = 2, width: int = 16, scale: float = 1.0
) -> Case:
    """Queries, keys, values and biases; the last row is a null key."""
    generator = torch.Generator().manual_seed(num_candidates * 1000 + num_rows)
    both = torch.randn(2, num_rows, num_heads, width, generator=generator)
    both[:, -1] = 0
    k_HNE, v_HNE = both.transpose(1, 2)
    q_HME = torch.randn(num_heads, num_candidates, width, generator=generator) * scale
    return q_HME, k_HNE, v_HNE, torch.randn(num_heads, num_rows, generator=generator)


def expected(case: Case) -> Tensor:
    """What torch computes in double precision."""
    q, k, v, bias = (x.double() for x in case)
    return FusedAttention(torch.float64).attend(q, k, v, bias)


def assert_right(got: Tensor, case: Case, tolerance: float = 1e-5) -> None:
    right = expected(case)
    assert got.dtype == torch.float32
    assert got.shape == right.shape
    torch.testing.assert_close(got.double(), right, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: f"{tiling.lanes} lanes")
@pytest.mark.parametrize("width", [4, 6, 16, 25, 32, 64])
def test_the_kernel_equals_torch(width: int, tiling: Tiling) -> None:
    kernel = KernelAttention(width, tiling)
    for num_candidates, num_rows, num_heads in [
        (1, 1, 1),
        (3, 2, 4),
        (64, 96, 1),
        (65, 97, 8),
        (130, 200, 2),
        (7, 1003, 3),
    ]:
        case = random_case(num_candidates, num_rows, num_heads, width, scale=width**-0.5)
        assert_right(kernel.attend(*case), case)


@pytest.mark.parametrize("num_candidates", [1, 7, 64, 65])
def test_queries_and_biases_may_lie_in_any_way(num_candidates: int) -> None:
    q, k, v, bias = random_case(num_candidates, 100, num_heads=4)
    right = expected((q, k, v, bias))
    by_candidate = q.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.stack([q, q], dim=2)[:, :, 0]
    across = q.mT.contiguous().mT
    for queries in (q, by_candidate, wide, across):
        for biases in (bias, bias.t().contiguous().t(), torch.cat([bias, bias], 1)[:, :100]):
            got = KernelAttention(16, TILINGS[-1]).attend(queries, k, v, biases)
            torch.testing.assert_close(got.double(), right, rtol=0, atol=1e-5)
    same_q, same_bias = q[:1].expand(4, -1, -1), bias[:1].expand(4, -1)
    got = KernelAttention(16, TILINGS[-1]).attend(same_q, k, v, same_bias)
    assert_right(got, (same_q, k, v, same_bias))


def test_nobody_who_asks() -> None:
    kernel = KernelAttention(16, TILINGS[0])
    assert kernel.attend(*random_case(0, 5)).shape == (2, 0, 16)


@pytest.mark.parametrize("scale", [3.0, 30.0, 1000.0])
def test_large_logits_are_right(scale: float) -> None:
    """From some size on the fused kernel is asked again; single precision bounds what is right."""
    kernel = KernelAttention(16, TILINGS[0])
    case = random_case(20, 150, scale=scale)
    fused = FusedAttention().attend(*case)
    error_of_fused = float((fused - expected(case)).abs().max())
    assert_right(kernel.attend(*case), case, tolerance=1e-5 + 4 * error_of_fused)


@pytest.mark.parametrize(
    "value", [-float("inf"), -1e30, -200.0, 100.0, 200.0, 1e30], ids=lambda value: f"{value:g}"
)
@pytest.mark.parametrize("row", [0, 40, -1])
def test_extreme_biases_are_right(value: float, row: int) -> None:
    case = random_case(9, 100)
    case[3][:, row] = value
    assert_right(KernelAttention(16, TILINGS[0]).attend(*case), case)


@pytest.mark.parametrize("which", range(4), ids=["query", "key", "value", "bias"])
def test_nan_in_is_nan_out(which: int) -> None:
    case = random_case(9, 100)
    case[which][0, 3] = float("nan")
    got, right = KernelAttention(16, TILINGS[0]).attend(*case), expected(case)
    assert torch.equal(got.isnan(), right.isnan())
    assert got.isnan().any()


def test_any_number_of_threads_may_ask_at_once() -> None:
    kernel = FullPrecision().attention(32, CPU)
    assert isinstance(kernel, KernelAttention)
    cases = [random_case(70, 300, 4, 32, scale=0.2) for _ in range(4)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda case: kernel.attend(*case), cases * 10))
    finally:
        torch.set_num_threads(before)
    for result, case in zip(results, cases * 10, strict=True):
        assert_right(result, case)


def test_what_the_kernel_cannot_read_is_refused() -> None:
    kernel = KernelAttention(16, TILINGS[0])
    q, k, v, bias = random_case(5, 9)
    with pytest.raises(ValueError, match="for heads of 16, got one of 8"):
        kernel.attend(q[:, :, :8], k[:, :, :8], v[:, :, :8], bias)
    with pytest.raises(ValueError, match="must lie alike"):
        kernel.attend(q, k, v.contiguous(), bias)
    with pytest.raises(ValueError, match="must lie alike"):
        kernel.attend(q, k.mT.contiguous().mT, v.mT.contiguous().mT, bias)
    with pytest.raises(ValueError, match=r"reads torch\.float32, got .*bfloat16"):
        kernel.attend(q, k.bfloat16(), v.bfloat16(), bias)
    with pytest.raises(ValueError, match="biases must be of 2 heads and of the 9 rows"):
        kernel.attend(q, k, v, bias[:, :-1])
    with pytest.raises(ValueError, match="biases must be of 2 heads and of the 9 rows"):
        kernel.attend(q, k, v, bias[:1])
    with pytest.raises(ValueError, match="the null key among them"):
        kernel.attend(q, k[:, :0], v[:, :0], bias[:, :0])
    with pytest.raises(ValueError, match=r"values must be .* of shape \(2, 9, 16\)"):
        kernel.attend(q, k, v[:, :-1], bias)
    with pytest.raises(ValueError, match=r"keys must be .* of shape \(2, 9, 16\)"):
        kernel.attend(q, k[:1], v[:1], bias)
    with pytest.raises(ValueError, match=r"keys must be .* on the CPU"):
        kernel.attend(q, *torch.empty(2, 9, 2, 16, device="meta").transpose(1, 2), bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_biases_may_be_other_numbers(dtype: torch.dtype) -> None:
    q, k, v, bias = random_case(5, 9)
    bias = bias.to(dtype)
    case = q, k, v, bias
    assert_right(KernelAttention(16, TILINGS[0]).attend(*case), case)


def test_a_cpu_without_the_instructions_takes_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marm.precision.host_registers", lambda: None)
    assert isinstance(FullPrecision().attention(16, CPU), FusedAttention)
    monkeypatch.undo()
    assert isinstance(FullPrecision().attention(16, CPU), KernelAttention)
    assert isinstance(FullPrecision().attention(16, torch.device("cuda")), FusedAttention)
