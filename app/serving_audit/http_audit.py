"""An audit of a running application: what it answers over HTTP against offline scores.

Ranking is compared, since its predictions are what an answer tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from app.args import AppArgs
from app.key_guards import KEY_HEADER
from app.serving_audit.arms import ConfiguredArm, offline_model
from app.serving_audit.cases import AuditCase
from app.serving_audit.history import OfflineHistory, comparable
from app.serving_audit.report import Compared, Outcome, Skipped
from app.serving_audit.stage_audit import ATTEMPTS
from cache_actors.registry import ModelRegistry
from marm.items import ItemCatalog
from marm.memory import Namespace
from marm.model_factory import Model
from stages.assemble import published_items
from stages.request import RowsRead
from train.offline_scores import offline_scores

TIMEOUT_S = 60.0
MAX_ERROR_CHARS = 200


class NotAnsweredError(RuntimeError):
    """The application did not recommend; the message says what it said instead."""


HistoryOf = Callable[[Namespace], OfflineHistory]
"""The rows of a namespace."""


def audit_client(url: str, api_key: str | None) -> httpx.Client:
    """A client of the application at ``url``."""
    headers = {} if api_key is None else {KEY_HEADER: api_key}
    return httpx.Client(base_url=url, timeout=TIMEOUT_S, headers=headers)


@dataclass
class HttpAudit:
    """Audits a running application whose arms are those of ``args``."""

    client: httpx.Client
    args: AppArgs
    registry: ModelRegistry
    history_of: HistoryOf
    num_items: int
    _models: dict[tuple[str, int], Model] = field(default_factory=dict)
    _catalogs: dict[tuple[str, int], ItemCatalog] = field(default_factory=dict)

    def audit_all(self, cases: list[AuditCase]) -> Iterator[Outcome]:
        """Every case."""
        for case in cases:
            yield self.audit(case)

    def audit(self, case: AuditCase) -> Outcome:
        """Compare one user at one moment, again while training changes his rows meanwhile.

        Raises:
            ValueError: the application serves arms that the configuration does not have.
            httpx.HTTPError: nothing answers.
        """
        outcome: Outcome = _skipped(case, "not tried")
        for _ in range(ATTEMPTS):
            try:
                outcome = self._attempt(case)
            except NotAnsweredError as error:
                outcome = _skipped(case, str(error))
            if isinstance(outcome, Compared):
                break
        return outcome

    def _attempt(self, case: AuditCase) -> Outcome:
        # The namespace is known only once an arm has answered, so rows are read around a second
        # answer of the same arm and version.
        first = self._ask(case)
        ranking = first["stages"]["ranking"]
        if ranking["model_version"] is None or not first["items"]:
            return _skipped(case, "; ".join(first["degraded"]) or "ranking did not answer")
        arm = ConfiguredArm.of(self.args, "ranking", ranking["variant"])
        model = self._model(arm.model, ranking["model_version"])
        history = self.history_of(model.config.namespace)
        rows = history.rows(case.user_id)
        answer = self._ask(case)
        report = answer["stages"]["ranking"]
        if history.changed(rows):
            return _skipped(case, "the user's rows kept changing")
        if [report[name] for name in ("variant", "model_version")] != [
            ranking[name] for name in ("variant", "model_version")
        ]:
            return _skipped(case, "the version was swapped between two answers")
        read = RowsRead(report["memory_depth"], **report["rows"])
        search = arm.args.scoring_plan().search
        reason = comparable(rows, case.now_ms, read, model, search)
        if reason:
            return _skipped(case, "; ".join([reason, *answer["degraded"]]))
        item_ids = np.array([item["item_id"] for item in answer["items"]], np.int64)
        served = [[item["tasks"][task] for task in model.tasks] for item in answer["items"]]
        return Compared(
            arm.under_audit(report["model_version"]),
            case.user_id,
            case.now_ms,
            item_ids,
            model.tasks,
            np.array(served, np.float32),
            offline_scores(
                model,
                history.as_read(rows, read),
                self._catalog(answer["stages"]["retrieval"]).lookup(item_ids),
                case.now_ms,
                case.context_id,
            ),
        )

    def _ask(self, case: AuditCase) -> dict[str, Any]:
        context = {"context_id": case.context_id, "timestamp_ms": case.now_ms}
        body = {"user_id": case.user_id, "k": self.num_items, "context": context}
        response = self.client.post("/recommend", json=body)
        if response.status_code != 200:
            raise NotAnsweredError(f"{response.status_code}: {response.text[:MAX_ERROR_CHARS]}")
        answer: dict[str, Any] = response.json()
        return answer

    def _model(self, variant: str, version: int) -> Model:
        key = (variant, version)
        if key not in self._models:
            self._models[key] = offline_model(self.registry.load("ranking", variant, version))
        return self._models[key]

    def _catalog(self, retrieval: dict[str, Any]) -> ItemCatalog:
        """Features of items as the retrieval version had them when it was published: what the
        candidates brought to ranking."""
        arm = ConfiguredArm.of(self.args, "retrieval", retrieval["variant"])
        key = (arm.model, retrieval["model_version"])
        if key not in self._catalogs:
            published = self.registry.load("retrieval", *key)
            self._catalogs[key] = ItemCatalog(published_items(published.items)[0])
        return self._catalogs[key]


def _skipped(case: AuditCase, reason: str) -> Skipped:
    return Skipped("ranking", case.user_id, case.now_ms, reason)
