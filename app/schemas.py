"""Requests and responses over HTTP. Limits are part of the schema; unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from marm.events import BINARY_TASKS, WATCH_TIME
from stages.request import StageName

MAX_EXCLUDED = 1000
MAX_ALLOWED = 10_000
MAX_EVENTS = 1000
MAX_K = 1000
MAX_WATCH_S = 86_400.0

Id = Annotated[int, Field(ge=0, le=2**63 - 1)]
ContextId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Binary = Annotated[int, Field(ge=0, le=1)]


class RequestModel(BaseModel):
    """Input that is taken literally: no unknown fields, and no ``"5"`` for 5."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RequestContext(RequestModel):
    """Where and when items will be shown."""

    context_id: ContextId = 0
    exclude_item_ids: Annotated[list[Id], Field(max_length=MAX_EXCLUDED)] = []
    allow_item_ids: Annotated[list[Id], Field(min_length=1, max_length=MAX_ALLOWED)] | None = None
    """Only these items may be returned; every item may when not given."""
    timestamp_ms: Id | None = None
    """Answer as of this moment; the server's time when not given."""


class RecommendRequest(RequestModel):
    """What to recommend, and to whom."""

    user_id: Id
    k: Annotated[int, Field(ge=1, le=MAX_K)] | None = None
    context: RequestContext = RequestContext()


class Labels(RequestModel):
    """What the user did; a label that is not given was not observed, which is not a negative."""

    click: Binary | None = None
    long_view: Binary | None = None
    like: Binary | None = None
    comment: Binary | None = None
    forward: Binary | None = None
    follow: Binary | None = None
    watch_time: Annotated[float, Field(ge=0, le=MAX_WATCH_S, allow_inf_nan=False)] | None = None
    """Seconds watched."""

    def by_task(self) -> dict[str, float]:
        """The observed labels."""
        values = {task: getattr(self, task) for task in (*BINARY_TASKS, WATCH_TIME)}
        return {task: float(value) for task, value in values.items() if value is not None}


class FeedbackEvent(RequestModel):
    """One exposure and what came of it."""

    user_id: Id
    item_id: Id
    timestamp_ms: Id | None = None
    event_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """The client's own name of the event; sending it again updates the event."""
    context_id: ContextId = 0
    labels: Labels = Labels()


class FeedbackBatch(RequestModel):
    """Several events at once: all are stored, or none."""

    events: Annotated[list[FeedbackEvent], Field(min_length=1, max_length=MAX_EVENTS)]


class RecommendedItem(BaseModel):
    """One item of an answer."""

    item_id: int
    score: float
    tasks: dict[str, float]


class RowCounts(BaseModel):
    """Rows of the user's memory that a stage read."""

    raw: int
    memorised: int


class StageReport(BaseModel):
    """How a stage took part in an answer."""

    model_config = ConfigDict(protected_namespaces=())

    variant: str
    model_version: int | None
    source: Literal["retrieval", "popular", "similar"] | None
    candidates_in: int
    candidates_out: int
    ms: float
    memory_depth: int
    rows: RowCounts
    fallback_of: str = ""
    """The arm that should have answered, where the stage's control arm did."""


class RecommendResponse(BaseModel):
    """Items best first, and how each stage came to them."""

    user_id: int
    items: list[RecommendedItem]
    stages: dict[str, StageReport]
    degraded: list[str]
    request_id: str
    depth: int = 0
    """Layers of memory behind the order of the items: as many as the model has, or fewer."""
    arms: dict[StageName, str]
    """The assigned arm of every stage; what answered is in ``stages``."""
    experiments: dict[StageName, str]
    """Keys of the experiments that the user takes part in, by stage."""
    holdout: bool
    overridden: list[StageName]
    """Stages whose arm the caller chose."""


class FeedbackReceipt(BaseModel):
    """What became of one event."""

    status: Literal["accepted", "duplicate"]
    event_key: str
    """16 hexadecimal digits: how the event is known in the log and in memory."""
    timestamp_ms: int
    known_item: bool


class FeedbackResponse(BaseModel):
    """Receipts in the order of the events; the events are in the log when this is sent."""

    accepted: int
    duplicates: int
    events: list[FeedbackReceipt]
    degraded: list[str]


class StageHealth(BaseModel):
    """Whether one stage variant can serve."""

    model_config = ConfigDict(protected_namespaces=())

    ready: bool
    model_version: int | None
    namespace: str | None
    problem: str
    newest_event_ms: int | None = None
    """Time of the newest event that the model has learned; null where that is not known."""
    newest_event_age_s: float | None = None
    """How long ago that was."""


class MemoryHealth(BaseModel):
    """Whether the memory pool answers: its shards, those that answer, and those that have every
    user whom the durable tier has."""

    pool: str
    shards: int
    answering: int
    warm: int
    problem: str


class HealthResponse(BaseModel):
    """Whether the service can recommend, by stage variant, and from what memory."""

    status: Literal["ready", "degraded", "no_model", "restoring"]
    reason: str
    stages: dict[str, StageHealth]
    memory: MemoryHealth | None = None


class Problem(BaseModel):
    """An error: what was expected, what came, and where."""

    error: str
    details: list[dict[str, Any]] = []
