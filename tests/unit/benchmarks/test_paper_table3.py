"""A/B tests in the simulated world: the truth wins, and what is equal differs by nothing."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.paper import table3
from benchmarks.paper.table3_lift import (
    METRICS,
    LifeMetric,
    PooledLift,
    SeedLift,
    adjusted_lift,
    plain_lift,
    pooled_lift,
)
from benchmarks.paper.table3_models import CONTEXT_ID, LiveModels
from benchmarks.paper.table3_seed import (
    EXPERIMENTS,
    WITHOUT,
    SeedPlan,
    SeedResult,
    run_seed,
    split_users,
)
from benchmarks.paper.table3_world import SIGNALS, Arm, Lives, Traffic, live
from marm.addressing import mix64
from marm.config import ModelConfig
from marm.events import TASKS, EventBatch
from marm.memory import Namespace
from stages.fusion import best_first
from train.config import TrainConfig, three_stages
from train.data.world import World
from train.data.world_config import WorldConfig
from train.offline_scores import offline_scores

WORLD = WorldConfig(num_users=20, num_items=60, num_events=400, num_tags=6, num_interests=2)
TWO = {name: EXPERIMENTS[name] for name in (WITHOUT, "all")}
SMALL = Traffic(rounds=2, retrieved=20, preselected=10, shown=4)


class Truth:
    """Knows what every user thinks."""

    def __init__(self, world: World) -> None:
        self._world, self._items = world, world.items().item_id

    def find(self, user_id: int, now_ms: int, limit: int) -> NDArray[np.int64]:
        return self._items[best_first(self.rank(user_id, self._items, now_ms), limit)]

    def preselect(
        self, user_id: int, item_ids: NDArray[np.int64], now_ms: int
    ) -> NDArray[np.float32]:
        return self.rank(user_id, item_ids, now_ms)

    def rank(self, user_id: int, item_ids: NDArray[np.int64], now_ms: int) -> NDArray[np.float32]:
        users = np.full(len(item_ids), user_id)
        chances = self._world.reveal(users, item_ids, CONTEXT_ID, now_ms)
        return chances[:, TASKS.index("long_view")]


class Blind(Truth):
    """Knows nothing: another order for every user."""

    def rank(self, user_id: int, item_ids: NDArray[np.int64], now_ms: int) -> NDArray[np.float32]:
        return (mix64(item_ids + 1_000 * user_id) >> np.uint64(40)).astype(np.float32)


def nothing(events: EventBatch) -> None:
    assert len(events)


def lives_of(stages: tuple[str, ...], world: World, treated: NDArray[np.bool_]) -> Lives:
    own = copy.deepcopy(world)
    blind, truth = Blind(own), Truth(own)
    treatment = Arm(
        **{s: truth if s in stages else blind for s in ("retrieval", "cascading", "ranking")}
    )
    return live(own, (Arm(blind, blind, blind), treatment), treated, SMALL, 0, nothing)


def world_of_users(num_users: int) -> World:
    world = World(replace(WORLD, num_users=num_users, num_events=10 * num_users))
    for _ in world.stream():
        pass
    return world


def test_an_arm_that_is_told_the_truth_wins_at_every_stage() -> None:
    world, treated = world_of_users(150), split_users(150, 0)
    without = lives_of((), world, treated)
    gains = {}
    for name, stages in EXPERIMENTS.items():
        lives = lives_of(stages, world, treated)
        np.testing.assert_array_equal(lives["requests"], without["requests"])
        # No model learns here, so what others are shown changes nothing for the control.
        for signal in SIGNALS:
            np.testing.assert_array_equal(lives[signal][~treated], without[signal][~treated])
        lifts = {m.name: adjusted_lift(m, lives, without, treated) for m in METRICS}
        gains[name] = pooled_lift([lifts["expected_long_view_rate"]]).lift
        if stages:
            assert gains[name].low > 0.05
            assert lifts["watch_time_per_user_s"].value > 0.05
            plain = pooled_lift([plain_lift(METRICS[0], lives, treated)]).lift
            observed = pooled_lift([lifts["long_view_rate"]]).lift
            assert plain.high > observed.low
    assert (gains[WITHOUT].value, gains[WITHOUT].low, gains[WITHOUT].high) == (0, 0, 0)
    assert gains["all"].value > max(gains[name].value for name in ("retrieval", "ranking"))


def test_equal_arms_differ_by_nothing_however_users_are_split() -> None:
    world = world_of_users(40)
    first, second = (lives_of((), world, split_users(40, seed)) for seed in (0, 1))
    for signal in SIGNALS:
        np.testing.assert_array_equal(first[signal], second[signal])
    treated = split_users(40, 1)
    for metric in METRICS:
        lift = pooled_lift([adjusted_lift(metric, first, second, treated)])
        assert (lift.lift.value, lift.lift.low, lift.lift.high, lift.p_value) == (0, 0, 0, 1)
        assert plain_lift(metric, first, treated).value != 0  # users differ
    other = dict(first, requests=first["requests"] + 1)
    with pytest.raises(ValueError, match="same users at the same times"):
        adjusted_lift(METRICS[0], first, other, treated)


def train_config(depth: int) -> TrainConfig:
    ranking = ModelConfig(
        namespace=Namespace(depth=depth, dim=8),
        depth=depth,
        history_length=8,
        attention_dim=8,
        feature_dim=8,
        expert_dim=8,
        output_dim=8,
        tasks=("long_view",),
        num_slots=1 << 10,
    )
    models = three_stages(ranking, cascading_history=6, retrieval_history=10)
    return TrainConfig(models=models, batch_size=64, max_ahead_s=None)


def plan_of(depth: int) -> SeedPlan:
    return SeedPlan(0, WORLD, train_config(0), train_config(depth), SMALL, "test")


def test_a_seed_is_reproducible_and_depth_shows() -> None:
    first, again = run_seed(plan_of(1), TWO), run_seed(plan_of(1), TWO)
    for name, lives in first.lives.items():
        for signal in SIGNALS:
            np.testing.assert_array_equal(lives[signal], again.lives[name][signal])
    assert first.figures == again.figures
    assert first.figures["control"] != first.figures["marm"]
    assert {"ranking_gauc", "cascading_gauc", "retrieval_recall@50"} <= set(first.figures["marm"])
    without = first.lives[WITHOUT]
    assert np.abs(first.lives["all"]["watch_s"] - without["watch_s"]).max() > 0
    kept = SeedResult.from_json(first.to_json())
    np.testing.assert_array_equal(kept.treated_U, first.treated_U)
    np.testing.assert_array_equal(kept.lives["all"]["watch_s"], first.lives["all"]["watch_s"])


def test_a_treatment_that_is_the_control_changes_no_life() -> None:
    """Models that were trained and copied apart, but alike, answer alike."""
    found = run_seed(plan_of(0), TWO)
    for lives in found.lives.values():
        for signal in SIGNALS:
            np.testing.assert_array_equal(lives[signal], found.lives[WITHOUT][signal])


def test_live_models_answer_as_training_predicts_and_forks_go_their_own_ways() -> None:
    world = World(WORLD)
    events = EventBatch.concat(list(world.stream()))
    models = LiveModels(train_config(2), world.items())
    models.learn(events.take(slice(0, 300)))
    fork = models.fork()
    now_ms, items = int(events.timestamp_ms[-1]) + 1, world.items()
    user = int(events.user_id[0])
    before = models.rank(user, items.item_id, now_ms)
    np.testing.assert_array_equal(fork.rank(user, items.item_id, now_ms), before)
    fork.learn(events.take(slice(300, None)))
    np.testing.assert_array_equal(models.rank(user, items.item_id, now_ms), before)
    models.learn(events.take(slice(300, None)))
    for one in (models, fork):  # a fork learns as the original does
        by_stage = {learner.stage: learner.model for learner in one.trainer.learners}
        expected = {}
        for stage, model in by_stage.items():
            rows = one.memory.fetch(np.array([user]), model.config.history_length)
            expected[stage] = offline_scores(model, rows, items, now_ms, CONTEXT_ID)[:, 0]
        ranked = one.rank(user, items.item_id, now_ms)
        assert np.abs(ranked - before).max() > 1e-4
        np.testing.assert_allclose(ranked, expected["ranking"], atol=1e-5)
        np.testing.assert_allclose(
            one.preselect(user, items.item_id, now_ms), expected["cascading"], atol=1e-5
        )
        rows = one.memory.fetch(np.array([user]), 10)
        unseen = ~np.isin(items.item_id, rows.rows["item_id"])
        found = one.find(user, now_ms, int(unseen.sum()))
        assert set(found.tolist()) == set(items.item_id[unseen].tolist())
        place = {item: index for index, item in enumerate(items.item_id.tolist())}
        scores = expected["retrieval"][[place[item] for item in found.tolist()]]
        assert np.all(np.diff(scores) < 1e-5)
    np.testing.assert_array_equal(
        models.rank(user, items.item_id, now_ms), fork.rank(user, items.item_id, now_ms)
    )
    one_stage = replace(train_config(2), models=train_config(2).models[:1])
    with pytest.raises(ValueError, match=r"need a model, got \['ranking'\]"):
        LiveModels(one_stage, items)


def test_lifts_over_seeds() -> None:
    alike = pooled_lift([SeedLift(1.0, value, 1e-4, 100.0) for value in (0.02, 0.021, 0.022)])
    assert alike.lift.value == pytest.approx(0.021)
    assert alike.error_users == pytest.approx((3e-4) ** 0.5 / 3)
    assert alike.lift.high - alike.lift.value == pytest.approx(1.968 * alike.error_users, rel=1e-3)
    apart = pooled_lift([SeedLift(1.0, value, 1e-6, 100.0) for value in (-0.02, 0.02, 0.03)])
    assert apart.error_seeds == pytest.approx(np.std([-0.02, 0.02, 0.03], ddof=1) / 3**0.5)
    assert apart.lift.high - apart.lift.value == pytest.approx(4.3027 * apart.error_seeds, rel=1e-3)
    unknown = pooled_lift([SeedLift(0.0, np.nan, np.nan, np.nan)])
    assert np.isnan([unknown.lift.value, unknown.lift.low, unknown.p_value]).all()
    with pytest.raises(ValueError, match="no lift to pool"):
        pooled_lift([])


def test_intervals_hold_the_true_lift_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    metric, treated = LifeMetric("rate", "rate", "long_views"), np.arange(120) < 60
    missed: dict[str, int] = {"plain": 0, "adjusted": 0}
    widths: dict[str, list[float]] = {"plain": [], "adjusted": []}
    for _ in range(300):
        lifts: dict[str, list[SeedLift]] = {"plain": [], "adjusted": []}
        for _ in range(2):
            rate = rng.beta(6, 12, 120)
            items = rng.integers(5, 30, 120)
            requests = np.ones(120)
            then, now = (
                {"requests": requests, "items": 1.0 * items, "long_views": 1.0 * drawn}
                for drawn in (
                    rng.binomial(items, rate),
                    rng.binomial(items, rate * np.where(treated, 1.1, 1.0)),
                )
            )
            lifts["plain"].append(plain_lift(metric, now, treated))
            lifts["adjusted"].append(adjusted_lift(metric, now, then, treated))
        for name, seeds in lifts.items():
            found = pooled_lift(seeds)
            missed[name] += not found.lift.low <= 0.1 <= found.lift.high
            widths[name].append(found.error_users)
    assert max(missed.values()) / 300 < 0.09
    assert np.mean(widths["adjusted"]) < 0.9 * np.mean(widths["plain"])


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = "world:num_users=24,num_items=60,num_events=400,num_tags=6,num_interests=2"
    arguments = ["--data", data, "--seeds", "2", "--dim", "8", "--history", "8"]
    arguments += ["--rounds", "1", "--shown", "4", "--preselected", "8", "--retrieved", "16"]
    arguments += ["--scratch", str(tmp_path / "scratch"), "--out", str(tmp_path / "out")]
    table3.main(arguments)
    printed = capsys.readouterr().out
    last_line = json.loads(printed.splitlines()[-1], parse_constant=pytest.fail)
    assert set(last_line["experiments"]) == set(EXPERIMENTS) - {WITHOUT}
    for found in last_line["experiments"].values():
        assert set(found["lift"]) == set(found["plain_lift"]) == {one.name for one in METRICS}
        assert len(found["lift"]["long_view_rate"]["per_seed"]) == 2
        assert len(set(found["plain_lift"]["expected_long_view_rate"]["per_seed"])) == 2
    by_suffix = {path.suffix: path for path in (tmp_path / "out").iterdir()}
    assert set(by_suffix) == {".json", ".md", ".png"}
    assert json.loads(by_suffix[".json"].read_text()) == last_line
    assert by_suffix[".md"].read_text().startswith("# Table 3")
    assert "events per CPU s on the log" in printed
    table3.main(arguments)
    again = capsys.readouterr().out
    assert "events per CPU s on the log" not in again  # from disk
    assert json.loads(again.splitlines()[-1])["experiments"] == last_line["experiments"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--data", "ratings.parquet"], "users of a recorded log can't be shown other items"),
        (["--data", "world", "--limit", "500"], "use world:num_events=500"),
    ],
)
def test_what_it_cannot_take(
    options: list[str], reason: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        table3.main(options)
    assert reason in capsys.readouterr().err


def test_stages_let_fewer_and_fewer_through() -> None:
    with pytest.raises(ValueError, match="retrieved=20, preselected=30"):
        Traffic(retrieved=20, preselected=30)
    assert isinstance(pooled_lift([SeedLift(1.0, 0.1, 0.0, 10.0)]), PooledLift)
