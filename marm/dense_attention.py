"""Attention of one user's candidates to all of his rows, as frozen layers ask for it.

Shape legend: M candidates, N rows (the last of which is the null key), H heads, E head width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class DenseAttention(Protocol):
    """A kernel, for queries, keys and values of one kind of numbers."""

    def attend(self, q_HME: Tensor, k_HNE: Tensor, v_HNE: Tensor, bias_HN: Tensor) -> Tensor:
        """Softmax over all rows of ``q @ k.T + bias``, times ``v``: ``[H, M, E]``.

        ``q`` is already scaled; ``bias`` is in single precision and the same for all candidates.
        Memory does not grow with M * N. NaN comes out where NaN went in.
        """
        ...


class FusedAttention:
    """torch's fused attention: the reference, right for any logits, on any device."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def attend(self, q_HME: Tensor, k_HNE: Tensor, v_HNE: Tensor, bias_HN: Tensor) -> Tensor:
        """See `DenseAttention.attend`."""
        mask = bias_HN.to(self.dtype)[None, :, None, :]
        mixed = nn.functional.scaled_dot_product_attention(
            q_HME[None], k_HNE[None], v_HNE[None], attn_mask=mask, scale=1.0
        )
        return mixed[0]
