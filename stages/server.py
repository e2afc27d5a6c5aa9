"""One stage variant as a server without Ray: its live model, its knobs, its deadline."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

from pydantic import ValidationError

from marm.memory import Namespace
from stages.knobs import StageKnobs
from stages.live_model import LiveModel
from stages.request import Outcome, StageName, StageRequest, StageResult, StageStatus
from stages.turns import TurnMissedError

logger = logging.getLogger("ray.serve")

K = TypeVar("K", bound=StageKnobs)
K_contra = TypeVar("K_contra", bound=StageKnobs, contravariant=True)


class Stage(Protocol[K_contra]):
    """One loaded version of a stage."""

    @property
    def version(self) -> int:
        """The published version."""
        ...

    @property
    def namespace(self) -> Namespace:
        """The memory that is read."""
        ...

    def run(self, request: StageRequest, knobs: K_contra) -> StageResult:
        """Answer one request.

        Raises:
            TurnMissedError: its time was over before it could be computed.
        """
        ...


class StageServer(Generic[K]):
    """Runs requests on whatever version is live, under the knobs set last."""

    def __init__(
        self, stage: StageName, variant: str, live: LiveModel[Stage[K]], knobs: type[K]
    ) -> None:
        self._stage = stage
        self._variant = variant
        self._live = live
        self._knobs_type = knobs
        self._knobs = knobs()
        self._is_configured = False
        self._settings_problem = ""

    def reconfigure(self, settings: Mapping[str, Any]) -> None:
        """Replace the knobs as a whole; settings that are not understood change nothing.

        Raises:
            ValueError: the first settings are not understood, so the replica may not start. Later
                ones are reported instead: Serve ends a replica whose reconfiguration fails.
        """
        try:
            knobs = self._knobs_type.model_validate(dict(settings))
        except ValidationError as error:
            problem = f"user_config of {self._stage}/{self._variant}: {error}"
            if not self._is_configured:
                raise ValueError(problem) from error
            self._settings_problem = f"{problem}; the settings before stay in force"
            logger.error("%s", self._settings_problem)
            return
        self._is_configured, self._settings_problem = True, ""
        if knobs.model_version != self._knobs.model_version:
            self._live.want(knobs.model_version)
        self._knobs = knobs

    def run(self, request: StageRequest) -> StageResult:
        """Answer one request, or say why not."""
        started = time.perf_counter()
        stage = self._live.current
        if stage is None:
            return self._refuse("no_model", request, self._live.problem)
        late_ms = time.time() * 1000 - request.deadline_ms
        if late_ms > 0:
            return self._refuse("late", request, f"the request was {late_ms:.0f} ms late")
        try:
            result = stage.run(request, self._knobs)
        except TurnMissedError as error:
            return self._refuse("late", request, str(error))
        elapsed_ms = (time.perf_counter() - started) * 1000
        # The arm's name, which may differ from that of the published variant it serves.
        return replace(result, variant=self._variant, elapsed_ms=elapsed_ms)

    def answer(self, request: StageRequest) -> StageResult:
        """As `run`; an error is logged, and is an answer of its own."""
        try:
            return self.run(request)
        except Exception as error:
            logger.exception("%s/%s: %s failed", self._stage, self._variant, request.request_id)
            return self._refuse("failed", request, f"failed ({type(error).__name__})")

    def status(self) -> StageStatus:
        """Whether this variant can serve, and with what."""
        stage = self._live.current
        return StageStatus(
            stage=self._stage,
            variant=self._variant,
            model_version=None if stage is None else stage.version,
            namespace=None if stage is None else stage.namespace,
            problem="; ".join(filter(None, (self._live.problem, self._settings_problem))),
            newest_event_ms=None if stage is None else self._live.newest_event_ms,
            lists=self._knobs.lists,
        )

    def _refuse(self, outcome: Outcome, request: StageRequest, reason: str) -> StageResult:
        return StageResult(
            self._stage,
            self._variant,
            outcome=outcome,
            num_in=len(request.candidates),
            reason=reason,
        )
