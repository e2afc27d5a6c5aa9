"""What MARM saves: the causal decoder over the history, computed within the request.

The same layers (weights, heads, key inputs, feed-forward) as the model with memory, so that the
history's outputs are what the memory would hold. Keys and values of a layer are formed once, for
the history's own queries and for all candidates. To its favour it leaves out the recency biases and
the null key, which let torch's fused causal kernel run at its best.

Shape legend: M candidates, N rows, oldest first, D width, F feature dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from marm.attention import MultiLayerTargetAttention, TargetAttention
from marm.frozen_layer import FrozenLayer
from marm.key_inputs import GivenKeys, Workspace
from marm.precision import FullPrecision


class FullDecoder:
    """A decoder of L+1 layers over the raw history, and candidates that attend to every layer.

    ``history_layers`` is the number of layers that the history itself goes through: L+1 for the
    whole decoder, L to leave out the last one, whose outputs no candidate reads.
    """

    def __init__(self, attention: MultiLayerTargetAttention, history_layers: int) -> None:
        modules = [attention.first, *attention.layers]
        precision = FullPrecision()
        workspace = Workspace()
        self._layers = [
            FrozenLayer(layer, precision, workspace)
            for layer in modules
            if isinstance(layer, TargetAttention)
        ]
        self._live_norms = list(attention.feature_norms)
        self._memory_norms = list(attention.memory_norms)
        self._history_layers = history_layers

    def candidates(self, query_MF: Tensor, live_NF: Tensor) -> Tensor:
        """Outputs of the last layer for the candidates, ``[M, D]``."""
        x_M, x_N = query_MF, live_NF
        for index, layer in enumerate(self._layers):
            inputs_NC = self._live_norms[index](live_NF)
            if index > 0:
                inputs_NC = torch.cat([self._memory_norms[index - 1](x_N), inputs_NC], dim=1)
            k_HNE, v_HNE = (x[:, :-1] for x in layer.keys_and_values(GivenKeys(inputs_NC)))
            if index < self._history_layers:
                own = _attend(layer.queries(x_N), k_HNE, v_HNE, is_causal=True)
                x_N = layer.finish(x_N, own)
            x_M = layer.finish(x_M, _attend(layer.queries(x_M), k_HNE, v_HNE, is_causal=False))
        return x_M


def _attend(q_HME: Tensor, k_HNE: Tensor, v_HNE: Tensor, is_causal: bool) -> Tensor:
    mixed = nn.functional.scaled_dot_product_attention(
        q_HME[None], k_HNE[None], v_HNE[None], is_causal=is_causal, scale=1.0
    )
    return mixed[0]
