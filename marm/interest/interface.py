"""What every method of modelling a user's interest takes and gives, so that they can be compared.

Shape legend: B queries, U users, N slab length, P block length, F feature dim, L cached layers,
D width of an output, A auxiliary predictions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn

from marm.batch_rows import KeySource
from marm.interest.user_sequence import UserSequence
from marm.scoring_plan import ScoringPlan
from marm.search import Categories

UNKNOWN_TAG = -1


@dataclass(frozen=True)
class Tags:
    """Categories of queries and rows, as numbers that are equal for equal tags; `UNKNOWN_TAG`
    matches nothing."""

    query_B: Tensor  # int64
    slab_UN: Tensor  # int64
    block_P: Tensor | None  # int64


@dataclass(frozen=True)
class ItemEmbeddings:
    """Rows as they were before their feedback: what a row asks with, where rows ask."""

    slab_UNF: Tensor
    block_PF: Tensor | None


@dataclass(frozen=True)
class RowLabels:
    """Whether rows turned out positive (1 or 0); NaN where that is not known."""

    slab_UN: Tensor
    block_P: Tensor | None


@dataclass(frozen=True)
class WholePast:
    """All of a query's past, beyond its window of n rows too."""

    newest_BN: Tensor  # bool [B or 1, N]: its newest memorised rows (`newest_memorised`)
    block_BP: Tensor | None  # bool: the batch's events before it (`past_block`)
    newest_block_BP: Tensor | None  # bool: the newest of those


@dataclass(frozen=True)
class History:
    """What a batch of queries sees of the past.

    The rows of a query are its user's stored rows (``slab``, newest first) and, in training, the
    earlier events of its user in the batch (``block``; the queries themselves, in their order).
    ``visible`` of both says which; together these are the newest n before the query.
    """

    slab: KeySource
    memory_UNLD: Tensor  # cached vectors of the slab, of all layers or of the first few only
    memorised_BN: Tensor  # bool [B or 1, N]: visible and with cached vectors
    block: KeySource | None = None
    block_memory_BLD: Tensor | None = None  # None for the model that writes the memory
    tags: Tags | None = None  # None where items have none
    request: Categories | None = None  # of one user's candidates
    items: ItemEmbeddings | None = None
    sequence: UserSequence | None = None  # for the methods of `marm.config.SEQUENCE_METHODS`
    labels: RowLabels | None = None  # of ``positive_task``, for a model that keeps errors
    whole: WholePast | None = None  # likewise, and for one that reads errors


@dataclass(frozen=True)
class InterestOutput:
    """What a method knows of each query."""

    interest_BD: Tensor  # what the heads read
    rows: list[Tensor] = field(default_factory=list)  # y_1..y_L, each [B, D], to be saved
    auxiliary_BA: Tensor | None = None  # logits that are trained on the first task beside the heads


class Interest(nn.Module, ABC):
    """A method: from queries and their history to one vector each.

    Heads, features, optimiser and history are the same for all methods; only this differs.
    """

    @property
    @abstractmethod
    def output_dim(self) -> int:
        """D of ``interest_BD``."""

    @abstractmethod
    def forward(self, query_BF: Tensor, history: History) -> InterestOutput:
        """The interest of every query.

        Args:
            query_BF: embeddings of the queries: target item and context, or a user id.
            history: their rows. With one user and a view of one line, all queries share it.
        """

    def freeze(self, plan: ScoringPlan) -> None:
        """From now on score requests with the weights as they are now; a method that has no faster
        way than `forward` ignores it."""

    def unfreeze(self) -> None:
        """Back to `forward`, which sees every change of the weights."""
