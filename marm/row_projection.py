"""Keys and values of a layer out of its rows.

Shape legend: N rows, D width of keys and of values, C of a key input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from marm.kernels.native_code import host_registers
from marm.kernels.projection_code import BLOCK_ROWS, ProjectionShape, compile_projection
from marm.key_inputs import KeyInputs, blocks
from marm.precision import Precision


class RowProjection(Protocol):
    """How a frozen layer projects rows."""

    def project(self, keys: KeyInputs, out_2ND: Tensor) -> None:
        """Write keys and values of all rows, those of all heads side by side."""
        ...


class BlockedProjection:
    """A block of rows after the other: the reference, on any device and at any precision."""

    def __init__(self, weight: Tensor, precision: Precision) -> None:
        self._weight, self._precision = precision.weight(weight), precision

    def project(self, keys: KeyInputs, out_2ND: Tensor) -> None:
        """See `RowProjection.project`."""
        for part in blocks(len(keys)):
            both = self._precision.linear(keys.rows(part), self._weight)
            out_2ND[:, part] = both.view(len(both), 2, -1).transpose(0, 1)


class ProjectionKernel:
    """Norm and projection in one pass over the rows, in single precision on the CPU.

    Weight and bias of the norms are part of the product: ``W (x * w + b) = (W * w) x + W b``.
    """

    def __init__(
        self, weight: Tensor, norms: Sequence[nn.LayerNorm], shape: ProjectionShape
    ) -> None:
        self._run = compile_projection(shape)
        weight_2DC = weight.detach()
        scale_C = torch.cat([norm.weight.detach() for norm in norms])
        bias_C = torch.cat([norm.bias.detach() for norm in norms])
        by_tile = (weight_2DC * scale_C).view(-1, shape.tile, len(scale_C))
        self._weight = by_tile.transpose(1, 2).contiguous()
        self._offset = (weight_2DC.double() @ bias_C.double()).float()

    def project(self, keys: KeyInputs, out_2ND: Tensor) -> None:
        """See `RowProjection.project`; each half of ``out`` is contiguous."""
        sources = [source.float() for source in keys.sources()]
        sources = [x if x.stride(1) == 1 else x.contiguous() for x in sources]
        places = [number for x in sources for number in (x.data_ptr(), x.stride(0))]
        self._run(
            -(-len(keys) // BLOCK_ROWS),
            *(x.data_ptr() for x in (self._weight, self._offset, out_2ND)),
            len(keys),
            out_2ND.stride(0),
            *places,
        )


def row_projection(
    weight: Tensor, norms: Sequence[nn.LayerNorm], precision: Precision
) -> RowProjection:
    """The fastest projection of rows that these norms come before."""
    registers = host_registers() if weight.device.type == "cpu" else None
    plain = precision.dtype == torch.float32 and all(norm.eps == 1e-5 for norm in norms)
    if registers is None or not plain:
        return BlockedProjection(weight, precision)
    widths = tuple(len(norm.weight) for norm in norms)
    shape = ProjectionShape.of(widths, 2, len(weight) // 2, registers)
    if shape is None:
        return BlockedProjection(weight, precision)
    return ProjectionKernel(weight, norms, shape)
