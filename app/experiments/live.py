"""Routing that is changed while it serves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from app.experiments.args import RoutingArgs
from app.experiments.assignment import Assignment
from app.experiments.table import ExperimentTable, experiment_table
from stages.request import StageName

logger = logging.getLogger("ray.serve")


class LiveRouting:
    """The table of the settings that were accepted last.

    Serve stops a replica whose ``reconfigure`` raises. So settings that make no sense raise only
    until the first are accepted, where starting is what has to fail; later ones are refused with an
    error in the log and a reason in the health report, and those before stay.
    """

    def __init__(self, routing: RoutingArgs, variants: Mapping[StageName, tuple[str, ...]]) -> None:
        """Start from the args, without live settings."""
        self._routing = routing
        self._variants = variants
        self._table = ExperimentTable(routing, variants)
        self._started = False
        self._problem = ""

    @property
    def problem(self) -> str:
        """Why the newest live settings are not in force; empty when they are."""
        return self._problem

    def assign(
        self, user_id: int, overrides: Mapping[StageName, str], role: str | None = None
    ) -> Assignment:
        """See `ExperimentTable.assign`."""
        self._started = True
        return self._table.assign(user_id, overrides, role)

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Take new live settings whole, or keep those in force and say why.

        Raises:
            ValueError: the first settings of a replica make no sense.
        """
        try:
            table = experiment_table(self._routing, self._variants, user_config)
        except ValueError as error:
            if not self._started:
                raise
            self._problem = f"new live settings are refused and those before stay: {error}"
            logger.error(self._problem)
            return
        self._table, self._problem, self._started = table, "", True
