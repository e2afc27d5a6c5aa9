"""The end of a layer: the kernel against one operator after the other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from marm.attention import TargetAttention
from marm.kernels.layer_end_code import LayerEndShape
from marm.kernels.native_code import Registers, host_registers
from marm.kernels.product_code import BLOCK_ROWS, even_blocks
from marm.layer_end import LayerEndKernel, PlainLayerEnd, layer_end
from marm.precision import FullPrecision, HalfPrecision

needs_kernels = pytest.mark.skipif(host_registers() is None, reason="no fused multiply-add here")

REGISTERS = [Registers(8, 16), Registers(4, 32)]
if host_registers() == Registers(16, 32):
    REGISTERS.append(Registers(16, 32))

DIM = 64


def layer_of(dim: int = DIM, eps: float = 1e-5) -> TargetAttention:
    """Random weights, every bias and norm included."""
    torch.manual_seed(dim)
    layer = TargetAttention(dim, dim, dim, 4)
    layer.feed_forward[0] = nn.LayerNorm(dim, eps)
    for parameter in layer.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return layer.requires_grad_(False).eval()


def given(num_candidates: int, dim: int = DIM) -> tuple[Tensor, Tensor]:
    """Inputs far from standardised."""
    return torch.randn(num_candidates, dim) * 3 + 1, torch.randn(num_candidates, dim) * 2


def of_the_layer(layer: TargetAttention, x_MD: Tensor, context_MD: Tensor) -> Tensor:
    y_MD = x_MD + layer.output(context_MD)
    return y_MD + layer.feed_forward(y_MD)


def test_the_plain_end_is_that_of_the_layer() -> None:
    layer, inputs = layer_of(), given(70)
    got = PlainLayerEnd(layer, FullPrecision())(*inputs)
    torch.testing.assert_close(got, of_the_layer(layer, *inputs))


@needs_kernels
@pytest.mark.parametrize("registers", REGISTERS, ids=lambda it: f"{it.lanes} lanes")
@pytest.mark.parametrize("dim", [64, 128])
def test_the_kernel_equals_the_plain_end(dim: int, registers: Registers) -> None:
    layer = layer_of(dim)
    shape = LayerEndShape.of(dim, 2 * dim, registers)
    assert shape is not None
    kernel, plain = LayerEndKernel(layer, shape), PlainLayerEnd(layer, FullPrecision())
    for num_candidates in (0, 1, 2, 5, 6, 7, 47, 48, 49, 103, 500):
        inputs = given(num_candidates, dim)
        expected = plain(*inputs)
        torch.testing.assert_close(kernel(*inputs), expected, rtol=1e-5, atol=2e-5)


@needs_kernels
def test_gelu_is_right_from_far_below_zero_to_far_above() -> None:
    layer = layer_of()
    norm, wide, _, narrow = layer.feed_forward
    # Hidden units are what the norm gives, times 1 to 2 ** 5, and each is an output of its own.
    for linear in (layer.output, wide, narrow):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
    places = torch.arange(DIM)
    wide.weight[places, places] = 2.0 ** (places % 6)
    narrow.weight[places, places] = 1.0
    x_MD, nothing = torch.randn(400, DIM), torch.zeros(400, DIM)
    end = layer_end(layer, FullPrecision())
    assert isinstance(end, LayerEndKernel)
    expected = of_the_layer(layer.double(), x_MD.double(), nothing.double())
    torch.testing.assert_close(end(x_MD, nothing).double(), expected, rtol=1e-6, atol=3e-6)


@needs_kernels
def test_inputs_may_be_other_numbers() -> None:
    x_MD, context_MD = (x.bfloat16() for x in given(30))
    end = layer_end(layer_of(), FullPrecision())
    wanted = end(x_MD.float(), context_MD.float())
    for dtype in (torch.bfloat16, torch.float64):
        got = end(x_MD.to(dtype), context_MD.to(dtype))
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@needs_kernels
def test_any_number_of_threads_may_call_at_once() -> None:
    end = layer_end(layer_of(), FullPrecision())
    cases = [given(70 + i) for i in range(4)]
    wanted = [end(*case) for case in cases]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda case: end(*case), cases * 10))
    finally:
        torch.set_num_threads(before)
    for got, expected in zip(results, wanted * 10, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@needs_kernels
def test_inputs_may_lie_in_any_way() -> None:
    layer, (x_MD, context_MD) = layer_of(), given(50)
    end = layer_end(layer, FullPrecision())
    expected = end(x_MD, context_MD)
    apart = torch.stack([x_MD, context_MD], dim=1)
    for x, context in (
        (apart[:, 0], apart[:, 1]),
        (x_MD.t().contiguous().t(), context_MD.t().contiguous().t()),
        (x_MD[:1].expand(50, -1), context_MD),
        (x_MD.t()[:, :0].contiguous().t(), context_MD.t().clone().t()[:0]),
    ):
        wanted = end(x.contiguous(), context.contiguous())
        torch.testing.assert_close(end(x, context), wanted, rtol=0, atol=0)
    torch.testing.assert_close(end(x_MD, context_MD), expected, rtol=0, atol=0)  # nothing changed


@needs_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_candidate_that_is_no_number_stays_one_candidate(value: float) -> None:
    x_MD, context_MD = given(60)
    x_MD[7, 3] = value
    got = layer_end(layer_of(), FullPrecision())(x_MD, context_MD)
    assert got[7].isnan().all()
    assert got.isnan().sum() == DIM


@needs_kernels
@pytest.mark.parametrize(
    ("x", "context", "message"),
    [
        (torch.zeros(30, DIM), torch.zeros(29, DIM), "context must be"),
        (torch.zeros(30, DIM + 1), torch.zeros(30, DIM), "x must be"),
        (torch.zeros(30, DIM, device="meta"), torch.zeros(30, DIM), "x must be .* on the CPU"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x: Tensor, context: Tensor, message: str) -> None:
    end = layer_end(layer_of(), FullPrecision())
    assert isinstance(end, LayerEndKernel)
    with pytest.raises(ValueError, match=message):
        end(x, context)


def test_what_the_kernel_cannot_do_is_left_to_torch() -> None:
    half = HalfPrecision()
    for layer, precision in (
        (layer_of(20), FullPrecision()),
        (layer_of(1024), FullPrecision()),
        (layer_of(eps=1e-3), FullPrecision()),
        (layer_of(), half),
    ):
        end = layer_end(layer, precision)
        assert isinstance(end, PlainLayerEnd)
        inputs = given(9, layer.dim)
        tolerance = 1e-5 if precision is not half else 0.1
        expected = of_the_layer(layer, *inputs)
        torch.testing.assert_close(end(*inputs), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_every_row_is_in_one_block_and_threads_share_them(num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for num_rows in (0, 1, 5, 6, 7, 50, 96, 97, 500, 1000):
            tasks, at_once = even_blocks(num_rows)
            assert 1 <= at_once <= BLOCK_ROWS
            assert (tasks - 1) * at_once < num_rows <= tasks * at_once or num_rows == tasks == 0
            if num_rows >= 100:
                assert tasks % num_threads == 0
    finally:
        torch.set_num_threads(before)
