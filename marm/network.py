"""The parts every stage shares: embedding the inputs and the attention over a user's memory.

A model is two halves. The sparse half is a `SparseTable`, whose touched rows are updated one by
one; the dense half is an ordinary module (wrapped in DDP when several workers train). `embed` is
the seam: it reads the table and hands the dense half leaves that collect gradients.

Shape legend: B queries, U users, N slab length, L layers, D row width, F feature dim, K features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from marm.batch_rows import KeySource
from marm.config import MEMORY_METHODS, ModelConfig
from marm.error_reading import ErrorReading
from marm.error_vectors import ErrorVectors
from marm.events import NUM_WATCH_BUCKETS
from marm.inputs import Feedback, ModelInputs
from marm.interest.interface import (
    UNKNOWN_TAG,
    History,
    Interest,
    ItemEmbeddings,
    RowLabels,
    Tags,
    WholePast,
)
from marm.interest.memory_augmented import MemoryAugmented
from marm.interest.methods import build_interest
from marm.scoring_plan import ScoringPlan
from marm.search import AllRows, Categories, RowSearch
from marm.sequence import View
from marm.sparse import FEATURE_SALTS, SparseRows, SparseTable
from marm.tables import addresses


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
    errors: tuple[ErrorVectors, ...] = ()  # one for each layer of `marm.error_memory`

    def __len__(self) -> int:
        return len(self.target_BF)


def embed(table: SparseTable, inputs: ModelInputs) -> Embedded:
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


def look_up(table: SparseTable, inputs: ModelInputs) -> Embedded:
    """`embed` for inference: the same embeddings, with no rows gathered for a gradient."""
    weight = table.weight
    nothing = SparseRows(torch.empty(0, dtype=torch.int64), weight[:0])
    return Embedded(
        nothing,
        _sum_slots(table, inputs.target_slots_BK),
        _sum_slots(table, inputs.user_slots_B[:, None]),
        _sum_slots(table, inputs.context_slots_B[:, None]),
        _sum_slots(table, inputs.slab.slots_UNK),
        None if inputs.block is None else _sum_slots(table, inputs.block.slots_BK),
        inputs,
        weight.device,
    )


def _sum_slots(table: SparseTable, slots: NDArray[np.int64]) -> Tensor:
    every = SparseRows(torch.empty(0, dtype=torch.int64), table.weight)
    return _sum_features(every, torch.from_numpy(table.find(slots)).to(table.weight.device))


def embed_items(table: SparseTable, slots_MK: NDArray[np.int64]) -> Tensor:
    """Embeddings ``[M, F]`` of items alone, outside any request."""
    rows, positions = table.rows_of(slots_MK)
    return _sum_features(rows, positions[0])


def _sum_features(rows: SparseRows, position: Tensor) -> Tensor:
    flat = position.reshape(-1, position.shape[-1])
    if not len(rows.values) or not len(flat):
        return rows.values.new_zeros((*position.shape[:-1], rows.values.shape[1]))
    summed = nn.functional.embedding_bag(flat, rows.values, mode="sum")
    return summed.view(*position.shape[:-1], -1)


@dataclass(frozen=True)
class SequenceOutput:
    """What the methods of a model know of each query, side by side."""

    interest_BX: Tensor
    rows_BLD: Tensor  # y_1..y_L to save; L is 0 without a method that writes the memory
    auxiliary_BA: Tensor  # logits trained on the first task beside the heads; A may be 0
    history: History


class Prediction(NamedTuple):
    """What the dense half of a model that predicts labels knows of each query."""

    logits_BT: Tensor
    rows_BLD: Tensor  # to save
    auxiliary_BA: Tensor  # see `SequenceOutput`
    corrected_BET: Tensor  # of `marm.error_memory`, trained too, the best one last; E may be 0

    @property
    def best(self) -> Tensor:
        """The logits ``[B, T]`` to answer with: those that errors corrected, where they did."""
        return self.corrected_BET[:, -1] if self.corrected_BET.shape[1] else self.logits_BT


class SequenceNetwork(nn.Module):
    """The methods of modelling interest over a user's slab and, in training, the batch's events."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        feature_dim = config.feature_dim
        self.feedback_signal = nn.Linear(len(config.feedback_signals), feature_dim, bias=False)
        self.watch_bucket = nn.Embedding(NUM_WATCH_BUCKETS, feature_dim)
        nn.init.normal_(self.watch_bucket.weight, std=0.05)
        self.methods = nn.ModuleList(
            build_interest(config, interest) for interest in config.interests
        )
        self.errors = ErrorReading(config, self.output_dim) if config.reads_errors else None
        self._row_dim = config.attention_dim
        self._label_column = (
            config.feedback_signals.index(config.positive_task) if config.keeps_errors else None
        )
        self._tag_column = _tag_column(config.features) if "tag" in config.features else None
        self._unknown_tag = addresses(config, "tag", np.zeros(1, np.int64))[0]

    @property
    def output_dim(self) -> int:
        """X of ``interest_BX``."""
        return sum(interest.output_dim for interest in self._methods())

    @property
    def memory_augmented(self) -> MemoryAugmented:
        """The method that reads and writes the memory.

        Raises:
            ValueError: when the model has none.
        """
        for interest in self._methods():
            if isinstance(interest, MemoryAugmented):
                return interest
        raise ValueError(
            f"the model has no method of {MEMORY_METHODS}, which read and write the memory"
        )

    @property
    def search(self) -> RowSearch:
        """The rows that layers over the memory attend to in training; all for other methods."""
        for interest in self._methods():
            if isinstance(interest, MemoryAugmented):
                return interest.attention.search
        return AllRows()

    def freeze(self, plan: ScoringPlan) -> None:
        """From now on score requests with the weights as they are now. Training, and loading other
        weights, ends it.
        """
        for interest in self._methods():
            interest.freeze(plan)

    def unfreeze(self) -> None:
        """Back to the plain path, which sees every change of the weights."""
        for interest in self._methods():
            interest.unfreeze()

    def _methods(self) -> list[Interest]:
        return [interest for interest in self.methods if isinstance(interest, Interest)]

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
    ) -> SequenceOutput:
        """What all methods know of the queries."""
        history = self.history(embedded, block_memory_BLD)
        outputs = [interest(query_BF, history) for interest in self._methods()]
        auxiliary = [one.auxiliary_BA for one in outputs if one.auxiliary_BA is not None]
        interest_BX = outputs[0].interest_BD
        if len(outputs) > 1:
            interest_BX = torch.cat([one.interest_BD for one in outputs], dim=-1)
        if self.errors is not None:
            interest_BX = interest_BX + self.errors(history)
        return SequenceOutput(
            interest_BX,
            stack_rows([row for one in outputs for row in one.rows], query_BF, self._row_dim),
            torch.cat(auxiliary, dim=-1) if auxiliary else query_BF.new_zeros(len(query_BF), 0),
            history,
        )

    def history(self, embedded: Embedded, block_memory_BLD: Tensor | None = None) -> History:
        """The past of the queries, with live features."""
        inputs, device = embedded.inputs, embedded.device
        slab, block = inputs.slab, None
        keys = self._keys(embedded.slab_UNF, slab.feedback, slab.view, slab.user_row_B, device)
        if inputs.block is not None and embedded.block_BF is not None:
            block = self._keys(
                embedded.block_BF, inputs.block.feedback, inputs.block.view, None, device
            )
        request = None
        if inputs.categories is not None:
            of = inputs.categories
            columns = (of.candidate_tag, of.candidate_author, of.row_tag, of.row_author)
            request = Categories(
                *(torch.from_numpy(np.ascontiguousarray(column)).to(device) for column in columns)
            )
        return History(
            keys,
            torch.from_numpy(slab.memory_UNLD).to(device),
            torch.from_numpy(slab.memorised_BN).to(device),
            block,
            block_memory_BLD,
            self._tags(inputs, device),
            request,
            ItemEmbeddings(embedded.slab_UNF, embedded.block_BF),
            inputs.sequence,
            self._labels(inputs, device),
            _whole_past(inputs, device),
        )

    def _labels(self, inputs: ModelInputs, device: torch.device) -> RowLabels | None:
        if self._label_column is None:
            return None
        block = None if inputs.block is None else inputs.block.feedback
        return RowLabels(
            self._label(inputs.slab.feedback, device),
            None if block is None else self._label(block, device),
        )

    def _label(self, feedback: Feedback, device: torch.device) -> Tensor:
        label = np.where(feedback.known, feedback.signals[..., self._label_column], np.nan)
        return torch.from_numpy(label.astype(np.float32)).to(device)

    def _tags(self, inputs: ModelInputs, device: torch.device) -> Tags | None:
        if self._tag_column is None:
            return None
        block = None if inputs.block is None else inputs.block.slots_BK
        return Tags(
            self._tag_slots(inputs.target_slots_BK, device),
            self._tag_slots(inputs.slab.slots_UNK, device),
            None if block is None else self._tag_slots(block, device),
        )

    def _tag_slots(self, slots: NDArray[np.int64], device: torch.device) -> Tensor:
        tags = slots[..., self._tag_column]
        known = np.where(tags == self._unknown_tag, UNKNOWN_TAG, tags)
        return torch.from_numpy(known).to(device)

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


def stack_rows(rows: list[Tensor], query_BF: Tensor, dim: int) -> Tensor:
    """y_1..y_L of the queries as ``[B, L, D]``; L may be 0."""
    if not rows:
        return query_BF.new_zeros((len(query_BF), 0, dim))
    return torch.stack(rows, dim=1)


def _whole_past(inputs: ModelInputs, device: torch.device) -> WholePast | None:
    newest_BN, block = inputs.slab.newest_BN, inputs.block
    if newest_BN is None:
        return None
    own = (None, None) if block is None else (block.past_BB, block.newest_BB)
    past_BP, newest_BP = (None if x is None else torch.from_numpy(x).to(device) for x in own)
    return WholePast(torch.from_numpy(newest_BN).to(device), past_BP, newest_BP)


def _tag_column(features: tuple[str, ...]) -> int | None:
    """Where the tag is among an item's features."""
    return [name for name in FEATURE_SALTS if name in features].index("tag")
