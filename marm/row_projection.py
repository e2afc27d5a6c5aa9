"""Keys and values of a layer out of its rows.

Shape legend: N rows, P products, D columns of each (keys and values), K = P*D, C width of a key
input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from marm.kernels.checked_address import address_of, in_rows
from marm.kernels.product_code import EPSILON, even_blocks
from marm.kernels.projection_code import ProjectionShape, compile_projection
from marm.key_inputs import KeyInputs, blocks
from marm.precision import Precision
from marm.product_weights import by_tile, fold_norms


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
    """Norms and products in one pass over the rows, in single precision on the CPU."""

    def __init__(
        self,
        weight_KC: Tensor,
        norms: Sequence[nn.LayerNorm],
        shape: ProjectionShape,
        bias_K: Tensor | None = None,
    ) -> None:
        """The weights of all products lie one below the other, and so do their biases."""
        self._run, self._shape = compile_projection(shape), shape
        weight_KC, self._offset = fold_norms(weight_KC, norms, bias_K)
        self._weight = by_tile(weight_KC, shape.tile.columns)

    def project(self, keys: KeyInputs, out_2ND: Tensor) -> None:
        """See `RowProjection.project`; each half of ``out`` is contiguous.

        Raises:
            ValueError: when it is not, or when sources or ``out`` have other shapes than the norms
                and the weight, or ``out`` is not in single precision.
        """
        self.write(keys.sources(), len(keys), out_2ND)

    def write(self, sources: Sequence[Tensor], num_rows: int, out_PND: Tensor) -> None:
        """The products of rows whose ``sources`` lie side by side; raises as `project` does."""
        widths = self._shape.sources
        if len(sources) != len(widths):
            raise ValueError(f"rows must have {len(widths)} sources, got {len(sources)}")
        sources = [in_rows(source.float()) for source in sources]
        columns, apart = self._shape.columns, out_PND.stride(0)
        if apart < num_rows * columns:
            raise ValueError(f"the products in out lie {apart} numbers apart, so that they overlap")
        places = []
        for i, (x, width) in enumerate(zip(sources, widths, strict=True)):
            strides = (x.stride(0), 1)
            places += [address_of(f"source {i}", x, (num_rows, width), strides=strides), strides[0]]
        shape, strides_out = (self._shape.products, num_rows, columns), (apart, columns, 1)
        num_tasks, at_once = even_blocks(num_rows)
        self._run(
            num_tasks,
            num_rows,
            at_once,
            self._weight.data_ptr(),
            self._offset.data_ptr(),
            address_of("out", out_PND, shape, strides=strides_out),
            apart,
            *places,
        )


def row_projection(
    weight: Tensor, norms: Sequence[nn.LayerNorm], precision: Precision
) -> RowProjection:
    """The fastest projection of rows that these norms come before."""
    registers = precision.registers(weight.device)
    if registers is not None and all(norm.eps == EPSILON for norm in norms):
        widths = tuple(len(norm.weight) for norm in norms)
        shape = ProjectionShape.of(widths, 2, len(weight) // 2, registers)
        if shape is not None:
            return ProjectionKernel(weight, norms, shape)
    return BlockedProjection(weight, precision)
