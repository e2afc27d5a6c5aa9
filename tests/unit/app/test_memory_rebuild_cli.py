"""Options and output of `marm memory rebuild` and `marm memory audit`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from app.cli.memory.audit import describe, tables
from app.cli.memory.rebuild import asked_users, bound_steps
from app.cli.memory.rebuild import describe as describe_rebuild
from app.cli.session import to_json
from train.rebuild.audit import AuditReport
from train.rebuild.auditor import AuditCounts
from train.rebuild.compare import AgeClass, LayerErrors
from train.rebuild.rebuilder import TaskReport
from train.rebuild.run import RebuildReport

LAYERS = (LayerErrors(1, 0.25, 0.2, 0.5, 0.9, 0.8), LayerErrors(2, 0.5, 0.4, 0.9, 0.8, 0.7))
REPORT = AuditReport(
    "default",
    3,
    1_000,
    AuditCounts(users=10, users_without_rows=1, rows=200, missing_rows=20, raw_rows=10),
    LAYERS,
    (AgeClass(None, 0, 5, LAYERS), AgeClass(0, 1, 5, LAYERS), AgeClass(10, 100, 160, LAYERS)),
    (
        AgeClass(0, 60, 100, LAYERS),
        AgeClass(3_600, 21_600, 50, LAYERS),
        AgeClass(604_800, None, 20, LAYERS),
    ),
)


def test_users_are_listed_or_in_a_file(tmp_path: Path) -> None:
    assert asked_users(None, None) is None
    assert asked_users("3, -4,5", None) == (3, -4, 5)
    file = tmp_path / "lost.txt"
    file.write_text("7\n8\n\n9\n")
    assert asked_users(None, file) == (7, 8, 9)


def test_wrong_users_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ids separated by commas, got 'x'"):
        asked_users("1,x", None)
    with pytest.raises(ValueError, match=r"of 64 bits, got '9223372036854775808'"):
        asked_users("9223372036854775808", None)
    with pytest.raises(ValueError, match="exclude each other"):
        asked_users("1", tmp_path)
    with pytest.raises(ValueError, match="cannot read the users in"):
        asked_users(None, tmp_path / "absent")
    file = tmp_path / "lost.txt"
    file.write_text("7\nseven\n")
    with pytest.raises(ValueError, match="must hold one user id per line, got 'seven'"):
        asked_users(None, file)


def test_what_is_due_is_chosen_by_one_option() -> None:
    assert bound_steps(False, None) == 0
    assert bound_steps(False, 50) == 50
    assert bound_steps(True, None) is None
    with pytest.raises(ValueError, match="exclude each other"):
        bound_steps(True, 50)


def test_a_rebuild_in_a_sentence() -> None:
    report = RebuildReport("default", 3, 1_000, 2, 4, TaskReport(10, 2_000, 5, 900, 800))
    assert describe_rebuild(report) == (
        "800 of 2,000 rows rewritten with default version 3 (step 1,000), for 5 of 10 users; "
        "2 users have no events in the log"
    )


def test_an_audit_as_tables_and_json() -> None:
    console = Console(width=120, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as captured:
        for table in tables(REPORT):
            console.print(table)
    text = captured.get()
    for label in ("newer than the version", "10 to 99", "below 1 min", "1 h to 6 h", "7 d or more"):
        assert label in text
    assert "0.2500" in text
    assert describe(REPORT).endswith("10.00% missing, 5.00% raw; 1 users without any row")
    document = json.loads(to_json(REPORT.to_dict()))
    assert document["counts"]["missing_share"] == 0.1
    assert document["by_steps"][2]["layers"][1]["error_p95"] == 0.9
