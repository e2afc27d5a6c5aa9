"""What travels between the edge and the stages: small, frozen, no history of the user.

Shapes: M candidates, T tasks. Ids and candidate arrays travel; rows of memory never do, since every
stage reads them where they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from marm.items import ItemFeatures
from marm.memory import Namespace
from stages.item_filters import ItemLists

StageName = Literal["retrieval", "cascading", "ranking"]
STAGES: tuple[StageName, ...] = ("retrieval", "cascading", "ranking")

Outcome = Literal["ok", "no_model", "late", "failed"]
Source = Literal["retrieval", "popular", "similar"]


def empty_ids() -> NDArray[np.int64]:
    """No ids."""
    return np.empty(0, np.int64)


def no_scores() -> NDArray[np.float32]:
    """No scores, ``[0]``."""
    return np.empty(0, np.float32)


def no_task_scores() -> NDArray[np.float32]:
    """No scores per task, ``[0, 0]``."""
    return np.empty((0, 0), np.float32)


@dataclass(frozen=True)
class StageRequest:
    """One user's request as a stage sees it.

    Attributes:
        request_id: identifier that is logged and returned.
        user_id: whose rows to read.
        now_ms: the moment of the exposure.
        before_ms: read rows strictly older than this; None reads all rows.
        context_id: page, tab, ... of the exposure; 0 is unknown.
        limit: at most this many candidates leave the stage.
        deadline_ms: wall-clock time after which nobody waits for the answer any more.
        candidates: the items to score (empty for retrieval, which finds them).
        exclude_item_ids: items that must not be returned (retrieval).
        allow_item_ids: only these items may be returned (retrieval); None allows every item.
    """

    request_id: str
    user_id: int
    now_ms: int
    before_ms: int | None
    context_id: int
    limit: int
    deadline_ms: int
    candidates: ItemFeatures = field(default_factory=ItemFeatures.empty)
    exclude_item_ids: NDArray[np.int64] = field(default_factory=empty_ids)
    allow_item_ids: NDArray[np.int64] | None = None

    def with_candidates(self, candidates: ItemFeatures, limit: int) -> StageRequest:
        """The same request for the next stage, without the lists that retrieval applied."""
        return replace(
            self,
            candidates=candidates,
            limit=limit,
            exclude_item_ids=empty_ids(),
            allow_item_ids=None,
        )


@dataclass(frozen=True)
class RowsRead:
    """What a stage read of a user's memory.

    ``depth`` is the number of cached layers that were used: the model's, fewer where time or a live
    setting allowed no more, and 0 when the stage worked from raw rows only or from none.
    ``memorised`` rows are those whose vectors were used. ``missing`` says that the user's shard did
    not answer.
    """

    depth: int = 0
    raw: int = 0
    memorised: int = 0
    missing: bool = False


@dataclass(frozen=True)
class StageResult:
    """What a stage answers: candidates best first, and how it came to them.

    An ``outcome`` other than ``"ok"`` carries no candidates; ``reason`` says why. ``fallback_of``
    is the arm that should have answered, where the stage's control arm did.
    """

    stage: StageName
    variant: str
    outcome: Outcome = "ok"
    model_version: int | None = None
    namespace: Namespace | None = None
    candidates: ItemFeatures = field(default_factory=ItemFeatures.empty)
    scores: NDArray[np.float32] = field(default_factory=no_scores)  # [M]
    tasks: tuple[str, ...] = ()
    task_scores: NDArray[np.float32] = field(default_factory=no_task_scores)  # [M, T]
    source: Source | None = None
    rows: RowsRead = RowsRead()
    num_in: int = 0
    elapsed_ms: float = 0.0
    reason: str = ""
    fallback_of: str = ""

    def __len__(self) -> int:
        return len(self.candidates)


@dataclass(frozen=True)
class StageStatus:
    """Whether a stage variant can serve, and with what.

    ``newest_event_ms`` is the time of the newest event that its model has learned; None where that
    is not known. ``lists`` are those of its live settings; None when they are not known.
    """

    stage: StageName
    variant: str
    model_version: int | None
    namespace: Namespace | None
    problem: str = ""
    newest_event_ms: int | None = None
    lists: ItemLists | None = field(default=None, compare=False)

    @property
    def ready(self) -> bool:
        """Whether a model is live."""
        return self.model_version is not None
