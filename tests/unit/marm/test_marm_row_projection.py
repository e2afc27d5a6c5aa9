"""Projecting rows: the kernel against norms and linear maps one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from marm.kernels.native_code import Registers, host_registers
from marm.kernels.projection_code import ProjectionShape
from marm.key_inputs import GivenKeys
from marm.precision import FullPrecision, HalfPrecision
from marm.row_projection import BlockedProjection, ProjectionKernel, row_projection

pytestmark = pytest.mark.skipif(host_registers() is None, reason="no fused multiply-add here")

REGISTERS = [Registers(8, 16), Registers(4, 32)]
if host_registers() == Registers(16, 32):
    REGISTERS.append(Registers(16, 32))

DIM = 64


class Sources(GivenKeys):
    """Key inputs that know what they are made of."""

    def __init__(self, parts: list[Tensor], norms: list[nn.LayerNorm]) -> None:
        normed = [norm(part) for norm, part in zip(norms, parts, strict=True)]
        super().__init__(torch.cat(normed, dim=1))
        self._parts = parts

    def sources(self) -> list[Tensor]:
        return self._parts


class Given(GivenKeys):
    """Sources alone, whatever they are."""

    def __init__(self, num_rows: int, parts: list[Tensor]) -> None:
        super().__init__(torch.empty(num_rows, 0))
        self._parts = parts

    def sources(self) -> list[Tensor]:
        return self._parts


def norms_of(widths: list[int], eps: float = 1e-5) -> list[nn.LayerNorm]:
    norms = [nn.LayerNorm(width, eps) for width in widths]
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return [norm.requires_grad_(False) for norm in norms]


@pytest.mark.parametrize("registers", REGISTERS, ids=lambda it: f"{it.lanes} lanes")
@pytest.mark.parametrize("widths", [[16], [32, 16], [16, 48, 16]])
def test_the_kernel_equals_norm_and_linear(widths: list[int], registers: Registers) -> None:
    torch.manual_seed(0)
    norms, weight = norms_of(widths), torch.randn(2 * DIM, sum(widths))
    shape = ProjectionShape.of(tuple(widths), 2, DIM, registers)
    assert shape is not None
    kernel = ProjectionKernel(weight, norms, shape)
    for num_rows in (0, 1, 5, 48, 49, 103, 1100):
        wide = torch.randn(num_rows, 3, sum(widths)) * 10 + 100  # rows that lie apart, off centre
        keys = Sources(list(wide[:, 1].split(widths, dim=1)), norms)
        got, expected = (torch.full((2, num_rows + 1, DIM), 7.0) for _ in range(2))
        kernel.project(keys, got[:, :-1])
        BlockedProjection(weight, FullPrecision()).project(keys, expected[:, :-1])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_other_numbers_than_single_precision_are_read() -> None:
    norms, weight = norms_of([16]), torch.randn(2 * DIM, 16)
    source = torch.randn(16, 30).t().to(torch.float16)
    projection = row_projection(weight, norms, FullPrecision())
    assert isinstance(projection, ProjectionKernel)
    got, expected = torch.empty(2, 30, DIM), torch.empty(2, 30, DIM)
    BlockedProjection(weight, FullPrecision()).project(Sources([source.float()], norms), expected)
    projection.project(Given(30, [source]), got)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([torch.zeros(30, 16)], "must have 2 sources, got 1"),
        ([torch.zeros(30, 16)] * 3, "must have 2 sources, got 3"),
        ([torch.zeros(30, 16), torch.zeros(30, 16)], "source 1 must be"),
        ([torch.zeros(29, 16), torch.zeros(30, 32)], "source 0 must be"),
        ([torch.zeros(30, 16), torch.zeros(30, 32, device="meta")], "source 1 must be .* the CPU"),
    ],
)
def test_sources_that_do_not_fit_the_norms_are_refused(parts: list[Tensor], message: str) -> None:
    projection = row_projection(torch.randn(2 * DIM, 48), norms_of([16, 32]), FullPrecision())
    assert isinstance(projection, ProjectionKernel)
    with pytest.raises(ValueError, match=message):
        projection.project(Given(30, parts), torch.empty(2, 30, DIM))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(2, 29, DIM), "overlap|out must be"),
        (torch.empty(2, 31, DIM), "out must be"),
        (torch.empty(3, 30, DIM), "out must be"),
        (torch.empty(2, 30, DIM + 1)[:, :, :-1], "out must be"),
        (torch.empty(2, DIM, 30).transpose(1, 2), "out must be"),
        (torch.empty(2, 30, DIM, dtype=torch.float64), "out must be torch.float32"),
        (torch.empty(1, 30, DIM).expand(2, -1, -1), "overlap"),
        (torch.empty(2, 30, DIM, device="meta"), "out must be .* on the CPU"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(out: Tensor, message: str) -> None:
    projection = row_projection(torch.randn(2 * DIM, 16), norms_of([16]), FullPrecision())
    with pytest.raises(ValueError, match=message):
        projection.project(Given(30, [torch.randn(30, 16)]), out)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_no_number_stays_one_row(value: float) -> None:
    norms, weight = norms_of([16]), torch.randn(2 * DIM, 16)
    source = torch.randn(60, 16)
    source[7, 3] = value
    got = torch.empty(2, 60, DIM)
    row_projection(weight, norms, FullPrecision()).project(Sources([source], norms), got)
    assert got[:, 7].isnan().all()
    assert got.isnan().sum() == 2 * DIM


def test_rows_without_variance_are_zero() -> None:
    norms, weight = norms_of([16]), torch.randn(2 * DIM, 16)
    source, got = torch.full((9, 16), 3.0), torch.empty(2, 9, DIM)
    row_projection(weight, norms, FullPrecision()).project(Sources([source], norms), got)
    expected = (weight @ norms[0].bias).view(2, 1, DIM).expand(2, 9, DIM)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("widths", "columns", "eps"), [([12], DIM, 1e-5), ([16], 20, 1e-5), ([16], DIM, 1e-3)]
)
def test_what_the_kernel_cannot_do_is_left_to_torch(
    widths: list[int], columns: int, eps: float
) -> None:
    weight = torch.randn(2 * columns, sum(widths))
    projection = row_projection(weight, norms_of(widths, eps), FullPrecision())
    assert isinstance(projection, BlockedProjection)


def test_half_precision_is_left_to_torch() -> None:
    projection = row_projection(torch.randn(2 * DIM, 16), norms_of([16]), HalfPrecision())
    assert isinstance(projection, BlockedProjection)


def test_keys_without_sources_say_so() -> None:
    with pytest.raises(ValueError, match="normalised already"):
        GivenKeys(torch.zeros(3, 4)).sources()
