"""Keys and values of a layer out of its rows.

Shape legend: N rows, D width of keys and of values, C of a key input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from marm.kernels.checked_address import address_of
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
        self._run, self._shape = compile_projection(shape), shape
        weight_2DC = weight.detach()
        scale_C = torch.cat([norm.weight.detach() for norm in norms])
        bias_C = torch.cat([norm.bias.detach() for norm in norms])
        by_tile = (weight_2DC * scale_C).view(-1, shape.tile, len(scale_C))
        self._weight = by_tile.transpose(1, 2).contiguous()
        self._offset = (weight_2DC.double() @ bias_C.double()).float()

    def project(self, keys: KeyInputs, out_2ND: Tensor) -> None:
        """See `RowProjection.project`; each half of ``out`` is contiguous.

        Raises:
            ValueError: when it is not, or when sources or ``out`` have other shapes than the norms
                and the weight, or ``out`` is not in single precision.
        """
        sources, widths = keys.sources(), self._shape.sources
        if len(sources) != len(widths):
            raise ValueError(f"key inputs must have {len(widths)} sources, got {len(sources)}")
        sources = [source.float() for source in sources]
        sources = [x if x.stride(-1) == 1 else x.contiguous() for x in sources]
        num_rows, columns, apart = len(keys), self._shape.columns, out_2ND.stride(0)
        if apart < num_rows * columns:
            raise ValueError(f"the halves of out lie {apart} numbers apart, so that they overlap")
        places = []
        for i, (x, width) in enumerate(zip(sources, widths, strict=True)):
            strides = (x.stride(0), 1)
            places += [address_of(f"source {i}", x, (num_rows, width), strides=strides), strides[0]]
        shape, strides_out = (self._shape.products, num_rows, columns), (apart, columns, 1)
        self._run(
            -(-num_rows // BLOCK_ROWS),
            self._weight.data_ptr(),
            self._offset.data_ptr(),
            address_of("out", out_2ND, shape, strides=strides_out),
            num_rows,
            apart,
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
