"""Multi-task heads: a multi-gate mixture of experts (MMoE) with one tower per task."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MixtureOfExpertsHeads(nn.Module):
    """One logit per task from shared experts, mixed by a gate of the task; ``[B, T]``.

    Inputs are not normalised: the size of an embedding tells how much is known of its id.
    """

    def __init__(self, input_dim: int, num_tasks: int, num_experts: int, expert_dim: int) -> None:
        super().__init__()
        self.num_experts, self.num_tasks, self.expert_dim = num_experts, num_tasks, expert_dim
        self.experts = nn.Linear(input_dim, num_experts * expert_dim)
        self.gates = nn.Linear(input_dim, num_tasks * num_experts)
        self.tower_weight = nn.Parameter(
            torch.randn(num_tasks, expert_dim) * expert_dim**-0.5 * 0.1
        )
        self.tower_bias = nn.Parameter(torch.zeros(num_tasks))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of ``inputs`` [B, input_dim]."""
        experts = nn.functional.gelu(self.experts(inputs)).view(
            -1, self.num_experts, self.expert_dim
        )
        gates = torch.softmax(self.gates(inputs).view(-1, self.num_tasks, self.num_experts), dim=-1)
        mixed = torch.einsum("bte,bed->btd", gates, experts)
        return (mixed * self.tower_weight).sum(dim=-1) + self.tower_bias
