"""How fresh serving is while training follows: from feedback over HTTP to rows and to models.

    python -m benchmarks.perf.freshness --output benchmarks/results/freshness.json

Starts a Ray, the real application and `marm train --follow` of its own, posts feedback at random
moments while it asks for recommendations, takes some minutes, prints a table and then one JSON
line. Of every post it measures how long it takes until

    freshness_row_s       a request can read its row (a raw row, which layer 0 reads);
    freshness_computed_s  a request can read the row that the follower has computed and saved;
    freshness_served_s    the first answer comes whose models, of all stages, have learned it.

A version has learned what lies before the log offsets that it was published with. The service is
the one of `benchmarks.perf.serving`, with models of the size that `marm train` has by default.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import httpx
import numpy as np
import ray

from benchmarks.perf.figures import (
    Figure,
    Measured,
    at_most,
    exactly,
    json_line,
    print_table,
    write_result,
)
from benchmarks.perf.freshness_run.follower import (
    Follower,
    FollowSettings,
    following,
    places_in_log,
)
from benchmarks.perf.freshness_run.posting import LoadSettings, Poster
from benchmarks.perf.freshness_run.waits import (
    Post,
    wait_figures,
    waits_for_models,
    waits_for_rows,
)
from benchmarks.perf.freshness_run.watching import AnswerWatch, RowWatch, Watcher
from benchmarks.perf.serving_load.service import (
    RunningService,
    ServiceSettings,
    running_service,
)
from benchmarks.perf.serving_load.world import WorldSettings
from cache_actors.event_log.log import EventLog
from cache_actors.home import Home
from cache_actors.pool.client import MemoryClient
from cache_actors.registry import ModelRegistry
from stages.request import STAGES

_POLL_S = 0.1

_WORLD = WorldSettings(
    depth=2,
    dim=32,
    num_heads=2,
    ranking_history=50,
    cascading_history=20,
    retrieval_history=200,
    num_items=5_000,
    num_users=200,
    found=500,
    kept=100,
)


@dataclass(frozen=True)
class Settings:
    """Sizes and intervals."""

    world: WorldSettings = _WORLD
    service: ServiceSettings = field(default_factory=lambda: ServiceSettings(cascading_replicas=1))
    follow: FollowSettings = field(default_factory=FollowSettings)
    load: LoadSettings = field(default_factory=LoadSettings)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the result where that was asked for."""
    options = parse_options(argv)
    settings = settings_of(options)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(
        dir=options.scratch, prefix="marm-fresh-", ignore_cleanup_errors=True
    ) as scratch:
        measured = measure(settings, Path(scratch))
    print_table(title_of(settings), [measured])
    line = json_line("freshness", [measured], asdict(settings), time.monotonic() - started)
    write_result(line, options.output)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    follow, load, service = FollowSettings(), LoadSettings(), ServiceSettings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=None, help="file for the result, as JSON")
    parser.add_argument("--scratch", default=None, help="directory for the home, on a local disk")
    parser.add_argument("--quick", action="store_true", help="try that it runs; few posts")
    parser.add_argument("--posts", type=int, default=None, help="feedback events that are measured")
    parser.add_argument("--posts-per-s", type=float, default=None, help="in the mean")
    parser.add_argument("--seed", type=int, default=load.seed)
    parser.add_argument("--batch-size", type=int, default=follow.batch_size)
    parser.add_argument(
        "--publish-interval-s",
        type=float,
        default=follow.publish_interval_s,
        help="between versions while the follower does not catch up",
    )
    parser.add_argument(
        "--caught-up-interval-s",
        type=float,
        default=follow.caught_up_interval_s,
        help="between versions once it has caught up",
    )
    parser.add_argument(
        "--follow-poll-s",
        type=float,
        default=follow.follow_poll_s,
        help="between looks for new events",
    )
    parser.add_argument(
        "--model-poll-s",
        type=float,
        default=service.model_poll_s,
        help="between a replica's looks for a new version",
    )
    return parser.parse_args(argv)


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings that the options ask for."""
    settings = Settings()
    load = replace(settings.load, seed=options.seed)
    if options.quick:
        load = replace(load, posts=40, posts_per_s=4.0)
        smaller = {"depth": 1, "dim": 16, "feature_dim": 16, "num_items": 500, "num_users": 20}
        settings = replace(settings, world=replace(_WORLD, found=100, kept=40, **smaller))
    if options.posts is not None:
        load = replace(load, posts=options.posts)
    if options.posts_per_s is not None:
        load = replace(load, posts_per_s=options.posts_per_s)
    return replace(
        settings,
        load=load,
        service=replace(settings.service, model_poll_s=options.model_poll_s),
        follow=FollowSettings(
            batch_size=options.batch_size,
            publish_interval_s=options.publish_interval_s,
            caught_up_interval_s=options.caught_up_interval_s,
            follow_poll_s=options.follow_poll_s,
        ),
    )


def title_of(settings: Settings) -> str:
    """What was measured, with the settings that decide about it."""
    follow, load = settings.follow, settings.load
    return (
        f"freshness: {load.posts} posts, {load.posts_per_s:g}/s; batches of {follow.batch_size}, "
        f"log polled every {follow.follow_poll_s:g} s, versions every "
        f"{follow.caught_up_interval_s:g} s (behind: {follow.publish_interval_s:g} s), models "
        f"polled every {settings.service.model_poll_s:g} s"
    )


def measure(settings: Settings, scratch: Path) -> Measured:
    """One run, from an empty log to the last post in the models that serve."""
    world, load = settings.world, settings.load
    home = Home(scratch / "home")
    with ExitStack() as stack:
        service = stack.enter_context(running_service(home, world, settings.service, None))
        address = ray.get_runtime_context().gcs_address
        follower = stack.enter_context(
            following(home, settings.follow.config(world), address, scratch)
        )
        memory = stack.enter_context(MemoryClient(service.pool, world.namespace))
        feedback = stack.enter_context(httpx.Client(base_url=service.url, timeout=30))
        asking = stack.enter_context(httpx.Client(base_url=service.url))
        rows = RowWatch(memory)
        answers = AnswerWatch(
            asking, ModelRegistry(home.models), world.users().tolist(), world.shown
        )
        watchers = [Watcher(rows.look, load.row_poll_s), Watcher(answers.look, 1 / load.asks_per_s)]
        run = FreshnessRun(service, follower, watchers, rows, answers, load.timeout_s)
        poster = Poster(feedback, world, rows, load)
        stack.enter_context(watchers[0])
        poster.post_many(load.warm_up_posts, load.posts_per_s)
        run.await_computed()  # requests would only hold up the start of the follower
        stack.enter_context(watchers[1])
        run.await_served()
        first_answer = len(answers.answers)
        posts = poster.post_many(load.posts, load.posts_per_s)
        run.await_served()
        measured = run.measured(posts, first_answer)
        return replace(measured, medians={**measured.medians, "repeats": float(poster.repeats)})


@dataclass(frozen=True)
class FreshnessRun:
    """Everything that runs meanwhile, and what it has shown."""

    service: RunningService
    follower: Follower
    watchers: list[Watcher]
    rows: RowWatch
    answers: AnswerWatch
    timeout_s: float

    def await_computed(self) -> None:
        """Return once the rows of all that was posted are computed.

        Raises:
            RuntimeError: the follower or a watcher ended.
            TimeoutError: it takes too long.
        """
        self._await(lambda: self.rows.num_awaited == 0, "every row is computed")

    def await_served(self) -> None:
        """The same, and the models that answer have learned it.

        Raises:
            RuntimeError, TimeoutError: as of `await_computed`.
        """
        self.await_computed()
        end = EventLog(self.service.home.log).end()
        self._await(lambda: self.answers.have_learned(end), "the models have learned every event")

    def measured(self, posts: list[Post], first_answer: int) -> Measured:
        """The figures of the posts; answers from ``first_answer`` on are counted."""
        places = places_in_log(EventLog(self.service.home.log))
        answers = self.answers.answers[first_answer:]
        confirmed, visible, computed = waits_for_rows(posts, self.rows.seen)
        by_stages = {
            stages: waits_for_models(posts, places, answers, self.answers.learned, stages)
            for stages in (STAGES, *((stage,) for stage in STAGES))
        }
        served = by_stages.pop(STAGES)
        lost = sum(int(np.isnan(waits).sum()) for waits in (visible, computed, served))
        figures = (
            *wait_figures("freshness_row", "feedback to its row, which requests read", visible),
            *wait_figures("freshness_computed", "feedback to its computed row", computed),
            *wait_figures("freshness_served", "feedback to models that learned it", served),
            Figure("freshness_lost", "waits that never ended", exactly(float(lost)), at_most(0)),
        )
        medians = {f"served_{stages[0]}_s": np.nanmedian(w) for stages, w in by_stages.items()}
        versions = {version for answer in answers for version in answer.versions}
        counts = {f"versions_{stage}": sum(v[0] == stage for v in versions) for stage in STAGES}
        return Measured(
            figures,
            {
                "receipt_s": float(np.median(confirmed)),
                **{name: float(value) for name, value in medians.items()},
                **{name: float(count) for name, count in counts.items()},
                "answers": float(len(answers)),
            },
        )

    def _await(self, is_so: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + self.timeout_s
        while not is_so():
            self.follower.require_running()
            for watcher in self.watchers:
                watcher.require_running()
            if time.monotonic() >= deadline_s:
                raise TimeoutError(f"not within {self.timeout_s:.0f} s: {what}")
            time.sleep(_POLL_S)


if __name__ == "__main__":
    main()
