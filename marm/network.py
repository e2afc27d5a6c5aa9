"""The parts every stage shares: embedding the inputs and the attention over a user's memory.

A model is two halves. The sparse half is a `HashedTable`, whose touched rows are updated one by
one; the dense half is an ordinary module (wrapped in DDP when several workers train). `embed` is
the seam: it reads the table and hands the dense half leaves that collect gradients.

Shape legend: B queries, U users, N slab length, L layers, D row width, F feature dim, K features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from marm.amortised import AmortisedAttention, UserHistory
from marm.attention import KeySource, MultiLayerTargetAttention
from marm.config import ModelConfig
from marm.events import NUM_WATCH_BUCKETS
from marm.inputs import Feedback, ModelInputs
from marm.precision import build_precision
from marm.scoring_plan import ScoringPlan
from marm.search import AllRows, Categories, Found
from marm.sequence import View
from marm.sparse import HashedTable, SparseRows


@dataclass(frozen=True)
class Embedded:
    """Inputs with their table rows looked up (Eq. 2)."""

    sparse: SparseRows
    target_BF: Tensor
    user_BF: Tensor
    context_BF: Tensor
    slab_UNF: Tensor
    block_BF: Tensor | None
    inputs: ModelInputs
    device: torch.device

    def __len__(self) -> int:
        return len(self.target_BF)


def embed(table: HashedTable, inputs: ModelInputs) -> Embedded:
    """``SparseFeatureLookUp`` of Eq. (2) for everything in ``inputs``."""
    arrays = [
        inputs.target_slots_BK,
        inputs.user_slots_B,
        inputs.context_slots_B,
        inputs.slab.slots_UNK,
    ]
    if inputs.block is not None:
        arrays.append(inputs.block.slots_BK)
    rows, positions = table.rows_of(*arrays)
    return Embedded(
        rows,
        _sum_features(rows, positions[0]),
        rows.gather(positions[1]),
        rows.gather(positions[2]),
        _sum_features(rows, positions[3]),
        _sum_features(rows, positions[4]) if inputs.block is not None else None,
        inputs,
        table.weight.device,
    )


def look_up(table: HashedTable, inputs: ModelInputs) -> Embedded:
    """`embed` for inference: the same embeddings, with no rows gathered for a gradient."""
    weight = table.weight
    nothing = SparseRows(torch.empty(0, dtype=torch.int64), weight[:0])
    return Embedded(
        nothing,
        _sum_slots(weight, inputs.target_slots_BK),
        _sum_slots(weight, inputs.user_slots_B[:, None]),
        _sum_slots(weight, inputs.context_slots_B[:, None]),
        _sum_slots(weight, inputs.slab.slots_UNK),
        None if inputs.block is None else _sum_slots(weight, inputs.block.slots_BK),
        inputs,
        weight.device,
    )


def _sum_slots(weight: Tensor, slots: NDArray[np.int64]) -> Tensor:
    every = SparseRows(torch.empty(0, dtype=torch.int64), weight)
    return _sum_features(every, torch.from_numpy(slots).to(weight.device))


def embed_items(table: HashedTable, slots_MK: NDArray[np.int64]) -> Tensor:
    """Embeddings ``[M, F]`` of items alone, outside any request."""
    rows, positions = table.rows_of(slots_MK)
    return _sum_features(rows, positions[0])


def _sum_features(rows: SparseRows, position: Tensor) -> Tensor:
    flat = position.reshape(-1, position.shape[-1])
    if not len(rows.values) or not len(flat):
        return rows.values.new_zeros((*position.shape[:-1], rows.values.shape[1]))
    summed = nn.functional.embedding_bag(flat, rows.values, mode="sum")
    return summed.view(*position.shape[:-1], -1)


class SequenceNetwork(nn.Module):
    """Multi-layer target attention over a user's slab and, in training, the batch's own events."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        feature_dim = config.feature_dim
        self.feedback_signal = nn.Linear(len(config.feedback_signals), feature_dim, bias=False)
        self.watch_bucket = nn.Embedding(NUM_WATCH_BUCKETS, feature_dim)
        nn.init.normal_(self.watch_bucket.weight, std=0.05)
        self.attention = MultiLayerTargetAttention(
            feature_dim,
            feature_dim,
            config.attention_dim,
            config.namespace.dim,
            config.depth,
            config.num_heads,
            config.recency,
        )
        self._amortised: AmortisedAttention | None = None

    def freeze(self, plan: ScoringPlan) -> None:
        """From now on pass all candidates of a request through the attention at once, with the
        weights as they are now (`marm.amortised`). Training, and loading other weights, ends it.
        """
        device = self.watch_bucket.weight.device
        self._amortised = AmortisedAttention(
            self.attention, build_precision(plan.precision, device), plan.search
        )

    def unfreeze(self) -> None:
        """Back to the plain path, which sees every change of the weights."""
        self._amortised = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Called whichever module the weights are loaded into.
        self.unfreeze()
        super()._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> SequenceNetwork:
        """See `nn.Module.train`: weights are about to change."""
        if mode:
            self.unfreeze()
        return super().train(mode)

    def forward(
        self, query_BF: Tensor, embedded: Embedded, block_memory_BLD: Tensor | None = None
    ) -> list[Tensor]:
        """``[y_1, ..., y_{L+1}]`` of the queries, each ``[B, D]``."""
        inputs, device = embedded.inputs, embedded.device
        if self._amortised is not None and inputs.categories is not None:
            return self._amortised.outputs(query_BF, self._history(embedded))
        slab = inputs.slab
        keys = self._keys(embedded.slab_UNF, slab.feedback, slab.view, slab.user_row_B, device)
        memory = torch.from_numpy(slab.memory_UNLD).to(device)
        memorised = torch.from_numpy(slab.memorised_BN).to(device)
        block = None
        if inputs.block is not None and embedded.block_BF is not None:
            block = self._keys(
                embedded.block_BF, inputs.block.feedback, inputs.block.view, None, device
            )
        return self.attention(query_BF, keys, memory, memorised, block, block_memory_BLD)

    def search_rows(self, query_BF: Tensor, embedded: Embedded) -> list[Found]:
        """What the search of each layer finds for one user's candidates, as positions among the
        slab's rows.

        Raises:
            ValueError: when the network is not frozen with a search.
        """
        if self._amortised is None or isinstance(self._amortised.search, AllRows):
            raise ValueError(
                "the model attends to all rows; freeze it with a search, such as "
                "ScoringPlan(search=TopRows(100)), and ask again"
            )
        found: list[Found] = []
        self._amortised.outputs(query_BF, self._history(embedded), found)
        return found

    def _history(self, embedded: Embedded) -> UserHistory:
        """The rows of a request's only user, as all of its candidates see them."""
        inputs, device = embedded.inputs, embedded.device
        slab, of = inputs.slab, inputs.categories
        assert of is not None
        columns = (of.candidate_tag, of.candidate_author, of.row_tag, of.row_author)
        keys = self._keys(embedded.slab_UNF, slab.feedback, slab.view, None, device)
        return UserHistory(
            keys.features[0],
            torch.from_numpy(slab.memory_UNLD[0]).to(device),
            keys.visible[0],
            torch.from_numpy(slab.memorised_BN[0]).to(device),
            keys.distance[0],
            keys.gap[0],
            Categories(*(torch.from_numpy(np.ascontiguousarray(c)).to(device) for c in columns)),
        )

    def _keys(
        self,
        features: Tensor,
        feedback: Feedback,
        view: View,
        user_row: object,
        device: torch.device,
    ) -> KeySource:
        signals = torch.from_numpy(feedback.signals).to(device)
        watch = torch.from_numpy(feedback.watch_bucket).to(device)
        live = features + self.feedback_signal(signals) + self.watch_bucket(watch)
        return KeySource(
            live,
            torch.from_numpy(view.visible).to(device),
            torch.from_numpy(view.distance).to(device),
            torch.from_numpy(view.gap).to(device),
            None if user_row is None else torch.as_tensor(user_row).to(device),
        )


def stack_rows(outputs: list[Tensor]) -> Tensor:
    """y_1..y_L of ``[y_1, ..., y_{L+1}]`` as ``[B, L, D]``; L may be 0."""
    if len(outputs) == 1:
        return outputs[0].new_zeros((outputs[0].shape[0], 0, outputs[0].shape[1]))
    return torch.stack(outputs[:-1], dim=1)
