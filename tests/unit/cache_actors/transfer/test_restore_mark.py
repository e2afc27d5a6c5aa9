"""Readiness waits for a restore, also for one whose process died."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache_actors.transfer.restore_mark import (
    MARK_NAME,
    abandon_restore,
    read_restore_mark,
    restore_awaited,
    restoring,
)


def test_nothing_is_awaited_unless_asked_for(tmp_path: Path) -> None:
    assert read_restore_mark(tmp_path) is None
    assert restore_awaited(tmp_path, required=False) is None
    assert restore_awaited(tmp_path, required=True) == "the memory waits for `marm memory restore`"


@pytest.mark.parametrize("required", [False, True])
def test_a_restore_is_awaited_until_it_is_done(tmp_path: Path, required: bool) -> None:
    with restoring(tmp_path, "s3://me:secret@host/x") as rows:
        reason = restore_awaited(tmp_path, required=required)
        assert reason is not None
        assert "restored from s3://me:***@host/x since 0 min" in reason
        rows.append(5)
    mark = read_restore_mark(tmp_path)
    assert mark is not None
    assert mark.finished_ms is not None
    assert (mark.rows, mark.finished_ms >= mark.started_ms) == (5, True)
    assert restore_awaited(tmp_path, required=required) is None
    assert abandon_restore(tmp_path) is None
    assert read_restore_mark(tmp_path) == mark


def test_one_that_failed_is_awaited_until_it_is_repeated_or_given_up(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(OSError, match="gone"), restoring(tmp_path, "/snapshots/1"):
            raise OSError("gone")
        reason = restore_awaited(tmp_path, required=False)
        assert reason is not None
        assert "run `marm memory restore` again, or give it up with --abandon" in reason
    with restoring(tmp_path, "/snapshots/1"):
        pass
    assert restore_awaited(tmp_path, required=False) is None
    with pytest.raises(OSError, match="gone"), restoring(tmp_path, "/snapshots/2"):
        raise OSError("gone")
    given_up = abandon_restore(tmp_path)
    assert given_up is not None
    assert given_up.source_url == "/snapshots/2"
    assert restore_awaited(tmp_path, required=False) is None


@pytest.mark.parametrize("content", ["", "[1]", '{"rows": 1}', '{"source_url": "x", "odd": 1}'])
def test_an_unreadable_mark_is_no_reason_to_be_ready(tmp_path: Path, content: str) -> None:
    (tmp_path / MARK_NAME).write_text(content)
    reason = restore_awaited(tmp_path, required=False)
    assert reason is not None
    assert "must describe a restore" in reason
