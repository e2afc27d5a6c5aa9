from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from app.ab import arm_table
from app.args import AppArgs
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
            assert arm_table(deployment["user_config"], args.arms()).assign(1)
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
        ({"ingress": {"user_config": {"ab": {"ranking": {"b": 1}}}}}, "names the arms"),
        ({"ingress": {"user_config": {"magic": 1}}}, "Extra inputs"),
        ({"limits": {"default_k": 300}}, "default_k must be at most"),
        ({"home": ""}, "at least 1 character"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(args, message):
    with pytest.raises(ValidationError, match=message):
        AppArgs.model_validate(args)
