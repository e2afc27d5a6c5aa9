"""The version that serves: new ones are loaded off the request path and swapped in whole."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from cache_actors.registry import ModelRegistry, ModelRegistryError, PublishedModel
from stages.loader_thread import lower_priority

RETRY_REFUSED_S = 60.0
"""A refused version is tried again after this long: somebody may have repaired it."""


class Versioned(Protocol):
    """Anything that was made from one published version."""

    @property
    def version(self) -> int:
        """The published version."""
        ...


S = TypeVar("S", bound=Versioned)
S_contra = TypeVar("S_contra", bound=Versioned, contravariant=True)


class SwapCheck(Protocol[S_contra]):
    """Whether a version that was found on its own may take over from the one that serves."""

    def __call__(self, new: S_contra, live: S_contra) -> None:
        """Raise ValueError with the reason when it may not."""
        ...


def any_swap(new: Versioned, live: Versioned) -> None:
    """The check that lets every version take over."""


class LiveObserver(Protocol):
    """Is told what happens, in the polling thread; must not raise."""

    def swapped(self, published: PublishedModel, load_ms: float, by_hand: bool) -> None:
        """``published`` went live; ``by_hand``: because `LiveModel.want` asked for it."""
        ...

    def refused(self, version: int) -> None:
        """``version`` was tried and refused."""
        ...


class NoObserver:
    """Nobody looks."""

    def swapped(self, published: PublishedModel, load_ms: float, by_hand: bool) -> None:
        """See `LiveObserver.swapped`."""

    def refused(self, version: int) -> None:
        """See `LiveObserver.refused`."""


def versions_to_try(
    published: Iterable[int], wanted: int | None, live: int | None, refused: Iterable[int]
) -> list[int]:
    """Versions worth loading, in the order to try them; none when the right one is live.

    With ``wanted`` only that version is right. Otherwise the newest is, and an older one only
    while nothing newer than it is live.
    """
    if wanted is not None:
        candidates = [wanted] if wanted != live else []
    else:
        candidates = [v for v in sorted(published, reverse=True) if live is None or v > live]
    refused = set(refused)
    return [version for version in candidates if version not in refused]


@dataclass(frozen=True)
class Refusal:
    """Why a version does not serve, and when that was found."""

    reason: str
    at_s: float  # on the monotonic clock


class LiveModel(Generic[S]):
    """Follows one (stage, variant) of a registry.

    `current` is read without a lock: a request takes the reference once and works with that
    version to its end, whatever is swapped in meanwhile. Nothing else refers to a version, so its
    memory is freed when its last request ends. A version that is pinned, or asked for by `want`,
    is a decision of somebody who can see more, so ``check_swap`` is not asked about it.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        stage: str,
        variant: str,
        build: Callable[[PublishedModel], S],
        logger: logging.Logger,
        check_swap: SwapCheck[S] = any_swap,
        observer: LiveObserver | None = None,
    ) -> None:
        self._registry = registry
        self._stage = stage
        self._variant = variant
        self._build = build
        self._logger = logger
        self._check_swap = check_swap
        self._observer = observer or NoObserver()
        self._current: S | None = None
        self._newest_event_ms: int | None = None  # that the current version has learned
        self._wanted: int | None = None  # by `want`
        self._target: int | None = None  # by `want` or the registry's pin, as of the last poll
        self._refused: dict[int, Refusal] = {}
        self._registry_problem = ""
        self._polling = threading.Lock()
        self._wake = threading.Event()
        self._stopped = False
        self._thread: threading.Thread | None = None

    @property
    def current(self) -> S | None:
        """What serves now; None before the first good version."""
        return self._current

    @property
    def newest_event_ms(self) -> int | None:
        """Time of the newest event that what serves has learned; None where that is not known."""
        return self._newest_event_ms

    @property
    def problem(self) -> str:
        """Why what serves is not what should serve; empty when it is."""
        if self._registry_problem:
            return self._registry_problem
        live = self._current.version if self._current else None
        refused = dict(self._refused)  # a copy: the polling thread may add to it
        better = [v for v in refused if v == self._target or live is None or v > live]
        if better:
            return refused[max(better)].reason
        if live is None:
            return f"no model of {self._stage}/{self._variant} is published; run `marm train`"
        return ""

    def want(self, version: int | None) -> None:
        """Serve exactly ``version`` from the next poll on; None follows pin and newest."""
        self._wanted = version
        self._refused.clear()
        self._wake.set()

    def poll(self) -> bool:
        """Look once for a better version and load it; whether one was swapped in."""
        with self._polling:
            try:
                pinned = self._registry.pinned(self._stage, self._variant)
                self._retarget(pinned if self._wanted is None else self._wanted)
                published = self._registry.versions(self._stage, self._variant)
                self._registry_problem = ""
            except (OSError, ValueError, ModelRegistryError) as error:
                self._note_registry_problem(f"cannot read the model registry: {error}")
                return False
            live = self._current.version if self._current else None
            since_s = time.monotonic() - RETRY_REFUSED_S
            refused = [v for v, refusal in self._refused.items() if refusal.at_s > since_s]
            todo = versions_to_try(published, self._target, live, refused)
            return any(self._try(version) for version in todo)

    def start(self, poll_s: float) -> None:
        """Poll now and then every ``poll_s`` seconds in a background thread."""
        self._thread = threading.Thread(
            target=self._run, args=(poll_s,), name=f"live-{self._stage}", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the background thread."""
        self._stopped = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, poll_s: float) -> None:
        lower_priority()
        while not self._stopped:
            self._wake.clear()
            self.poll()
            self._wake.wait(poll_s)

    def _retarget(self, target: int | None) -> None:
        if target != self._target and target is not None:
            self._refused.pop(target, None)  # who asks for it again may have repaired it
        self._target = target

    def _try(self, version: int) -> bool:
        name = f"{self._stage}/{self._variant} version {version}"
        started_s = time.monotonic()
        try:
            published = self._registry.load(self._stage, self._variant, version)
            built = self._build(published)
            if self._current is not None and self._target is None:
                self._check_swap(built, self._current)
        except Exception as error:
            # Whatever is wrong with a version, the one that serves goes on serving.
            self._refuse(version, f"{name} was refused: {error}")
            return False
        load_ms = (time.monotonic() - started_s) * 1000
        self._current, self._newest_event_ms = built, published.newest_event_ms
        self._refused.pop(version, None)
        self._logger.info("%s is live; it was loaded in %.0f ms", name, load_ms)
        self._observer.swapped(published, load_ms, by_hand=self._wanted is not None)
        return True

    def _refuse(self, version: int, reason: str) -> None:
        known = self._refused.get(version)
        if known is None or known.reason != reason:
            live = self._current.version if self._current else None
            self._logger.error("%s; %s", reason, _still_serving(live))
        self._refused[version] = Refusal(reason, time.monotonic())
        self._observer.refused(version)

    def _note_registry_problem(self, problem: str) -> None:
        if problem != self._registry_problem:
            self._logger.error("%s", problem)
        self._registry_problem = problem


def _still_serving(live: int | None) -> str:
    return "nothing is live yet" if live is None else f"version {live} goes on serving"
