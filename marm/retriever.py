"""The retrieval model: the user id queries the memory, items are found by inner product.

Section 2.3 and Fig. 4(c): no candidate exists yet, so the user-id embedding takes the place of the
target item through all layers, over the user's newest rows. Trained with an in-batch softmax whose
logits are corrected by log Q, the log frequency of each item as a negative.

A user may have several vectors, one per interest: a learned vector of each interest is added to the
query, which so attends to other rows in every layer. An item's score is that of the nearest vector,
in training as in the search of items, so every positive teaches the interest that is nearest to it.

Shape legend: B queries, K user vectors, V vector width, F feature dim.
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
from marm.network import Embedded, SequenceNetwork, embed_items, look_up
from marm.sparse import SparseTable
from marm.stage_model import Net, StageModel, StepOutput, check_single_user

TEMPERATURE = 0.1
INTEREST_SCALE = 0.05
"""Of the initial interests: apart, and no larger than embeddings that have learned something."""


class RetrieverNet(nn.Module):
    """Dense half: a user tower over the memory and an item tower, both to unit vectors."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sequence = SequenceNetwork(config)
        self.num_user_vectors = config.num_user_vectors
        if config.num_user_vectors > 1:
            self.interests = nn.Parameter(
                torch.randn(config.num_user_vectors, config.feature_dim) * INTEREST_SCALE
            )
        self.user_tower = nn.Sequential(
            nn.LayerNorm(self.sequence.output_dim),
            nn.Linear(self.sequence.output_dim, config.output_dim),
        )
        self.item_tower = nn.Sequential(
            nn.LayerNorm(config.feature_dim),
            nn.Linear(config.feature_dim, config.expert_dim),
            nn.GELU(),
            nn.Linear(config.expert_dim, config.output_dim),
        )

    def forward(
        self, embedded: Embedded, block_memory_BLD: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unit user vectors ``[B*K, V]``, those of a query side by side, item vectors ``[B, V]``,
        and what a memory of its own keeps of the first interest, ``[B, L, D]``."""
        outputs, rows_BLD = self._attend(embedded, block_memory_BLD)
        return self._user_vectors(outputs), self.item_vectors(embedded.target_BF), rows_BLD

    def user_vectors(self, embedded: Embedded, block_memory_BLD: Tensor | None = None) -> Tensor:
        """``[B*K, V]`` unit vectors of the users of the queries."""
        return self._user_vectors(self._attend(embedded, block_memory_BLD)[0])

    def _user_vectors(self, outputs: Tensor) -> Tensor:
        return nn.functional.normalize(self.user_tower(outputs), dim=-1)

    def _attend(self, embedded: Embedded, block_memory_BLD: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is known of each interest ``[B*K, X]``, and y_1..y_L of the first ``[B, L, D]``."""
        query_BF = embedded.user_BF + embedded.context_BF
        if self.num_user_vectors == 1:
            known = self.sequence(query_BF, embedded, block_memory_BLD)
            return known.interest_BX, known.rows_BLD
        if len(query_BF) == 1 and embedded.inputs.block is None:
            # A request: the interests share the rows as candidates do, in one pass.
            known = self.sequence(query_BF + self.interests, embedded)
            return known.interest_BX, known.rows_BLD[:1]
        return self._attend_by_interest(query_BF, embedded, block_memory_BLD)

    def _attend_by_interest(
        self, query_BF: Tensor, embedded: Embedded, block_memory_BLD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`_attend`, one pass of all queries per interest."""
        passes = [
            self.sequence(query_BF + interest_F, embedded, block_memory_BLD)
            for interest_F in self.interests
        ]
        outputs = torch.stack([one.interest_BX for one in passes], dim=1).flatten(0, 1)
        return outputs, passes[0].rows_BLD

    def item_vectors(self, item_BF: Tensor) -> Tensor:
        """``[B, V]`` unit vectors of embedded items."""
        return nn.functional.normalize(self.item_tower(item_BF), dim=-1)


class Retriever(StageModel):
    """User and item vectors whose inner product ranks items for a user."""

    def __init__(self, config: ModelConfig, table: SparseTable | None = None) -> None:
        super().__init__(config, (config.positive_task,), RetrieverNet(config), table)

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
        users, item_BV, rows_BLD = net(embedded, block_memory_BLD)
        users, item_BV = users.float(), item_BV.float()
        slots = self.item_slots(embedded.inputs)
        with torch.autocast(users.device.type, enabled=False):  # half precision would make ties
            by_vector = (users @ item_BV.T).view(
                len(item_BV), self.config.num_user_vectors, len(item_BV)
            )
            logits = best_of_vectors(by_vector) / TEMPERATURE
        own = logits.diagonal()
        corrected = logits - self.stats.log_frequency(slots)[None, :]
        # The positive item is no negative of itself, wherever else in the batch it occurs.
        same_item = slots[:, None] == slots[None, :]
        same_item.fill_diagonal_(False)
        corrected = corrected.masked_fill(same_item, -1e9)
        positive = self.targets(labels_B)[:, 0] > 0
        loss = (torch.logsumexp(corrected, dim=1) - corrected.diagonal())[positive].sum()
        # A copy: whoever keeps the scores would keep all logits of the batch with the diagonal.
        scores = own.detach().float().cpu().numpy()[:, None].copy()
        vectors = users.detach().view(len(item_BV), self.config.num_user_vectors, users.shape[1])
        return StepOutput(loss, scores, rows_BLD.detach(), vectors)

    def num_labels(self, labels_B: NDArray[np.float32]) -> int:
        """Number of positive events: each is one softmax."""
        return int((labels_B[:, self._task_columns] > 0).sum())

    @torch.inference_mode()
    def user_vectors(
        self, rows: UserRows, user_id: int, now_ms: int, context_id: int = 0
    ) -> NDArray[np.float32]:
        """The user's vectors ``[K, V]`` given his newest rows.

        Raises:
            ValueError: when ``rows`` is not of exactly this user.
        """
        check_single_user(rows, user_id)
        inputs = self._user_inputs(rows, now_ms, context_id)
        return self._towers.user_vectors(look_up(self.table, inputs)).float().cpu().numpy()

    def user_vector(
        self, rows: UserRows, user_id: int, now_ms: int, context_id: int = 0
    ) -> NDArray[np.float32]:
        """The user's only vector ``[V]``; see `user_vectors`.

        Raises:
            ValueError: when ``rows`` is not of exactly this user, or when there are several
                vectors per user.
        """
        vectors_KV = self.user_vectors(rows, user_id, now_ms, context_id)
        if len(vectors_KV) != 1:
            raise ValueError(
                f"expected a model with one vector per user, got {len(vectors_KV)}; "
                "use user_vectors and take the best score of each item"
            )
        only_V: NDArray[np.float32] = vectors_KV[0]
        return only_V

    @torch.inference_mode()
    def item_vectors(self, items: ItemFeatures) -> NDArray[np.float32]:
        """Vectors ``[M, V]`` of ``items``; inner products with a user vector rank them."""
        embedded = embed_items(self.table, self.inputs.item_slots(items))
        return self._towers.item_vectors(embedded).float().cpu().numpy()

    def popularity(self, items: ItemFeatures) -> NDArray[np.float32]:
        """Smoothed positive rate times log exposures, ``[M]``: what to show whom nothing is known
        of."""
        slots = self.stat_slots(self.inputs.item_slots(items))
        rate = self.stats.means(slots)[:, 0]
        return (rate * torch.log1p(self.stats.exposures[slots])).float().cpu().numpy()

    def _user_inputs(self, rows: UserRows, now_ms: int, context_id: int) -> ModelInputs:
        nobody = ItemFeatures(*(np.zeros(1, np.int64) for _ in range(4)))
        return self.inputs.for_candidates(rows, nobody, now_ms, context_id)


def best_of_vectors(scores_BKM: Tensor) -> Tensor:
    """``[B, M]``: each item's score with the nearest of the user's vectors, which alone learns."""
    return scores_BKM.max(dim=1).values
