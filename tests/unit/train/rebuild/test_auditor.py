"""Audits: errors of stored rows against fresh ones, by layer and age."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rebuild_samples import STEP, SmallPool, Streamed, frozen_weights, sample_history, streamed
from sample_events import make_rows, small_config

from marm.addressing import NUM_BUCKETS
from marm.memory import RAW_STEP
from train.rebuild.auditor import AuditCounts, Auditor
from train.rebuild.compare import (
    RowErrors,
    by_seconds,
    by_steps,
    compare_rows,
    summarize,
)
from train.rebuild.log_part import events_before

WEIGHTS = frozen_weights(history_length=5)
USERS = np.arange(1, 8)


@pytest.fixture
def trained(tmp_path: Path) -> Streamed:
    return streamed(tmp_path / "log", WEIGHTS, sample_history())


def audit(
    trained: Streamed, memory: SmallPool, newest: int | None = None
) -> tuple[AuditCounts, RowErrors]:
    batches = events_before(trained.log, WEIGHTS.log_end, np.arange(NUM_BUCKETS))
    return Auditor(WEIGHTS, memory, newest).audit(batches, USERS)


def test_rows_of_the_same_weights_have_no_error(trained: Streamed) -> None:
    counts, errors = audit(trained, trained.memory)
    assert counts == AuditCounts(users=7, rows=400)
    assert errors.error.shape == errors.cosine.shape == (400, 2)
    assert errors.error.max() < 1e-5
    assert errors.cosine.min() > 1 - 1e-5


def test_other_weights_are_far_off_and_the_memory_is_untouched(
    trained: Streamed, tmp_path: Path
) -> None:
    other = streamed(
        tmp_path / "other", frozen_weights(seed=1, history_length=5), sample_history()
    ).memory
    before = other.fetch(USERS, 1000).rows.tobytes()
    _, errors = audit(trained, other)
    assert errors.error.min(axis=1).mean() > 0.3
    assert errors.cosine.mean() < 0.9
    assert other.fetch(USERS, 1000).rows.tobytes() == before


def test_missing_and_raw_rows_are_counted(trained: Streamed) -> None:
    full = trained.memory.fetch(USERS, 1000)
    owners, rows = np.repeat(full.user_ids, full.counts), full.rows.copy()
    rows["written_step"][::7] = RAW_STEP
    kept = (np.arange(400) % 5 != 0) & (owners != 3)
    memory = SmallPool(WEIGHTS.config.namespace)
    memory.save(owners[kept], rows[kept])
    counts, errors = audit(trained, memory)
    is_raw = kept & (np.arange(400) % 7 == 0)
    assert counts == AuditCounts(7, 1, 400, int((~kept).sum()), int(is_raw.sum()))
    assert len(errors.error) == (kept & ~is_raw).sum()
    assert errors.error.max() < 1e-5


def test_the_newest_rows_alone_can_be_compared(trained: Streamed) -> None:
    counts, errors = audit(trained, trained.memory, newest=4)
    assert (
        counts.rows
        == len(errors.error)
        == np.minimum(trained.memory.fetch(USERS, 1000).counts, 4).sum()
    )
    assert errors.error.max() < 1e-5


def test_errors_of_known_vectors() -> None:
    namespace = small_config().namespace
    fresh, stored = make_rows(namespace, [1, 2, 3, 4], 1), make_rows(namespace, [1, 2, 3, 4], 1)
    stored["memory"][1] *= 2
    stored["memory"][2] *= -1
    stored["memory"][3] = 0
    errors = compare_rows(stored, fresh)
    for layer in range(2):
        np.testing.assert_allclose(errors.error[:, layer], [0, 1, 2, 1], atol=1e-6)
        np.testing.assert_allclose(errors.cosine[:, layer], [1, 1, -1, 0], atol=1e-6)
    layers = summarize(errors)
    assert [layer.layer for layer in layers] == [1, 2]
    assert layers[0].error_mean == pytest.approx(1.0)
    assert layers[0].error_p50 == pytest.approx(1.0)
    assert layers[0].cosine_mean == pytest.approx(0.25)


def test_ages_are_classes_of_steps_and_seconds() -> None:
    steps = [STEP + 5, STEP, STEP - 1, STEP - 9, STEP - 10, 0]
    now_s = 2_000_000_000
    errors = RowErrors(
        np.array(steps, np.int32),
        np.array([now_s + 9, now_s, now_s - 59, now_s - 60, now_s - 86_400, 5], np.uint32),
        np.arange(12, dtype=np.float32).reshape(6, 2),
        np.ones((6, 2), np.float32),
    )
    classes = by_steps(errors, STEP)
    assert [(c.at_least, c.below, c.rows) for c in classes] == [
        (None, 0, 1),
        (0, 1, 1),
        (1, 10, 2),
        (10, 100, 1),
        (1_000, 10_000, 1),
    ]
    assert [layer.error_mean for layer in classes[2].layers] == [5.0, 6.0]
    assert [(c.at_least, c.below, c.rows) for c in by_seconds(errors, now_s)] == [
        (0, 60, 3),
        (60, 600, 1),
        (86_400, 604_800, 1),
        (604_800, None, 1),
    ]


def test_nothing_to_compare_is_no_error() -> None:
    none = RowErrors.concat([], 2)
    assert by_steps(none, STEP) == ()
    assert summarize(none) == ()
