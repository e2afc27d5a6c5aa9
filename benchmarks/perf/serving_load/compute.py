"""The three models of a request without anything around them: what a request cannot do without."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.args import AppArgs
from benchmarks.perf.serving_load.world import VARIANT, WorldSettings, newest_rows
from cache_actors.home import Home
from cache_actors.registry import ModelRegistry
from marm.items import ItemFeatures
from marm.memory import InProcessMemory, Namespace, UserRows
from stages.assemble import build_cascading, build_ranking, build_retrieval
from stages.request import StageName

_NOW_MS = 1_800_000_000_000
_CONTEXT = 0
_START_TIMEOUT_S = 120.0
_EXIT_TIMEOUT_S = 10.0


class _EmptyMemory:
    """Stands where a stage has its memory: rows are given to the models directly."""

    def __init__(self, namespace: Namespace) -> None:
        self._memory = InProcessMemory(namespace)

    @property
    def namespace(self) -> Namespace:
        """The memory that would be read."""
        return self._memory.namespace

    def fetch_available(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None = None,
        *,
        layers: int | None = None,
        timeout_s: float | None = None,
    ) -> tuple[UserRows, NDArray[np.bool_]]:
        """No rows of anybody."""
        found = self._memory.fetch(user_ids, n, before_ms)
        return found, np.zeros(len(user_ids), np.bool_)


@dataclass(frozen=True)
class ModelSeconds:
    """What each part of one request took."""

    retrieval: float
    search: float  # of the item index, which is no model: not part of `models`
    cascading: float
    ranking: float

    @property
    def models(self) -> float:
        """The three models together."""
        return self.retrieval + self.cascading + self.ranking


class ModelsAlone:
    """The newest published models, and the rows of every user, in this process."""

    def __init__(self, home: Home, settings: WorldSettings, args: AppArgs) -> None:
        """``args``: the service's, whose models these are, to score as they do there."""
        registry = ModelRegistry(home.models)

        def load(stage: StageName) -> Any:
            return registry.load(stage, VARIANT, registry.versions(stage, VARIANT)[-1])

        self._settings = settings
        self._retrieval = build_retrieval(load("retrieval"), _EmptyMemory, "exact")
        self._cascading = build_cascading(
            load("cascading"), _EmptyMemory, args.cascading.variants[VARIANT].scoring_plan()
        )
        self._ranking = build_ranking(
            load("ranking"), _EmptyMemory, args.ranking.variants[VARIANT].scoring_plan()
        )
        self.users = settings.users().tolist()
        lengths = (settings.retrieval_history, settings.cascading_history, settings.ranking_history)
        self._rows = {
            user: [newest_rows(settings, user, length) for length in lengths] for user in self.users
        }

    def run(self, user: int) -> ModelSeconds:
        """One request of a user."""
        recent, short, long = self._rows[user]
        settings, at = self._settings, [time.perf_counter()]
        vectors_KV = self._retrieval.model.user_vectors(recent, user, _NOW_MS, _CONTEXT)
        at.append(time.perf_counter())
        found = self._retrieval.index.search(vectors_KV, settings.found)[0].items
        at.append(time.perf_counter())
        scores_M = self._cascading.model.score(short, user, found, _NOW_MS, _CONTEXT)
        at.append(time.perf_counter())
        kept: ItemFeatures = found.take(np.argsort(-scores_M, kind="stable")[: settings.kept])
        sorted_s = time.perf_counter()
        self._ranking.model.score(long, user, kept, _NOW_MS, _CONTEXT)
        return ModelSeconds(
            at[1] - at[0], at[2] - at[1], at[3] - at[2], time.perf_counter() - sorted_s
        )


@dataclass(frozen=True)
class ComputeRate:
    """What processes that run the models alone did together."""

    requests_per_s: float
    cpu_s_per_request: float


class ComputeProcesses:
    """Processes that run the models alone, one thread each, when they are told to."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections

    def rate(self, seconds: float) -> ComputeRate:
        """What all of them do at once within ``seconds``."""
        done = []
        for connection in self._connections:
            connection.send(seconds)
        for connection in self._connections:
            if not connection.poll(_START_TIMEOUT_S + seconds):
                raise TimeoutError("a process that runs the models alone did not answer")
            done.append(connection.recv())
        return ComputeRate(
            sum(rate.requests_per_s for rate in done),
            sum(rate.cpu_s_per_request for rate in done) / len(done),
        )


@contextmanager
def compute_processes(
    home: Home, settings: WorldSettings, args: AppArgs, count: int
) -> Iterator[ComputeProcesses]:
    """``count`` processes that end with the block; they rest until they are asked."""
    context = multiprocessing.get_context("spawn")
    connections, workers = [], []
    for _ in range(count):
        ours, theirs = context.Pipe()
        worker = context.Process(target=_serve, args=(theirs, home, settings, args), daemon=True)
        worker.start()
        theirs.close()
        connections.append(ours)
        workers.append(worker)
    try:
        yield ComputeProcesses(connections)
    finally:
        for connection in connections:
            connection.close()
        for worker in workers:
            worker.join(_EXIT_TIMEOUT_S)
            worker.kill()


def _serve(connection: Connection, home: Home, settings: WorldSettings, args: AppArgs) -> None:
    torch.set_num_threads(1)
    models = ModelsAlone(home, settings, args)
    models.run(models.users[0])
    try:
        while True:
            connection.send(_count(models, connection.recv()))
    except EOFError:  # nobody needs the models any more
        return


def _count(models: ModelsAlone, seconds: float) -> ComputeRate:
    done, models_s, cpu_s = 0, 0.0, time.process_time()
    began_s = time.monotonic()
    while time.monotonic() < began_s + seconds:
        models_s += models.run(models.users[done % len(models.users)]).models
        done += 1
    # What is not the models, above all the index search, is taken off both.
    share = models_s / (time.monotonic() - began_s)
    return ComputeRate(done / models_s, share * (time.process_time() - cpu_s) / done)
