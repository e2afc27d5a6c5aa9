from __future__ import annotations

import pytest
from pydantic import ValidationError
from ray import serve

from app.args import AppArgs, VariantArgs
from app.load_args import ReplicaArgs
from stages.grouped_calls import GroupLimits


@serve.deployment
class Anything:
    pass


def test_a_deployment_has_one_replica_unless_told_otherwise():
    options = ReplicaArgs().deployment_options()
    assert options["num_replicas"] == 1
    assert "autoscaling_config" not in options
    assert Anything.options(**options).num_replicas == 1


def test_serve_takes_autoscaling_and_draining_as_written():
    args = ReplicaArgs.model_validate(
        {
            "autoscaling": {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 3},
            "drain_poll_s": 0.5,
            "drain_timeout_s": 40,
        }
    )
    deployment = Anything.options(**args.deployment_options())
    config = deployment._deployment_config
    assert config.autoscaling_config.min_replicas == 2
    assert config.autoscaling_config.max_replicas == 5
    assert config.autoscaling_config.target_ongoing_requests == 3
    assert config.graceful_shutdown_wait_loop_s == 0.5
    assert config.graceful_shutdown_timeout_s == 40


def test_every_stage_has_a_share_of_the_time_left():
    limits = AppArgs().stage_limits()
    assert [limits[stage].budget_share for stage in limits] == [0.5, 0.5, 0.9]
    args = AppArgs.model_validate({"ranking": {"budget_share": 0.3, "control_share": 0}})
    assert args.stage_limits()["ranking"].budget_share == 0.3
    assert args.stage_limits()["ranking"].control_share == 0


def test_requests_share_calls_once_every_replica_has_one():
    def limits(**args) -> GroupLimits:
        return VariantArgs.model_validate(args).group_limits()

    assert limits() == GroupLimits(calls=1, waiting=256)
    assert limits(num_replicas=2).calls == 2
    assert limits(num_replicas=6, max_queued_requests=9) == GroupLimits(calls=12, waiting=9)
    assert limits(calls_under_way=3).calls == 3
    # Serve starts another replica when there is more than the target under way.
    scaling = {"max_replicas": 3, "target_ongoing_requests": 2.5}
    assert limits(autoscaling=scaling).calls == 8
    assert limits(autoscaling=scaling, calls_under_way=20).calls == 20


TWO_WAYS = {"num_replicas": 2, "autoscaling": {"max_replicas": 4}}
FEW_CALLS = {"autoscaling": {"max_replicas": 4}, "calls_under_way": 15}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"ranking": {"variants": {"a": TWO_WAYS}}}, "not both; remove one"),
        ({"ingress": TWO_WAYS}, "not both; remove one"),
        ({"ingress": {"autoscaling": {"min_replicas": 3, "max_replicas": 2}}}, "at most max_rep"),
        ({"ranking": {"variants": {"a": FEW_CALLS}}}, "calls_under_way must be at least 16"),
        ({"ranking": {"variants": {"a": {"calls_under_way": 0}}}}, "greater than or equal to 1"),
        ({"ingress": {"max_ongoing_requests": 128}}, "must be above 128"),
        ({"load": {"admission": {"min_concurrent": 65}}}, "at most max_concurrent=64"),
        ({"load": {"admission": {"refusal_status": 500}}}, "429 or 503"),
        ({"load": {"breaker": {"failures": 0}}}, "greater than or equal to 1"),
        ({"ranking": {"budget_share": 0}}, "greater than 0"),
        ({"ranking": {"budget_share": float("nan")}}, "less than or equal to 1"),
        ({"ranking": {"control_share": 1}}, "less than 1"),
    ],
)
def test_settings_of_load_that_make_no_sense_are_refused(args, message):
    with pytest.raises(ValidationError, match=message):
        AppArgs.model_validate(args)
