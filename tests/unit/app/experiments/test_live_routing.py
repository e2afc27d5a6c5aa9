from __future__ import annotations

import logging

import pytest

from app.experiments.args import RoutingArgs
from app.experiments.live import LiveRouting

VARIANTS = {"retrieval": ("default",), "cascading": ("default",), "ranking": ("l2", "l4")}


@pytest.fixture
def routing() -> LiveRouting:
    depth = {"stage": "ranking", "arms": {"l2": 1.0, "l4": 0.0}}
    return LiveRouting(RoutingArgs.model_validate({"experiments": {"depth": depth}}), VARIANTS)


def live(l2: float, l4: float) -> dict:
    return {"experiments": {"depth": {"arms": {"l2": l2, "l4": l4}}}}


def arm(routing: LiveRouting) -> str:
    return routing.assign(1, {}).arms["ranking"]


def test_settings_change_while_serving(routing):
    assert arm(routing) == "l2"
    routing.reconfigure(live(0.0, 1.0))
    assert arm(routing) == "l4"
    routing.reconfigure({})
    assert arm(routing) == "l2"


def test_settings_that_make_no_sense_are_refused_and_the_old_ones_stay(routing, caplog):
    routing.reconfigure(live(0.0, 1.0))
    with caplog.at_level(logging.ERROR):
        routing.reconfigure(live(0.5, 0.6))
    assert arm(routing) == "l4"
    assert "those before stay" in caplog.text
    assert "must sum to 1" in routing.problem
    routing.reconfigure(live(0.5, 0.5))
    assert routing.problem == ""


def test_a_replica_does_not_start_with_settings_that_make_no_sense(routing):
    with pytest.raises(ValueError, match="must sum to 1"):
        routing.reconfigure(live(0.5, 0.6))


def test_a_replica_that_serves_without_live_settings_survives_wrong_ones(routing):
    arm(routing)
    routing.reconfigure({"experiments": {"magic": {"share": 1.0}}})
    assert arm(routing) == "l2"
    assert "['magic']" in routing.problem
