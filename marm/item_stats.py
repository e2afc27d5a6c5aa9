"""Running label means of items: the wide input that puts a floor under every model.

Updated after each batch was predicted (test-then-train), so a prediction never sees its own label.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PRIOR_STRENGTH = 5.0
"""Pseudo-events of the overall mean that smooth the mean of an item."""


def stats_bytes(num_slots: int, num_tasks: int) -> int:
    """What `ItemStats` takes."""
    return 8 * num_slots * (1 + 2 * num_tasks)


class ItemStats(nn.Module):
    """Counts and label sums of every item slot, ``[num_slots]`` and ``[num_slots, T]``.

    In double precision: a single-precision counter stops growing at 2^24.
    """

    exposures: Tensor
    counts: Tensor
    sums: Tensor
    total_counts: Tensor
    total_sums: Tensor

    def __init__(self, num_slots: int, num_tasks: int) -> None:
        super().__init__()
        self.register_buffer("exposures", torch.zeros(num_slots, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_slots, num_tasks, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(num_slots, num_tasks, dtype=torch.float64))
        self.register_buffer("total_counts", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("total_sums", torch.zeros(num_tasks, dtype=torch.float64))

    @torch.no_grad()
    def update(self, slots_B: Tensor, targets_BT: Tensor) -> None:
        """Add a batch of targets; NaN marks a label that was not observed."""
        observed = ~targets_BT.isnan()
        values = torch.where(observed, targets_BT, torch.zeros_like(targets_BT))
        self.exposures.index_add_(0, slots_B, torch.ones_like(slots_B, dtype=torch.float64))
        self.counts.index_add_(0, slots_B, observed.double())
        self.sums.index_add_(0, slots_B, values.double())
        self.total_counts += observed.sum(dim=0)
        self.total_sums += values.sum(dim=0, dtype=torch.float64)

    @torch.no_grad()
    def means(self, slots_B: Tensor) -> Tensor:
        """Smoothed mean target of each item and task, ``[B, T]``."""
        prior = (self.total_sums + 1.0) / (self.total_counts + 2.0)
        sums = self.sums[slots_B] + PRIOR_STRENGTH * prior
        return (sums / (self.counts[slots_B] + PRIOR_STRENGTH)).float()

    @torch.no_grad()
    def log_frequency(self, slots_B: Tensor) -> Tensor:
        """Log of the item's share of all exposures, ``[B]``: log Q of the logQ correction."""
        total = self.exposures.sum() + len(self.exposures)
        return torch.log((self.exposures[slots_B] + 1.0) / total).float()
