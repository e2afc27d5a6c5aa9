"""Who watches feedback arrive: one thread reads rows, another asks for recommendations."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import httpx
import numpy as np

from benchmarks.perf.freshness_run.waits import Answer, ModelVersion, RowSeen, covers
from benchmarks.perf.serving_load.world import VARIANT
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.registry import ModelRegistry
from marm.memory import RAW_STEP
from stages.history import MemoryReader
from stages.request import STAGES

_NEWEST_ROWS = 32
_REQUEST_TIMEOUT_S = 30.0
_OFFSETS = "log_offsets"


class Watcher:
    """Does something again and again in a thread until the block ends; errors come out there."""

    def __init__(self, look: Callable[[], None], every_s: float) -> None:
        self._look, self._every_s = look, every_s
        self._over = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        if error is None:
            self.require_running()

    def require_running(self) -> None:
        """Raise what ended the watching, if anything did."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._over.wait(self._every_s):
                self._look()
        except Exception as error:
            # It is raised where somebody waits for what is watched.
            self._error = error


class RowWatch:
    """Looks for rows of posted events in memory, as a stage reads them."""

    def __init__(self, memory: MemoryReader) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._awaited: dict[int, int] = {}  # user by event key
        self.seen: dict[int, RowSeen] = {}  # by event key

    @property
    def num_awaited(self) -> int:
        """Events whose computed row was not seen yet."""
        with self._lock:
            return len(self._awaited)

    def expect(self, user_id: int, event_key: int) -> None:
        """From now on, look for the row of an event that is about to be posted."""
        with self._lock:
            self._awaited[event_key] = user_id
            self.seen[event_key] = RowSeen()

    def look(self) -> None:
        """Read the newest rows of all users whose events are awaited, and note what is there."""
        with self._lock:
            awaited = dict(self._awaited)
        if not awaited:
            return
        users = np.unique(np.array(list(awaited.values()), np.int64))
        found, _ = self._memory.fetch_available(users, _NEWEST_ROWS)
        now_s = time.monotonic()
        keys, steps = found.rows["event_key"].tolist(), found.rows["written_step"].tolist()
        for key, step in zip(keys, steps, strict=True):
            if key in awaited:
                self._note(key, step != RAW_STEP, now_s)

    def _note(self, key: int, is_computed: bool, now_s: float) -> None:
        seen = self.seen[key]
        if np.isnan(seen.visible_s):
            seen.visible_s = now_s
        if is_computed:
            seen.computed_s = now_s
            with self._lock:
                del self._awaited[key]


class AnswerWatch:
    """Asks for recommendations of users in turn and notes which versions answered; what each
    version has learned is read from the registry when it first answers."""

    def __init__(
        self, client: httpx.Client, registry: ModelRegistry, users: list[int], shown: int
    ) -> None:
        self._client, self._registry = client, registry
        self._users, self._shown = users, shown
        self._known: set[ModelVersion] = set()
        self.answers: list[Answer] = []
        self.learned: dict[ModelVersion, LogOffsets] = {}
        self.newest: dict[str, LogOffsets] = {}  # that the last answer was made with, by stage

    def look(self) -> None:
        """Ask once; a refusal or a failure is no answer.

        Raises:
            RuntimeError: the service refused the request itself.
        """
        body = {"user_id": self._users[len(self.answers) % len(self._users)], "k": self._shown}
        try:
            response = self._client.post("/recommend", json=body, timeout=_REQUEST_TIMEOUT_S)
        except httpx.TransportError:
            return
        ended_s = time.monotonic()
        if response.is_server_error or response.status_code == httpx.codes.TOO_MANY_REQUESTS:
            return
        require_ok(response)
        reports: dict[str, Any] = response.json()["stages"]
        versions: tuple[ModelVersion, ...] = tuple(
            (stage, reports[stage]["model_version"])
            for stage in STAGES
            if reports.get(stage, {}).get("model_version") is not None
        )
        for each in versions:
            self._look_up(each)
        self.answers.append(Answer(ended_s, versions))
        self.newest = {each[0]: self.learned[each] for each in versions if each in self.learned}

    def have_learned(self, end: LogOffsets) -> bool:
        """Whether the models of the last answer have learned the log up to ``end``."""
        newest = dict(self.newest)
        return len(newest) == len(STAGES) and all(covers(each, end) for each in newest.values())

    def _look_up(self, served: ModelVersion) -> None:
        if served in self._known:
            return
        self._known.add(served)
        stage, version = served
        config = self._registry.config(stage, VARIANT, version)
        if _OFFSETS in config:  # the versions that the service began with have learned nothing
            self.learned[served] = LogOffsets.from_dict(config[_OFFSETS])


def require_ok(response: httpx.Response) -> None:
    """Raise RuntimeError with what the service says when it did not do what was asked."""
    if response.status_code != httpx.codes.OK:
        raise RuntimeError(
            f"{response.request.url} was answered {response.status_code}: {response.text[:500]}"
        )
