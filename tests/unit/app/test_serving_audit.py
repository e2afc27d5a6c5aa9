"""`marm audit serving`: served scores equal those of training, or it is noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from serving_models import (
    NAMESPACE,
    InProcessReader,
    make_rows,
    publish_model,
    small_config,
    some_items,
)

from app.args import AppArgs
from app.serving_audit.arms import ConfiguredArm, offline_model
from app.serving_audit.cases import AuditCase, cases_of, sample_users
from app.serving_audit.config import read_app_args
from app.serving_audit.history import OfflineHistory, comparable
from app.serving_audit.report import AuditReport, Compared, Skipped
from app.serving_audit.stage_audit import AuditedStage
from cache_actors.registry import ModelRegistry
from marm.addressing import user_bucket
from marm.config import InterestConfig
from marm.items import ItemCatalog
from marm.memory import Namespace
from marm.model_factory import Model, build_model
from marm.search import AllRows, TopRows
from stages.assemble import build_cascading, build_ranking, build_retrieval
from stages.request import RowsRead

BUILDERS = {"ranking": build_ranking, "cascading": build_cascading, "retrieval": build_retrieval}
DEEP = Namespace(depth=2, dim=8)


def fill(reader: InProcessReader, rng: np.random.Generator) -> None:
    """Users with long, short, computed and raw histories."""
    for user_id, (count, memorised) in enumerate([(40, 30), (40, 40), (3, 2), (5, 0), (16, 16)], 1):
        items = rng.integers(1, 60, count).tolist()
        rows = make_rows(items, memorised, reader.namespace)
        rows["memory"][:memorised] = rng.standard_normal(rows["memory"][:memorised].shape)
        rows["feedback"] = rng.integers(0, 64, count)
        rows["author_id"], rows["tag_id"] = rows["item_id"] % 7 + 1, rows["item_id"] % 5 + 1
        rows["context_id"] = rng.integers(0, 3, count)
        reader.save_for(user_id, rows)


def audited(stage: str, reader: InProcessReader, registry: ModelRegistry) -> AuditedStage:
    arm = ConfiguredArm.of(AppArgs(), stage, "default")
    published = arm.load(registry)
    return AuditedStage(
        arm.under_audit(published.version),
        BUILDERS[stage](published, lambda namespace: reader),
        arm.knobs,
        None,
        offline_model(published),
        OfflineHistory(reader),
    )


def cases(reader: InProcessReader) -> list[AuditCase]:
    rng = np.random.default_rng(0)
    catalog = ItemCatalog(some_items())
    rows = [reader.memory.fetch(np.array([user]), 1000) for user in range(1, 6)]
    return [case for found in rows for case in cases_of(found, catalog, 20, rng)]


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(tmp_path / "models")


@pytest.mark.parametrize("stage", sorted(BUILDERS))
@pytest.mark.parametrize(
    ("namespace", "error_layers"), [(NAMESPACE, 0), (DEEP, 0), (NAMESPACE, 1), (DEEP, 1), (DEEP, 2)]
)
def test_served_scores_equal_offline_scores(stage, namespace, error_layers, registry):
    reader = InProcessReader(namespace)
    fill(reader, np.random.default_rng(1))
    publish_model(registry, stage, namespace=namespace, error_layers=error_layers)
    report = AuditReport.of(audited(stage, reader, registry).audit_all(cases(reader)))
    (arm,) = report.arms
    assert report.passed, arm
    assert (arm.users, len(report.skipped)) == (
        5,
        0 if stage != "retrieval" else len(report.skipped),
    )
    assert report.pairs >= 5 * 20
    assert 0 < arm.worst_difference <= 1e-4
    assert report.to_dict()["arms"][0]["worst"]["user_id"] in range(1, 6)


@pytest.mark.parametrize("stage", sorted(BUILDERS))
def test_a_model_trained_with_a_search_is_served_with_it(stage, registry):
    reader = InProcessReader(DEEP)
    fill(reader, np.random.default_rng(1))
    searching = (InterestConfig(method="marm_sim", top_k=4),)
    publish_model(registry, stage, namespace=DEEP, interests=searching)
    one = audited(stage, reader, registry)
    report = AuditReport.of(one.audit_all(cases(reader)))
    assert report.passed, report.arms
    assert report.pairs >= 5 * 20
    dense = offline_model(registry.load(stage, "default", 1))
    dense.net.sequence.memory_augmented.attention.search = AllRows()
    report = AuditReport.of(replace(one, model=dense).audit_all(cases(reader)))
    assert not report.passed


def test_other_readings_of_errors_are_noticed(registry):
    reader = InProcessReader(DEEP)
    fill(reader, np.random.default_rng(1))
    publish_model(registry, "cascading", namespace=DEEP, error_layers=2)
    one = audited("cascading", reader, registry)
    with torch.no_grad():
        one.model.net.sequence.errors.weight.zero_()
    assert not AuditReport.of(one.audit_all(cases(reader))).passed


def test_other_weights_are_noticed(registry):
    reader = InProcessReader()
    fill(reader, np.random.default_rng(1))
    publish_model(registry, "ranking")
    one = audited("ranking", reader, registry)
    with torch.no_grad():
        one.model.net.heads.tower_bias += 0.01
    report = AuditReport.of(one.audit_all(cases(reader)))
    assert not report.passed
    assert report.arms[0].worst_difference > 1e-3
    worst = report.arms[0].worst
    assert worst["served"] != worst["offline"]


def test_a_shard_that_is_down_is_no_comparison(registry):
    reader = InProcessReader()
    fill(reader, np.random.default_rng(1))
    publish_model(registry, "ranking")
    one = audited("ranking", reader, registry)
    todo = cases(reader)
    served = InProcessReader()
    served.down = True
    blind = replace(
        one, stage=build_ranking(registry.load("ranking", "default", 1), lambda n: served)
    )
    report = AuditReport.of(blind.audit_all(todo))
    assert (report.passed, report.arms) == (False, ())
    assert report.to_dict()["skipped"] == {
        "ranking: the user's memory shard did not answer": len(todo)
    }


def test_rows_that_change_meanwhile_are_no_difference(registry):
    class Restless(InProcessReader):
        """Training writes between two reads."""

        def fetch_available(self, *args, **kwargs):
            found = super().fetch_available(*args, **kwargs)
            self.memory.save(np.array([1]), make_rows([7], 1, start_ms=10**6 + self.writes))
            self.writes += 1
            return found

        writes = 0

    reader = InProcessReader()
    fill(reader, np.random.default_rng(1))
    publish_model(registry, "ranking")
    restless = Restless()
    fill(restless, np.random.default_rng(1))
    one = replace(audited("ranking", reader, registry), history=OfflineHistory(restless))
    outcome = one.audit(cases(reader)[0])
    assert isinstance(outcome, Skipped)
    assert outcome.reason == "the user's rows kept changing"


def test_what_serving_left_out_is_not_compared():
    rows = InProcessReader()
    rows.save_for(1, make_rows(list(range(1, 9)), 8))
    found = rows.memory.fetch(np.array([1]), 100)
    now_ms = int(found.rows["timestamp_ms"][5])
    all_read, dense = RowsRead(1, 0, 5), model_of(history_length=16)
    assert comparable(found, now_ms, all_read, dense, None) == ""
    assert comparable(found, now_ms, RowsRead(1, 0, 4), model_of(history_length=4), None) == ""
    assert "read 3 rows instead of 5" in comparable(found, now_ms, RowsRead(1, 3), dense, None)
    assert "did not answer" in comparable(found, now_ms, RowsRead(missing=True), dense, None)
    found_2 = model_of(interests=(InterestConfig(method="marm_sim", top_k=2),), history_length=16)
    for model, search, reason in [
        (dense, AllRows(), ""),
        (dense, TopRows(5), ""),
        (dense, TopRows(2), "training to AllRows()"),
        (found_2, None, ""),
        (found_2, TopRows(2), ""),
        (found_2, TopRows(5), "attends to TopRows(k=5) (search_top_k), and training to TopRows("),
        (found_2, AllRows(), "attends to AllRows()"),
    ]:
        told = comparable(found, now_ms, all_read, model, search)
        assert reason in told
        assert bool(told) == bool(reason)


def model_of(**settings: object) -> Model:
    return build_model(small_config("ranking", **settings))


def test_users_come_from_the_memory():
    users = np.arange(1, 200)

    def of_bucket(bucket: int) -> np.ndarray:
        return users[user_bucket(users) == bucket]

    found = sample_users(of_bucket, 10, np.random.default_rng(0))
    assert len(set(found)) == 10
    assert set(found) <= set(users.tolist())
    assert found == sample_users(of_bucket, 10, np.random.default_rng(0))
    assert len(sample_users(of_bucket, 10_000, np.random.default_rng(0))) == 199


def test_a_case_looks_into_the_past():
    reader = InProcessReader()
    fill(reader, np.random.default_rng(1))
    now, past = sorted(cases(reader)[:2], key=lambda case: -case.now_ms)
    stamps = reader.memory.fetch(np.array([1]), 100).rows["timestamp_ms"]
    assert now.now_ms == stamps[-1] + 1
    assert past.now_ms == stamps[20]
    assert len(now.items) == 20
    assert np.isin(now.items.item_id, some_items().item_id).all()
    empty = InProcessReader().memory.fetch(np.array([1]), 1)
    assert list(cases_of(empty, ItemCatalog(some_items()), 4, np.random.default_rng(0))) == []


def test_the_configuration_says_what_an_arm_serves(tmp_path, registry):
    for seed in range(3):
        publish_model(registry, "ranking", seed)
    config = {
        "applications": [
            {
                "import_path": "app.build:build_app",
                "args": {"ranking": {"variants": {"canary": {"model": "default"}}}},
                "deployments": [{"name": "ranking-canary", "user_config": {"model_version": 2}}],
            }
        ]
    }
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    arm = ConfiguredArm.of(read_app_args(path), "ranking", "canary")
    assert (arm.model, arm.load(registry).version, arm.tolerance) == ("default", 2, 1e-4)
    with pytest.raises(ValueError, match="ranking has no arm 'default' in this configuration"):
        ConfiguredArm.of(read_app_args(path), "ranking", "default")
    for text, message in [
        ("{", "is not YAML"),
        ("[]", "one application"),
        ("applications: []", "one application"),
        ("applications: [{import_path: 'app.build:build_app', args: {x: 1}}]", "args in"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_app_args(path)
    with pytest.raises(ValueError, match="cannot read"):
        read_app_args(tmp_path / "none.yaml")


def test_an_audit_of_nothing_does_not_pass():
    assert not AuditReport.of([]).passed
    assert AuditReport.of([]).to_dict()["worst_difference"] is None


def test_a_score_that_is_not_finite_is_infinitely_far():
    arm = ConfiguredArm.of(AppArgs(), "ranking", "default").under_audit(1)
    scores = np.array([[0.5, 0.5]], np.float32)
    broken = np.array([[0.5, np.nan]], np.float32)
    ids = np.array([9])
    report = AuditReport.of([Compared(arm, 1, 5, ids, ("click", "like"), broken, scores)])
    assert not report.passed
    assert report.arms[0].worst["task"] == "like"
