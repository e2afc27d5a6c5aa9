"""Weights as the kernels of products want them (`marm.kernels.product_code`).

Shape legend: C columns of a row, K of the product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def fold_norms(
    weight_KC: Tensor, norms: Sequence[nn.LayerNorm], bias_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weight and bias for rows that are standardised only: those of the norms are part of them.

    ``W (x * w + b) + bias = (W * w) x + (W b + bias)``, where the norms' parts lie side by side.
    """
    weight_KC = weight_KC.detach().double()
    scale_C = torch.cat([norm.weight.detach() for norm in norms])
    shift_C = torch.cat([norm.bias.detach() for norm in norms])
    offset_K = weight_KC @ shift_C.double()
    if bias_K is not None:
        if bias_K.shape != offset_K.shape:
            raise ValueError(
                f"the bias must have shape {tuple(offset_K.shape)}, got {tuple(bias_K.shape)}"
            )
        offset_K = offset_K + bias_K.detach()
    return (weight_KC * scale_C).float(), offset_K.float()


def by_tile(weight_KC: Tensor, tile: int) -> Tensor:
    """``[K / tile, C, tile]`` in single precision, contiguous."""
    whole = weight_KC.detach().float().view(-1, tile, weight_KC.shape[1])
    return whole.transpose(1, 2).contiguous()
