"""The highest scores of each candidate.

Shape legend: M candidates, N scores of each, K of them highest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marm.kernels.checked_address import address_of
from marm.kernels.highest_code import TASK_ROWS, compile_highest
from marm.kernels.native_code import host_registers

_GROUP = 8
"""Scores per group of the first pass. The K best lie in the K groups with the best maxima, so few
scores are compared one by one; N/K is near the square of the best size for usual N and K."""


def highest(scores_MN: Tensor, k: int) -> Tensor:
    """Positions of the ``k`` highest scores of each candidate, ``[M, k]``, in no order.

    NaN counts as the highest. Among equal scores any may be taken.

    Raises:
        ValueError: unless ``k`` is between 0 and the number of scores.
    """
    if not 0 <= k <= scores_MN.shape[1]:
        raise ValueError(f"there are no {k} highest of {scores_MN.shape[1]} scores")
    registers = host_registers() if scores_MN.device.type == "cpu" else None
    if (
        registers is None
        or scores_MN.dtype != torch.float32
        or scores_MN.shape[1] < registers.lanes
    ):
        return highest_grouped(scores_MN, k)
    scores_MN = scores_MN.contiguous()
    position = torch.empty((len(scores_MN), k), dtype=torch.int64, device=scores_MN.device)
    compile_highest(registers.lanes)(
        -(-len(scores_MN) // TASK_ROWS),
        address_of("scores", scores_MN, tuple(scores_MN.shape)),
        address_of("positions", position, (len(scores_MN), k), torch.int64),
        *scores_MN.shape,
        k,
    )
    return position


def prepare_highest() -> None:
    """Compile what `highest` uses on this CPU, so that no request waits for it."""
    registers = host_registers()
    if registers is not None:
        compile_highest(registers.lanes)


def highest_grouped(scores_MN: Tensor, k: int) -> Tensor:
    """`highest` by torch's operators: the reference, on any device."""
    num_groups = scores_MN.shape[1] // _GROUP
    if num_groups <= 2 * k:
        return torch.topk(scores_MN, k, dim=1, sorted=False).indices
    # Groups are interleaved (position modulo their number): neighbours score alike, and the maxima
    # of neighbouring memory are one vector operation.
    grouped = scores_MN[:, : num_groups * _GROUP].reshape(-1, _GROUP, num_groups)
    best_groups = torch.topk(grouped.amax(dim=1), k, dim=1, sorted=False).indices
    offsets = torch.arange(_GROUP, device=scores_MN.device) * num_groups
    candidates = (best_groups[:, None, :] + offsets[:, None]).flatten(1)
    left_over = torch.arange(num_groups * _GROUP, scores_MN.shape[1], device=scores_MN.device)
    candidates = torch.cat([candidates, left_over.expand(len(scores_MN), -1)], dim=1)
    chosen = torch.topk(scores_MN.gather(1, candidates), k, dim=1, sorted=False).indices
    return candidates.gather(1, chosen)
