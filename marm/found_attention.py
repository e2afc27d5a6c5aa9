"""Attention of each candidate to the rows that a search found for it, and to the null key (Eq. 9).

Shape legend: M candidates, K found rows of each, N rows, H heads, E head width, D = H*E.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from marm.kernels.checked_address import address_of
from marm.kernels.found_code import TASK_CANDIDATES, FoundShape, compile_found
from marm.kernels.native_code import host_registers
from marm.kernels.vector_code import LOG2_E
from marm.search import Found


@dataclass(frozen=True)
class SearchedRows:
    """Keys, values and biases of a layer's rows, without the null key."""

    k_ND: Tensor
    v_ND: Tensor
    bias_NH: Tensor  # contiguous, in single precision
    null_H: Tensor  # logit of the null key


class FoundAttention(Protocol):
    """How a frozen layer attends to found rows."""

    def attend(self, q_MD: Tensor, rows: SearchedRows, found: Found) -> Tensor:
        """Softmax over the found rows and the null key, ``[M, D]`` in single precision."""
        ...


class GatheredAttention:
    """Found rows side by side: the reference, on any device and at any precision."""

    def attend(self, q_MD: Tensor, rows: SearchedRows, found: Found) -> Tensor:
        """See `FoundAttention.attend`."""
        num_candidates, num_found = found.position.shape
        num_heads = rows.bias_NH.shape[1]
        heads = (num_candidates, num_found, num_heads, -1)
        products = nn.functional.embedding(found.position, rows.k_ND).mul_(q_MD.unsqueeze(1))
        logits_MKH = products.view(heads).sum(dim=3, dtype=torch.float32)
        logits_MKH += nn.functional.embedding(found.position, rows.bias_NH)
        logits_MKH.masked_fill_(~found.valid.unsqueeze(2), float("-inf"))
        null_M1H = rows.null_H.expand(num_candidates, 1, -1)
        logits_HMK = torch.cat([logits_MKH, null_M1H], dim=1).permute(2, 0, 1).contiguous()
        weights_HMK = torch.softmax(logits_HMK, dim=2)[:, :, :-1].contiguous()
        mixed = [
            nn.functional.embedding_bag(
                found.position, v_NE, per_sample_weights=weights_MK, mode="sum"
            )
            for v_NE, weights_MK in zip(
                rows.v_ND.float().chunk(num_heads, dim=1), weights_HMK, strict=True
            )
        ]
        return torch.cat(mixed, dim=1)


class FoundKernel:
    """A kernel that reads found rows where they are, in single precision on the CPU."""

    def __init__(self, shape: FoundShape) -> None:
        self._run = compile_found(shape)
        self._shape = shape

    def attend(self, q_MD: Tensor, rows: SearchedRows, found: Found) -> Tensor:
        """See `FoundAttention.attend`.

        Raises:
            ValueError: when keys or values are not contiguous, shapes or kinds of numbers do not
                fit each other, or a position is of no row, also one that doesn't count.
        """
        num_candidates, num_found = found.position.shape
        num_rows, dim = len(rows.k_ND), self._shape.dim
        num_heads, padded = self._shape.num_heads, self._shape.padded(num_found)
        _check_positions(found.position, num_rows)
        queries = (q_MD * LOG2_E).contiguous()
        bias = (rows.bias_NH.float() * LOG2_E).contiguous()
        null = (rows.null_H.float() * LOG2_E).contiguous()
        position, valid = found.position.contiguous(), found.valid.contiguous()
        scratch = queries.new_empty((num_candidates, num_heads, padded))
        out = torch.empty_like(queries)
        self._run(
            -(-num_candidates // TASK_CANDIDATES),
            address_of("queries", queries, (num_candidates, dim)),
            address_of("keys", rows.k_ND, (num_rows, dim)),
            address_of("values", rows.v_ND, (num_rows, dim)),
            address_of("biases", bias, (num_rows, num_heads)),
            address_of("null logits", null, (num_heads,)),
            address_of("positions", position, (num_candidates, num_found), torch.int64),
            address_of("validity", valid, (num_candidates, num_found), torch.bool),
            address_of("scratch", scratch, (num_candidates, num_heads, padded)),
            address_of("outputs", out, (num_candidates, dim)),
            num_candidates,
            num_found,
            padded,
        )
        return out


def _check_positions(position_MK: Tensor, num_rows: int) -> None:
    """Tens of microseconds, beside milliseconds of attention: memory is read at these places."""
    if position_MK.numel() == 0:
        return
    least, greatest = (int(x) for x in position_MK.aminmax())
    if least < 0 or greatest >= num_rows:
        raise ValueError(
            f"positions must be of one of {num_rows} rows, got {least} to {greatest}; rows that do "
            "not count need a position too"
        )


def found_attention(
    num_heads: int, head_width: int, dtype: torch.dtype, device: torch.device
) -> FoundAttention:
    """The fastest attention to found rows, for keys and values of ``dtype``."""
    registers = host_registers() if device.type == "cpu" and dtype == torch.float32 else None
    shape = None if registers is None else FoundShape.of(num_heads, head_width, registers)
    return GatheredAttention() if shape is None else FoundKernel(shape)
