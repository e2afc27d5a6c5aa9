"""Norm and linear map of candidates: the kernel against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from marm.kernels.native_code import host_registers
from marm.normed_linear import NormedLinearKernel, PlainNormedLinear, normed_linear
from marm.precision import FullPrecision, HalfPrecision

needs_kernels = pytest.mark.skipif(host_registers() is None, reason="no fused multiply-add here")

WIDTH, DIM = 32, 64


def norm_and_linear(
    width: int = WIDTH, dim: int = DIM, eps: float = 1e-5
) -> tuple[nn.LayerNorm, Tensor, Tensor]:
    torch.manual_seed(0)
    norm = nn.LayerNorm(width, eps)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.requires_grad_(False), torch.randn(dim, width), torch.randn(dim)


def test_the_plain_one_is_norm_and_linear() -> None:
    norm, weight, bias = norm_and_linear()
    x_MC = torch.randn(9, WIDTH)
    expected = nn.functional.linear(norm(x_MC), weight, bias)
    got = PlainNormedLinear(norm, weight, bias, FullPrecision())(x_MC)
    torch.testing.assert_close(got, expected)


@needs_kernels
@pytest.mark.parametrize("num_candidates", [0, 1, 7, 50, 500])
def test_the_kernel_equals_norm_and_linear(num_candidates: int) -> None:
    norm, weight, bias = norm_and_linear()
    kernel = normed_linear(norm, weight, bias, FullPrecision())
    assert isinstance(kernel, NormedLinearKernel)
    x_MC = torch.randn(WIDTH, num_candidates).t() * 5 + 2
    expected = nn.functional.linear(norm(x_MC), weight, bias)
    torch.testing.assert_close(kernel(x_MC), expected, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_a_bias_of_another_length_is_refused() -> None:
    norm, weight, _ = norm_and_linear()
    with pytest.raises(ValueError, match=r"bias must have shape \(64,\), got \(1,\)"):
        normed_linear(norm, weight, torch.zeros(1), FullPrecision())


@needs_kernels
def test_candidates_of_another_width_are_refused() -> None:
    kernel = normed_linear(*norm_and_linear(), FullPrecision())
    with pytest.raises(ValueError, match="source 0 must be"):
        kernel(torch.randn(5, WIDTH + 16))


def test_what_the_kernel_cannot_do_is_left_to_torch() -> None:
    full = FullPrecision()
    assert isinstance(normed_linear(*norm_and_linear(width=12), full), PlainNormedLinear)
    assert isinstance(normed_linear(*norm_and_linear(dim=20), full), PlainNormedLinear)
    assert isinstance(normed_linear(*norm_and_linear(eps=1e-3), full), PlainNormedLinear)
    assert isinstance(normed_linear(*norm_and_linear(), HalfPrecision()), PlainNormedLinear)
