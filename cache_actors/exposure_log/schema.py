"""What is remembered of every answer: who saw which items, from which arms and model versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

EXPOSURE_STAGES = ("retrieval", "cascading", "ranking")

EXPOSURE_SCHEMA = pa.schema(
    [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("time_ms", pa.int64(), nullable=False),
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("holdout", pa.bool_(), nullable=False),
        pa.field("overridden", pa.bool_(), nullable=False),
        pa.field("latency_ms", pa.float32(), nullable=False),
        pa.field("degraded", pa.list_(pa.string()), nullable=False),
        pa.field("item_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("scores", pa.list_(pa.float32()), nullable=False),
        *(
            column
            for stage in EXPOSURE_STAGES
            for column in (
                pa.field(f"{stage}_experiment", pa.string(), nullable=False),
                pa.field(f"{stage}_arm", pa.string(), nullable=False),
                pa.field(f"{stage}_version", pa.int64()),
                pa.field(f"{stage}_depth", pa.int32(), nullable=False),
                pa.field(f"{stage}_shadow", pa.bool_(), nullable=False),
            )
        ),
    ]
)
"""Columns of a segment; a row is one answer, or one run of a shadow arm."""


@dataclass(frozen=True)
class StageExposure:
    """One stage's part in an answer.

    Attributes:
        experiment: key of the experiment that the user takes part in at this stage; empty for users
            outside of its traffic share, in the holdout, on an overridden arm, or without one.
        arm: the assigned arm, also when another answered in its place.
        version: the model version that answered; None when the stage did not.
        depth: number of memory layers that were read.
        shadow: the stage ran off the response path; nobody saw its items.
    """

    experiment: str = ""
    arm: str = ""
    version: int | None = None
    depth: int = 0
    shadow: bool = False


@dataclass(frozen=True)
class Exposure:
    """One answer as it was sent, or one run of a shadow arm.

    ``item_ids`` and ``scores`` are ``[k]``, best first; a stage that is not in ``stages`` had no
    part in it.
    """

    request_id: str
    time_ms: int
    user_id: int
    item_ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    latency_ms: float = 0.0
    degraded: tuple[str, ...] = ()
    holdout: bool = False
    overridden: bool = False
    stages: Mapping[str, StageExposure] = field(default_factory=dict)


def exposures_to_table(exposures: Sequence[Exposure]) -> pa.Table:
    """Exposures as an Arrow table in `EXPOSURE_SCHEMA`, in the order given."""
    columns: dict[str, list] = {
        "request_id": [exposure.request_id for exposure in exposures],
        "time_ms": [exposure.time_ms for exposure in exposures],
        "user_id": [exposure.user_id for exposure in exposures],
        "holdout": [exposure.holdout for exposure in exposures],
        "overridden": [exposure.overridden for exposure in exposures],
        "latency_ms": [exposure.latency_ms for exposure in exposures],
        "degraded": [list(exposure.degraded) for exposure in exposures],
        "item_ids": [exposure.item_ids for exposure in exposures],
        "scores": [exposure.scores for exposure in exposures],
    }
    absent = StageExposure()
    for stage in EXPOSURE_STAGES:
        parts = [exposure.stages.get(stage, absent) for exposure in exposures]
        for name in ("experiment", "arm", "version", "depth", "shadow"):
            columns[f"{stage}_{name}"] = [getattr(part, name) for part in parts]
    return pa.table(
        {column.name: pa.array(columns[column.name], column.type) for column in EXPOSURE_SCHEMA},
        schema=EXPOSURE_SCHEMA,
    )
