"""Norm and linear map of a frozen layer's candidates.

Shape legend: M candidates, C width of the input, D of the output.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from marm.kernels.product_code import EPSILON
from marm.kernels.projection_code import ProjectionShape
from marm.precision import FrozenLinear, Precision
from marm.row_projection import ProjectionKernel


class NormedLinear(Protocol):
    """A linear map of standardised candidates."""

    def __call__(self, x_MC: Tensor) -> Tensor:
        """``[M, D]``, in the precision that the layer computes with."""
        ...


class PlainNormedLinear:
    """One operator after the other: the reference, on any device and at any precision."""

    def __init__(
        self, norm: nn.LayerNorm, weight: Tensor, bias: Tensor, precision: Precision
    ) -> None:
        self._norm = norm.weight.detach(), norm.bias.detach(), norm.eps
        self._linear = FrozenLinear(weight, bias, precision)

    def __call__(self, x_MC: Tensor) -> Tensor:
        """See `NormedLinear`."""
        normed = nn.functional.layer_norm(x_MC, x_MC.shape[-1:], *self._norm)
        return self._linear(normed)


class NormedLinearKernel:
    """The kernel that projects rows, for candidates; no gradients."""

    def __init__(
        self, norm: nn.LayerNorm, weight: Tensor, bias: Tensor, shape: ProjectionShape
    ) -> None:
        self._projection = ProjectionKernel(weight, [norm], shape, bias)
        self._width = len(weight)

    def __call__(self, x_MC: Tensor) -> Tensor:
        """See `NormedLinear`.

        Raises:
            ValueError: for candidates of another width.
        """
        num_candidates = x_MC.shape[0]
        out_1MD = x_MC.new_empty((1, num_candidates, self._width), dtype=torch.float32)
        self._projection.write([x_MC], num_candidates, out_1MD)
        return out_1MD[0]


def normed_linear(
    norm: nn.LayerNorm, weight: Tensor, bias: Tensor, precision: Precision
) -> NormedLinear:
    """The fastest way to ``norm`` and then map candidates."""
    registers = precision.registers(weight.device)
    if registers is not None and norm.eps == EPSILON:
        shape = ProjectionShape.of((weight.shape[1],), 1, len(weight), registers)
        if shape is not None:
            return NormedLinearKernel(norm, weight, bias, shape)
    return PlainNormedLinear(norm, weight, bias, precision)
