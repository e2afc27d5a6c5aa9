from __future__ import annotations

from ray import serve

from app.build import built_at
from app.load_args import ReplicaArgs


class Anything:
    pass


def test_every_build_changes_a_deployment_that_scales_and_no_other():
    fixed = ReplicaArgs(num_replicas=2).deployment_options()
    assert built_at(1.0, fixed) == fixed
    scaling = ReplicaArgs(autoscaling={"max_replicas": 3}).deployment_options()
    first, second, again = (
        serve.deployment(**built_at(time_s, scaling))(Anything)._deployment_config
        for time_s in (1.0, 2.0, 1.0)
    )
    assert first != second
    assert first == again
    assert first.autoscaling_config.min_replicas >= 1  # so the wait has no effect
