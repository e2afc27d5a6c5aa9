"""An audit of assembled stages over a real memory, without HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.serving_audit.cases import AuditCase
from app.serving_audit.history import OfflineHistory, comparable
from app.serving_audit.report import ArmUnderAudit, Compared, Outcome, Skipped
from marm.model_factory import Model
from marm.search import RowSearch
from stages.knobs import StageKnobs
from stages.request import StageRequest, StageResult
from train.offline_scores import offline_scores

PATIENCE_MS = 60_000
ATTEMPTS = 3


@dataclass(frozen=True)
class AuditedStage:
    """One version of one arm, both ways: ``stage`` as serving assembles it, ``model`` as training
    evaluates it, over the rows of ``history``."""

    arm: ArmUnderAudit
    stage: Any  # of `stages.assemble`
    knobs: StageKnobs
    search: RowSearch | None  # what the arm names in place of the model's own
    model: Model
    history: OfflineHistory

    def audit(self, case: AuditCase) -> Outcome:
        """Compare one user at one moment, again while training changes his rows meanwhile."""
        reason = ""
        for _ in range(ATTEMPTS):
            rows = self.history.rows(case.user_id)
            result: StageResult = self.stage.run(self._request(case), self.knobs)
            if self.history.changed(rows):
                reason = "the user's rows kept changing"
                continue
            if result.outcome != "ok" or result.source in ("popular", "similar"):
                reason = result.reason or f"answered from {result.source} items"
                continue
            reason = comparable(rows, case.now_ms, result.rows, self.model, self.search)
            if not reason:
                offline = offline_scores(
                    self.model,
                    self.history.as_read(rows, result.rows),
                    result.candidates,
                    case.now_ms,
                    case.context_id,
                )
                return Compared(
                    self.arm,
                    case.user_id,
                    case.now_ms,
                    result.candidates.item_id,
                    self.model.tasks,
                    _served_scores(result),
                    offline,
                )
        return Skipped(self.arm.stage, case.user_id, case.now_ms, reason)

    def audit_all(self, cases: list[AuditCase]) -> Iterator[Outcome]:
        """Every case."""
        for case in cases:
            yield self.audit(case)

    def _request(self, case: AuditCase) -> StageRequest:
        request = StageRequest(
            request_id="audit",
            user_id=case.user_id,
            now_ms=case.now_ms,
            before_ms=case.now_ms,
            context_id=case.context_id,
            limit=len(case.items),
            deadline_ms=int(time.time() * 1000) + PATIENCE_MS,
        )
        if self.arm.stage == "retrieval":
            return request
        return request.with_candidates(case.items, len(case.items))


def _served_scores(result: StageResult) -> NDArray[np.float32]:
    if result.stage == "ranking":
        return result.task_scores
    return result.scores[:, None]
