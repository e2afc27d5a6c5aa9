"""Arguments of how load is taken: admission, breakers, replicas and how they end."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from app.strict import Strict
from stages.breaker import BreakerPolicy

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
DelayS = Annotated[float, Field(ge=0, le=3600)]


class AdmissionArgs(Strict):
    """How many requests an ingress replica works on at once; more are refused at once."""

    max_concurrent: PositiveInt = 64
    """Never more than this many at once."""
    min_concurrent: PositiveInt = 4
    """So many are always taken, whatever the estimate of the time that they take."""
    target_share: Share = 0.6
    """Of a request's deadline: one that is estimated to take longer is refused."""
    max_concurrent_feedback: PositiveInt = 64
    refusal_status: Literal[429, 503] = 429
    """Status of a refusal, also of Serve's own when its queue in front of the ingress is full."""

    @model_validator(mode="after")
    def _min_within_max(self) -> AdmissionArgs:
        if self.min_concurrent > self.max_concurrent:
            raise ValueError(
                f"min_concurrent must be at most max_concurrent={self.max_concurrent}, got "
                f"{self.min_concurrent}; lower it"
            )
        return self


class BreakerArgs(Strict):
    """When a variant that does not answer is left alone, and how often it is tried again."""

    failures: PositiveInt = 5
    probe_every_s: Annotated[float, Field(gt=0, le=3600)] = 1.0

    def policy(self) -> BreakerPolicy:
        """The same for `stages.breaker`."""
        return BreakerPolicy(self.failures, self.probe_every_s)


class LoadArgs(Strict):
    """What the edge does when there is too much to do, or a part is dead."""

    admission: AdmissionArgs = AdmissionArgs()
    breaker: BreakerArgs = BreakerArgs()


class AutoscalingArgs(Strict):
    """Replicas that follow the load; the names are those of Serve's ``autoscaling_config``."""

    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 4.0
    """Requests in work and in queues, per replica; of an arm, calls (`docs/serving/load.md`)."""
    upscale_delay_s: DelayS = 3.0
    downscale_delay_s: DelayS = 120.0
    look_back_period_s: Annotated[float, Field(gt=10, le=3600)] = 15.0
    """Load is averaged over so long; Serve asks for more than its metrics interval of 10 s."""

    @model_validator(mode="after")
    def _min_within_max(self) -> AutoscalingArgs:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas must be at most max_replicas={self.max_replicas}, got "
                f"{self.min_replicas}; lower it"
            )
        return self


class ReplicaArgs(Strict):
    """How many replicas a deployment has, what each takes, and how each ends."""

    num_replicas: PositiveInt | None = None
    """A fixed number of replicas, 1 when ``autoscaling`` is not given either."""
    autoscaling: AutoscalingArgs | None = None
    num_cpus: Annotated[float, Field(ge=0)] = 0.25
    """CPUs reserved per replica; torch uses as many threads, at least one."""
    max_ongoing_requests: PositiveInt = 32
    max_queued_requests: PositiveInt = 256
    """More are refused. Of an arm: what waits for a call at each ingress replica; of the ingress:
    what waits for it in Serve."""
    drain_poll_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    """How often a replica that is to end looks whether requests are left."""
    drain_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 20.0
    """Longest time that a replica that is to end waits for its requests."""
    surge_percent: Annotated[int, Field(ge=0, le=100)] = 100
    """Of the replicas, how many may run beside those that they replace, so that new arguments leave
    no gap. It needs the CPUs for both; 0 ends old replicas first."""

    @model_validator(mode="after")
    def _one_way_to_count(self) -> ReplicaArgs:
        if self.num_replicas is not None and self.autoscaling is not None:
            raise ValueError(
                "give num_replicas (a fixed number) or autoscaling (min_replicas to "
                "max_replicas), not both; remove one"
            )
        return self

    def deployment_options(self) -> dict[str, Any]:
        """The same as options of a Serve deployment."""
        options: dict[str, Any] = {
            "max_ongoing_requests": self.max_ongoing_requests,
            "max_queued_requests": self.max_queued_requests,
            "graceful_shutdown_wait_loop_s": self.drain_poll_s,
            "graceful_shutdown_timeout_s": self.drain_timeout_s,
            "max_surge_percent": self.surge_percent,
            "ray_actor_options": {"num_cpus": self.num_cpus},
        }
        if self.autoscaling is None:
            return {**options, "num_replicas": self.num_replicas or 1}
        return {**options, "autoscaling_config": self.autoscaling.model_dump()}
