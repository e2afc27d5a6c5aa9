"""Attention of one user's candidates by a kernel of our own, on CPUs.

torch's fused kernel spends half of its time on exponentials and on products too narrow for its
GEMM. This one forms both in registers (`marm.kernels.attention_code`) and is as fast as a GEMM.

Shape legend: M candidates, N rows (the last of which is the null key), H heads, E head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marm.dense_attention import FusedAttention
from marm.kernels.attention_code import Tiling, compile_attention
from marm.kernels.checked_address import address_of, in_rows

_SMALLEST_SUM, _LARGEST_SUM = 2.0**-60, 2.0**90
"""Sums of weights between these were formed without anything that overflowed or vanished."""

_TASKS_PER_THREAD = 4  # an interrupted thread then leaves its tasks to others


class KernelAttention:
    """The kernel for heads of one width, compiled when the first of that width is made.

    Weights are bare powers, with the logit of the last row subtracted: none has to be formed twice.
    The sums of the weights tell whether that was enough, as they can't be far from 1 unless logits
    are tens apart; then the fused kernel computes it once more.
    """

    dtype = torch.float32

    def __init__(self, head_width: int, tiling: Tiling) -> None:
        self._tile = tiling.candidates
        self._run = compile_attention(head_width, tiling)
        self._width, self._otherwise = head_width, FusedAttention()

    def attend(self, q_HME: Tensor, k_HNE: Tensor, v_HNE: Tensor, bias_HN: Tensor) -> Tensor:
        """See `DenseAttention.attend`; keys and values lie alike in the CPU's memory.

        Raises:
            ValueError: when they don't, for another head width or other numbers, or when heads or
                rows of keys, values and biases differ.
        """
        num_heads, num_candidates, width = q_HME.shape
        if width != self._width:
            raise ValueError(f"this kernel is for heads of {self._width}, got one of {width}")
        if any(x.dtype != self.dtype for x in (q_HME, k_HNE, v_HNE)):
            kinds = f"{q_HME.dtype}, {k_HNE.dtype} and {v_HNE.dtype}"
            raise ValueError(f"this kernel reads {self.dtype}, got {kinds}; convert them first")
        num_rows = k_HNE.shape[1]
        if bias_HN.shape != (num_heads, num_rows) or num_rows == 0:
            raise ValueError(
                f"biases must be of {num_heads} heads and of the {num_rows} rows of the keys, the "
                f"null key among them; got {tuple(bias_HN.shape)}"
            )
        strides, rows_shape = _strides(k_HNE, v_HNE), (num_heads, num_rows, width)
        keys = address_of("keys", k_HNE, rows_shape, strides=(*strides, 1))
        values = address_of("values", v_HNE, rows_shape, strides=(*strides, 1))
        if num_candidates == 0:
            return torch.empty_like(q_HME)
        q_HME, bias_HN = in_rows(q_HME), in_rows(bias_HN.float())
        num_tiles = -(-num_candidates // self._tile)
        # A candidate's heads side by side, as the layer wants them next.
        out_MHE = q_HME.new_empty((num_candidates, num_heads, width))
        sums = q_HME.new_empty((num_heads, num_tiles, self._tile))
        scratch = q_HME.new_empty((num_heads, 2, num_tiles, width, self._tile))
        at_once, per_head = _shares(num_heads, num_tiles)
        query_strides, bias_strides = q_HME.stride(), bias_HN.stride()
        self._run(
            num_heads * per_head,
            address_of("queries", q_HME, tuple(q_HME.shape), strides=query_strides),
            keys,
            values,
            address_of("biases", bias_HN, (num_heads, num_rows), strides=bias_strides),
            out_MHE.data_ptr(),
            sums.data_ptr(),
            scratch.data_ptr(),
            num_candidates,
            num_rows,
            num_tiles,
            at_once,
            per_head,
            *query_strides[:2],
            *strides,
            bias_strides[0],
            num_heads * width,
        )
        smallest, largest = sums.aminmax()
        if not (smallest.item() > _SMALLEST_SUM and largest.item() < _LARGEST_SUM):
            return self._otherwise.attend(q_HME, k_HNE, v_HNE, bias_HN)
        return out_MHE.transpose(0, 1)


def _shares(num_heads: int, num_tiles: int) -> tuple[int, int]:
    """Tiles of a task, and tasks of a head."""
    tasks = torch.get_num_threads() * _TASKS_PER_THREAD
    at_once = -(-num_tiles // max(1, -(-tasks // num_heads)))
    return at_once, -(-num_tiles // at_once)


def _strides(k_HNE: Tensor, v_HNE: Tensor) -> tuple[int, int]:
    """From head to head and from row to row; the same of keys and values."""
    head, row, number = k_HNE.stride()
    if v_HNE.stride() != (head, row, number) or number != 1:
        raise ValueError(
            "keys and values must lie alike in memory, a head's part of a row in one piece; got "
            f"strides {k_HNE.stride()} and {v_HNE.stride()}"
        )
    return head, row
