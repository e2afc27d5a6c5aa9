"""Changed histories: what depends on a change, what each treatment leaves, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from made_up_trials import make_dataset, nothing, small_config
from sample_events import make_events, make_items

from benchmarks.paper import invalidation
from benchmarks.paper.changed_histories import (
    Changed,
    StoredHistories,
    change_histories,
    depends_on,
    stored_histories,
    treat,
)
from benchmarks.paper.datasets import Dataset
from benchmarks.paper.invalidated_memories import FORGOTTEN, REFRESHED, InvalidationWatch
from benchmarks.paper.plan import CommonSettings
from benchmarks.paper.shadow_memory import ShadowMemories
from benchmarks.paper.trial import Pass, run_pass
from benchmarks.paper.watched_pass import Piece, first_of, run_watched
from cache_actors.store.lookup import ALL_ROWS
from marm.events import EventBatch
from marm.memory import RAW_STEP
from marm.memory_arrays import ArrayMemory
from marm.ranker import Ranker
from train.config import TrainConfig
from train.rebuild.histories import Histories, gather_histories
from train.rebuild.recompute import RowComputer

N = 4
COMMON = CommonSettings(history_length=N, dim=8, batch_size=32)
REACH = (0, N, 2 * N)
NEW_STEP = 99


def config_of(name: str, dataset: Dataset) -> TrainConfig:
    return small_config(COMMON, name, dataset)


def trained(dataset: Dataset) -> tuple[Pass, Ranker, StoredHistories]:
    config = config_of("marm_l2", dataset)
    memory = ArrayMemory(config.namespace)
    done = run_watched(dataset, config, memory, len(dataset), nothing)
    model = done.trainer.learners[0].model
    assert isinstance(model, Ranker)
    return done, model, stored_histories(memory, histories_of(dataset.events))


def histories_of(events: EventBatch) -> Histories:
    return gather_histories([events], np.unique(events.user_id), "all")


def changed_by(stored: StoredHistories, change: str, fraction: float) -> Changed:
    rng = np.random.default_rng(1)
    return change_histories(stored, change, fraction, make_items(20), REACH, rng)


def test_what_depends_on_a_change_is_found_as_the_plain_loop_finds_it() -> None:
    histories = histories_of(make_events(80, 4))
    hit = np.random.default_rng(0).random(80) < 0.1
    for reach in (0, 1, 5, 1 << 40):
        expected = np.zeros(80, np.bool_)
        for index, user in enumerate(histories.user_row.tolist()):
            first = max(int(histories.offsets[user]), index - reach)
            expected[index] = hit[first : index + 1].any()
        np.testing.assert_array_equal(depends_on(histories, hit, reach), expected)


def test_rows_that_depend_on_no_change_stay_as_they_are_and_others_do_not() -> None:
    """What is said to be valid is what the model itself would not compute otherwise."""
    _, model, stored = trained(make_dataset())
    before = rebuilt(model, stored.histories)
    changed = changed_by(stored, "replace", 0.05)
    after = rebuilt(model, changed.stored.histories)
    dirty = changed.depends[-1]
    assert 0 < dirty.sum() < len(dirty)
    difference = np.abs(after - before).max(axis=(1, 2))
    assert difference[~dirty].max() < 1e-5
    assert difference[changed.depends[0]].min() > 1e-4
    first_layer = np.abs(after - before)[:, 0].max(axis=1)
    assert first_layer[~changed.depends[1]].max() < 1e-5


def rebuilt(model: Ranker, histories: Histories) -> np.ndarray:
    parts = [rows["memory"] for _, rows in RowComputer(model, 0, 0).rows(histories)]
    return np.concatenate(parts).astype(np.float32)


def test_replaced_events_have_another_item_and_all_else() -> None:
    _, _, stored = trained(make_dataset())
    changed = changed_by(stored, "replace", 0.3)
    hit, after = changed.depends[0], changed.stored
    assert changed.num_changed == hit.sum() > 0
    same_item = after.histories.events.item_id == stored.histories.events.item_id
    np.testing.assert_array_equal(same_item, ~hit)
    np.testing.assert_array_equal(after.rows["item_id"], after.histories.events.item_id)
    np.testing.assert_array_equal(after.rows["tag_id"], after.histories.events.tag_id)
    for name in ("feedback", "timestamp_ms", "event_key", "memory", "written_step"):
        np.testing.assert_array_equal(after.rows[name], stored.rows[name])


def test_removed_events_are_gone() -> None:
    _, _, stored = trained(make_dataset())
    changed = changed_by(stored, "remove", 0.3)
    assert len(changed.stored.rows) == len(stored.rows) - changed.num_changed
    assert changed.num_changed > 0
    assert not changed.depends[0].any()
    np.testing.assert_array_equal(
        changed.stored.rows["event_key"], changed.stored.histories.events.event_key
    )


@pytest.mark.parametrize("change", ["replace", "remove"])
def test_each_treatment_leaves_the_rows_it_says(change: str) -> None:
    done, model, stored = trained(make_dataset())
    changed = changed_by(stored, change, 0.1)
    visible = changed.stored.histories.from_newest < N
    dirty, rows = changed.depends[-1][visible], changed.stored.rows[visible]
    fresh = rebuilt(model, changed.stored.histories)[visible]
    found, costs = {}, {}
    for treatment in ("stale", "own_raw", "raw", "recomputed"):
        memory, costs[treatment] = treat(changed, treatment, model, NEW_STEP)
        kept = memory.fetch(changed.stored.histories.user_ids, ALL_ROWS)
        np.testing.assert_array_equal(kept.rows["event_key"], rows["event_key"])
        found[treatment] = kept.rows
    np.testing.assert_array_equal(found["stale"], rows)
    np.testing.assert_array_equal(found["raw"]["written_step"] == RAW_STEP, dirty)
    own = changed.depends[0][visible]
    np.testing.assert_array_equal(found["own_raw"]["written_step"] == RAW_STEP, own)
    np.testing.assert_array_equal(found["recomputed"]["written_step"] == NEW_STEP, dirty)
    np.testing.assert_allclose(found["recomputed"]["memory"][dirty], fresh[dirty], atol=2e-3)
    np.testing.assert_array_equal(found["recomputed"][~dirty], rows[~dirty])
    assert costs["raw"].hit_rate == pytest.approx(1 - dirty.mean())
    assert costs["own_raw"].hit_rate == pytest.approx(1 - own.mean())
    assert costs["stale"].hit_rate == costs["recomputed"].valid_share == 1.0
    assert costs["stale"].valid_share == costs["raw"].valid_share == costs["raw"].hit_rate
    assert costs["recomputed"].events_computed >= dirty.sum() > 0
    assert costs["stale"].events_computed == costs["raw"].events_computed == 0
    untouched = done.memory.fetch(stored.histories.user_ids, ALL_ROWS)
    np.testing.assert_array_equal(untouched.rows, stored.rows)


def test_what_is_not_known_is_refused() -> None:
    _, model, stored = trained(make_dataset(64))
    with pytest.raises(ValueError, match="a change is one of replace, remove, got 'swap'"):
        changed_by(stored, "swap", 0.1)
    with pytest.raises(ValueError, match=r"a treatment is one of .* got 'drop'"):
        treat(changed_by(stored, "remove", 0.1), "drop", model, 0)
    bounded = ArrayMemory(model.config.namespace, 2)
    with pytest.raises(ValueError, match="lacks 64 of 64 rows"):
        stored_histories(bounded, stored.histories)


def test_a_copy_of_the_memory_gives_the_predictions_of_the_pass() -> None:
    dataset = make_dataset()
    config = config_of("marm_l2", dataset)
    memory = ArrayMemory(config.namespace)
    shadows: list[ShadowMemories] = []

    def watch(piece: Piece) -> None:
        if not shadows:
            users = np.unique(dataset.events.user_id)
            rows = memory.fetch(users, ALL_ROWS)
            copied = ArrayMemory(config.namespace, N)
            copied.save(np.repeat(users, rows.counts), rows.rows)
            shadows.append(ShadowMemories({"copy": copied}))
        shadows[0].watch(piece)

    done = run_watched(dataset, config, memory, first_of(dataset, "test"), watch)
    found = shadows[0].scores.predictions(dataset, "test")["copy"]
    np.testing.assert_allclose(found.score, done.score_N[dataset.window("test")], rtol=1e-5)


def test_changed_memories_do_not_touch_the_pass_and_matter() -> None:
    dataset = make_dataset()
    config = config_of("marm_l2", dataset)
    memory = ArrayMemory(config.namespace)
    watch = InvalidationWatch(dataset, memory, "replace", [10, 50], 0)
    done = run_watched(dataset, config, memory, first_of(dataset, "test"), watch.watch)
    np.testing.assert_array_equal(done.score_N, run_pass(dataset, config).score_N)
    found = watch.predictions("test")
    live = done.score_N[dataset.window("test")]
    distance = {name: float(np.abs(one.score - live).max()) for name, one in found.items()}
    assert next(iter(found)) == REFRESHED
    assert list(found)[1] == FORGOTTEN
    assert distance[FORGOTTEN] > distance[REFRESHED]
    assert len(found) == 10
    assert min(distance.values()) > 1e-6
    assert distance["50% stale"] > distance[REFRESHED]
    assert watch.valid_by_layer[50][1] <= watch.valid_by_layer[10][0] <= 1
    assert watch.returning.tolist() == np.unique(dataset.events.user_id).tolist()


@pytest.mark.parametrize(
    ("method", "change", "program"),
    [
        ("marm", "replace", "invalidation"),
        ("marm", "remove", "invalidation_remove"),
        ("marm_e", "replace", "invalidation_marm_e"),
    ],
)
def test_the_program_writes_what_it_found(
    method: str, change: str, program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = "world:num_users=20,num_items=50,num_events=800"
    arguments = "--seeds 2 --depth 1 --history 8 --dim 8 --batch-size 64 --percents 10 50"
    asked = ["--data", world, *arguments.split(), "--method", method, "--change", change]
    invalidation.main([*asked, "--out", str(tmp_path)])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    (file,) = tmp_path.glob("invalidation*.json")
    assert json.loads(file.read_text(encoding="utf-8")) == said
    assert file.name.startswith(f"{program}-")
    of = said["conditions"]
    assert ("10% own_raw" in of) == (change == "replace")
    assert of["unchanged"]["window"]["less_unchanged"] is None
    assert len(of["50% raw"]["returning"]["less_unchanged"]["per_seed"]) == 2
    assert of["50% raw"]["hit_rate"] < of["10% raw"]["hit_rate"] < 1
    assert of["10% recomputed"]["events_computed"] > 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}


@pytest.mark.parametrize("wrong", ["--depth 0", "--percents 0", "--percents 101"])
def test_what_makes_no_sense_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        invalidation.main(["--data", "world", *wrong.split()])
    assert "must be" in capsys.readouterr().err
