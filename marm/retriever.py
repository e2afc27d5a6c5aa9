"""The retrieval model: the user id queries the memory, items are found by inner product.

Section 2.3 and Fig. 4(c): no candidate exists yet, so the user-id embedding takes the place of the
target item through all layers, over the user's newest rows. Trained with an in-batch softmax whose
logits are corrected by log Q, the log frequency of each item as a negative.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from marm.config import ModelConfig
from marm.inputs import ModelInputs
from marm.items import ItemFeatures
from marm.memory import UserRows
from marm.network import Embedded, SequenceNetwork, embed_items
from marm.stage_model import Net, StageModel, StepOutput, check_single_user

TEMPERATURE = 0.1


class RetrieverNet(nn.Module):
    """Dense half: a user tower over the memory and an item tower, both to unit vectors."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sequence = SequenceNetwork(config)
        self.user_tower = nn.Sequential(
            nn.LayerNorm(config.attention_dim), nn.Linear(config.attention_dim, config.output_dim)
        )
        self.item_tower = nn.Sequential(
            nn.LayerNorm(config.feature_dim),
            nn.Linear(config.feature_dim, config.expert_dim),
            nn.GELU(),
            nn.Linear(config.expert_dim, config.output_dim),
        )

    def forward(
        self, embedded: Embedded, block_memory_BLD: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unit user and item vectors of the batch, both ``[B, V]``."""
        return (
            self.user_vectors(embedded, block_memory_BLD),
            self.item_vectors(embedded.target_BF),
        )

    def user_vectors(self, embedded: Embedded, block_memory_BLD: Tensor | None = None) -> Tensor:
        """``[B, V]`` unit vectors of the users of the queries."""
        query = embedded.user_BF + embedded.context_BF
        outputs = self.sequence(query, embedded, block_memory_BLD)
        return nn.functional.normalize(self.user_tower(outputs[-1]), dim=-1)

    def item_vectors(self, item_BF: Tensor) -> Tensor:
        """``[B, V]`` unit vectors of embedded items."""
        return nn.functional.normalize(self.item_tower(item_BF), dim=-1)


class Retriever(StageModel):
    """User and item vectors whose inner product ranks items for a user."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, (config.positive_task,), RetrieverNet(config))

    @property
    def _towers(self) -> RetrieverNet:
        assert isinstance(self.net, RetrieverNet)
        return self.net

    def training_forward(
        self,
        net: Net,
        embedded: Embedded,
        labels_B: NDArray[np.float32],
        block_memory_BLD: Tensor | None = None,
    ) -> StepOutput:
        """See `StageModel.training_forward`; only positive events are queries of the softmax."""
        user_BV, item_BV = (vectors.float() for vectors in net(embedded, block_memory_BLD))
        slots = self.item_slots(embedded.inputs)
        with torch.autocast(user_BV.device.type, enabled=False):  # half precision would make ties
            logits = user_BV @ item_BV.T / TEMPERATURE
        own = logits.diagonal()
        corrected = logits - self.stats.log_frequency(slots)[None, :]
        # The positive item is no negative of itself, wherever else in the batch it occurs.
        same_item = slots[:, None] == slots[None, :]
        same_item.fill_diagonal_(False)
        corrected = corrected.masked_fill(same_item, -1e9)
        positive = self.targets(labels_B)[:, 0] > 0
        loss = (torch.logsumexp(corrected, dim=1) - corrected.diagonal())[positive].sum()
        no_rows = item_BV.detach().new_zeros((len(item_BV), 0, self.config.attention_dim))
        scores = own.detach().float().cpu().numpy()[:, None]
        return StepOutput(loss, scores, no_rows)

    def num_labels(self, labels_B: NDArray[np.float32]) -> int:
        """Number of positive events: each is one softmax."""
        return int((labels_B[:, self._task_columns] > 0).sum())

    @torch.inference_mode()
    def user_vector(
        self, rows: UserRows, user_id: int, now_ms: int, context_id: int = 0
    ) -> NDArray[np.float32]:
        """The user's vector ``[V]`` given his newest rows.

        Raises:
            ValueError: when ``rows`` is not of exactly this user.
        """
        check_single_user(rows, user_id)
        inputs = self._user_inputs(rows, now_ms, context_id)
        return self._towers.user_vectors(self.embed(inputs))[0].float().cpu().numpy()

    @torch.inference_mode()
    def item_vectors(self, items: ItemFeatures) -> NDArray[np.float32]:
        """Vectors ``[M, V]`` of ``items``; inner products with a user vector rank them."""
        embedded = embed_items(self.table, self.inputs.item_slots(items))
        return self._towers.item_vectors(embedded).float().cpu().numpy()

    def popularity(self, items: ItemFeatures) -> NDArray[np.float32]:
        """Smoothed positive rate times log exposures, ``[M]``: what to show whom nothing is known
        of."""
        slots = torch.from_numpy(self.inputs.item_slots(items)[:, 0].copy())
        rate = self.stats.means(slots)[:, 0]
        return (rate * torch.log1p(self.stats.exposures[slots])).float().cpu().numpy()

    def _user_inputs(self, rows: UserRows, now_ms: int, context_id: int) -> ModelInputs:
        nobody = ItemFeatures(*(np.zeros(1, np.int64) for _ in range(4)))
        return self.inputs.for_candidates(rows, nobody, now_ms, context_id)
