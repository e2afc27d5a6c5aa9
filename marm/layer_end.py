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
from marm.kernels.product_code import EPSILON, even_blocks
from marm.normed_linear import PlainNormedLinear
from marm.precision import FrozenLinear, Precision
from marm.product_weights import by_tile, fold_norms


class LayerEnd(Protocol):
    """What a frozen layer does with what its candidates attended to."""

    def __call__(self, x_MD: Tensor, context_MD: Tensor) -> Tensor:
        """The layer's outputs ``[M, D]`` in single precision; ``x`` is what is added to."""
        ...


class PlainLayerEnd:
    """One operator after the other: the reference, on any device and at any precision."""

    def __init__(self, layer: TargetAttention, precision: Precision) -> None:
        norm, wide, narrow = _feed_forward(layer)
        self._wide = PlainNormedLinear(norm, wide.weight, wide.bias, precision)
        self._output = FrozenLinear(layer.output.weight, layer.output.bias, precision)
        self._narrow = FrozenLinear(narrow.weight, narrow.bias, precision)

    def __call__(self, x_MD: Tensor, context_MD: Tensor) -> Tensor:
        """See `LayerEnd`."""
        y_MD = x_MD + self._output(context_MD)
        return y_MD + self._narrow(nn.functional.gelu(self._wide(y_MD)))


class LayerEndKernel:
    """All of it in one pass over the candidates, in single precision on the CPU; no gradients."""

    def __init__(self, layer: TargetAttention, shape: LayerEndShape) -> None:
        norm, wide, narrow = _feed_forward(layer)
        self._run, self._shape = compile_layer_end(shape), shape
        wide_weight, wide_bias = fold_norms(wide.weight, [norm], wide.bias)
        weights = (layer.output.weight, wide_weight, narrow.weight)
        biases = (layer.output.bias, wide_bias, narrow.bias)
        self._weights = [by_tile(weight, shape.tile.columns) for weight in weights]
        self._biases = [bias.detach().float().contiguous() for bias in biases]

    def __call__(self, x_MD: Tensor, context_MD: Tensor) -> Tensor:
        """See `LayerEnd`.

        Raises:
            ValueError: when they have other shapes than the layer.
        """
        num_candidates = x_MD.shape[0]
        out_MD = x_MD.new_empty((num_candidates, self._shape.dim), dtype=torch.float32)
        arrays = {"x": x_MD, "context": context_MD, "out": out_MD}
        arrays = {name: in_rows(array.float()) for name, array in arrays.items()}
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
    norm, wide, _ = _feed_forward(layer)
    registers = precision.registers(wide.weight.device)
    if registers is not None and norm.eps == EPSILON:
        shape = LayerEndShape.of(layer.dim, len(wide.weight), registers)
        if shape is not None:
            return LayerEndKernel(layer, shape)
    return PlainLayerEnd(layer, precision)


def _feed_forward(layer: TargetAttention) -> tuple[nn.LayerNorm, nn.Linear, nn.Linear]:
    norm, wide, activation, narrow = layer.feed_forward
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(wide, nn.Linear)
    assert isinstance(activation, nn.GELU)
    assert isinstance(narrow, nn.Linear)
    return norm, wide, narrow
