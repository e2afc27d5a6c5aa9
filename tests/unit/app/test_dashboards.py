"""The dashboards ask for metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

from cache_actors.pool import metrics

DASHBOARD = Path(__file__).resolve().parents[3] / "cluster" / "dashboards" / "memory.json"


def test_every_query_is_of_a_metric_that_is_reported() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"ray_(marm_\w+)", target["expr"])
    }
    shown = {re.sub(r"_(bucket|total)$", "", name) for name in asked}
    gauges = {f"marm_memory_{name}" for name in metrics._GAUGES}
    clients = {f"marm_memory_client_{name}" for name in metrics._CLIENT_GAUGES}
    others = {"read_ms", "write_ms", "client_read_ms", "client_users"}
    assert shown == gauges | clients | {f"marm_memory_{name}" for name in others}
