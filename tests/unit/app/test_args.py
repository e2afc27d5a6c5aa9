from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from app.args import AppArgs
from app.experiments.table import experiment_table
from stages.knobs import RankingKnobs

REPO = Path(__file__).resolve().parents[3]


def test_defaults():
    args = AppArgs()
    assert {stage: limits.candidates for stage, limits in args.stage_limits().items()} == {
        "retrieval": 1000,
        "cascading": 200,
        "ranking": 200,
    }
    assert args.limits.default_k == 20


def test_the_shipped_config_is_accepted():
    config = yaml.safe_load((REPO / "serve_config.yaml").read_text())
    (application,) = config["applications"]
    assert application["import_path"] == "app.build:build_app"
    args = AppArgs.model_validate(application["args"])
    assert args.home == "marm-home"
    for deployment in application.get("deployments", []):
        if deployment["name"] == "ingress":
            table = experiment_table(args.routing, args.arms(), deployment["user_config"])
            assert table.assign(1, {}).arms == args.controls()
        if deployment["name"] == "ranking-default":
            RankingKnobs.model_validate(deployment["user_config"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"magic": 1}, "Extra inputs"),
        ({"memory": {"shards": 0}}, "greater than or equal to 1"),
        ({"retrieval": {"variants": {}}}, "at least one variant"),
        ({"retrieval": {"variants": {"Bad Name": {}}}}, "match pattern"),
        ({"retrieval": {"variants": {"a": {"index": "magic"}}}}, "must be one of"),
        ({"ranking": {"variants": {"a": {"user_config": {"fusion": {"x": 1}}}}}}, "fusion must"),
        ({"ranking": {"variants": {"a": {"user_config": {"filter_seen": True}}}}}, "Extra inputs"),
        (
            {"ingress": {"user_config": {"experiments": {"b": {"share": 1}}}}},
            "args.routing declares",
        ),
        ({"routing": {"shadows": {"ranking": {"arms": ["b"]}}}}, "ranking has the variants"),
        ({"routing": {"overrides": {"roles": ["king"]}}}, "Input should be 'feedback'"),
        ({"routing": {"exposures": {"max_buffered": 10}}}, "max_buffered must be at least"),
        ({"ingress": {"user_config": {"magic": 1}}}, "Extra inputs"),
        ({"limits": {"default_k": 300}}, "default_k must be at most"),
        ({"home": ""}, "at least 1 character"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(args, message):
    with pytest.raises(ValidationError, match=message):
        AppArgs.model_validate(args)
