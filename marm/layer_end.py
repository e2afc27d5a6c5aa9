"""How a frozen layer ends: residual connection and feed-forward block of the candidates.

Shape legend: M candidates, D width of the layer.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from marm.attention import TargetAttention
from marm.kernels.checked_address import address_of, in_rows
from marm.kernels.layer_end_code import LayerEndShape, compile_layer_end
from marm.kernels.native_code import host_registers
from marm.kernels.product_code import EPSILON, even_blocks
from marm.normed_linear import PlainNormedLinear
from marm.precision import Precision


class LayerEnd(Protocol):
    """What a frozen layer does with what its candidates attended to."""

    def __call__(self, x_MD: Tensor, context_MD: Tensor) -> Tensor:
        """The layer's outputs ``[M, D]`` in single precision; ``x`` is what is added to."""
        ...


class PlainLayerEnd:
    """One operator after the other: the reference, on any device and at any precision."""

    def __init__(self, layer: TargetAttention, precision: Precision) -> None:
        norm, wide, narrow = _feed_forward(layer)
        self._precision = precision
        self._wide = PlainNormedLinear(norm, wide.weight, wide.bias, precision)
        self._output, self._narrow = (
            (precision.weight(linear.weight), linear.bias.detach().to(precision.dtype))
            for linear in (layer.output, narrow)
        )

    def __call__(self, x_MD: Tensor, context_MD: Tensor) -> Tensor:
        """See `LayerEnd`."""
        y_MD = x_MD + self._precision.linear(context_MD, *self._output)
        hidden = nn.functional.gelu(self._wide(y_MD))
        return y_MD + self._precision.linear(hidden, *self._narrow)


class LayerEndKernel:
    """All of it in one pass over the candidates, in single precision on the CPU.

    Weight and bias of the norm are part of the product: ``W (x * w + b) = (W * w) x + W b``.
    """

    def __init__(self, layer: TargetAttention, shape: LayerEndShape) -> None:
        norm, wide, narrow = _feed_forward(layer)
        self._run, self._shape = compile_layer_end(shape), shape
        wide_weight, wide_bias = wide.weight.detach(), wide.bias.detach()
        shift = wide_weight.double() @ norm.bias.detach().double()
        self._weights = [
            _by_tile(weight.detach(), shape.tile)
            for weight in (layer.output.weight, wide_weight * norm.weight.detach(), narrow.weight)
        ]
        self._biases = [
            bias.detach().clone()
            for bias in (layer.output.bias, (wide_bias + shift).float(), narrow.bias)
        ]

    def __call__(self, x_MD: Tensor, context_MD: Tensor) -> Tensor:
        """See `LayerEnd`.

        Raises:
            ValueError: when they have other shapes than the layer, or are not in single precision.
        """
        num_candidates = x_MD.shape[0]
        out_MD = x_MD.new_empty((num_candidates, self._shape.dim))
        arrays = {"x": x_MD, "context": context_MD, "out": out_MD}
        arrays = {name: in_rows(array) for name, array in arrays.items()}
        places = []
        for name, array in arrays.items():
            strides, shape = (array.stride(0), 1), (num_candidates, self._shape.dim)
            places += [address_of(name, array, shape, strides=strides), strides[0]]
        tasks, at_once = even_blocks(num_candidates)
        self._run(
            tasks,
            num_candidates,
            at_once,
            *places,
            *(weight.data_ptr() for weight in self._weights),
            *(bias.data_ptr() for bias in self._biases),
        )
        return out_MD


def layer_end(layer: TargetAttention, precision: Precision) -> LayerEnd:
    """The fastest end of this layer."""
    registers = host_registers() if layer.output.weight.device.type == "cpu" else None
    norm, wide, _ = _feed_forward(layer)
    if registers is None or precision.dtype != torch.float32 or norm.eps != EPSILON:
        return PlainLayerEnd(layer, precision)
    shape = LayerEndShape.of(layer.dim, len(wide.weight), registers)
    return PlainLayerEnd(layer, precision) if shape is None else LayerEndKernel(layer, shape)


def _feed_forward(layer: TargetAttention) -> tuple[nn.LayerNorm, nn.Linear, nn.Linear]:
    norm, wide, activation, narrow = layer.feed_forward
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(wide, nn.Linear)
    assert isinstance(activation, nn.GELU)
    assert isinstance(narrow, nn.Linear)
    return norm, wide, narrow


def _by_tile(weight_KC: Tensor, tile: int) -> Tensor:
    return weight_KC.view(-1, tile, weight_KC.shape[1]).transpose(1, 2).contiguous()
