"""Commands to one Redis server or to a Redis Cluster, in one interface.

redis-py's cluster client repeats commands one at a time when a node does not answer, each with its
own timeout: a read of many users would block for minutes. Here every node gets its commands in one
go and has its own circuit breaker, so the users on the other nodes are served.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, TryAgainError

from cache_actors.tiers.durable_tier import DurableTierError, DurableTierUnavailableError
from cache_actors.tiers.redis_node import Command, RedisNode
from cache_actors.tiers.redis_server_check import RedisTierError
from cache_actors.tiers.redis_url import RedisAddress, RedisUrl

_MOST_TURNS = 5
_REFRESH_PAUSE_S = 1.0


@dataclass(frozen=True)
class KeyCommand:
    """A command about one key, or several of one hash tag."""

    key: str
    words: Command


def is_unavailable(answer: Any) -> bool:
    """Whether an answer did not come."""
    return isinstance(answer, DurableTierUnavailableError)


def raise_unavailable(answers: Sequence[Any]) -> None:
    """Raise the first answer that did not come."""
    for answer in answers:
        if isinstance(answer, DurableTierUnavailableError):
            raise answer


class RedisLink(Protocol):
    """Where commands go."""

    def run(self, commands: Sequence[KeyCommand]) -> list[Any]:
        """Answers in order: a value, `Foreign.VALUE`, or a `DurableTierUnavailableError` object
        where no server answered."""
        ...

    def facts(self, section: str = "default") -> list[dict[str, Any]]:
        """A section of the INFO of every server that holds data; Redis has a default of many."""
        ...

    def available(self) -> bool:
        """Whether every server answered the last time."""
        ...

    def wait_s(self) -> float:
        """How long until a server that failed is tried again."""
        ...

    def close(self) -> None:
        """Close all connections."""
        ...


def open_link(url: RedisUrl) -> RedisLink:
    """A link to what ``url`` names. Connects at its first command."""
    return ClusterLink(url) if url.is_cluster else SingleLink(url)


class SingleLink:
    """All commands go to one server."""

    def __init__(self, url: RedisUrl) -> None:
        self._node = RedisNode(url, url.addresses[0] if url.addresses else None)

    def run(self, commands: Sequence[KeyCommand]) -> list[Any]:
        """See `RedisLink.run`."""
        try:
            answers = self._node.run([command.words for command in commands])
        except DurableTierUnavailableError as error:
            return [error] * len(commands)
        return [self._node.judge(answer) for answer in answers]

    def facts(self, section: str = "default") -> list[dict[str, Any]]:
        """See `RedisLink.facts`."""
        return [self._node.facts(section)]

    def available(self) -> bool:
        """See `RedisLink.available`."""
        return self._node.breaker.is_closed

    def wait_s(self) -> float:
        """See `RedisLink.wait_s`."""
        return self._node.breaker.wait_s()

    def close(self) -> None:
        """See `RedisLink.close`."""
        self._node.close()


class ClusterLink:
    """Every command goes to the node that has its key's slot."""

    def __init__(self, url: RedisUrl) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._nodes = {address: RedisNode(url, address) for address in url.addresses}
        self._slots: dict[int, RedisAddress] = {}
        self._refresh_from_s = 0.0

    def run(self, commands: Sequence[KeyCommand]) -> list[Any]:
        """See `RedisLink.run`."""
        answers: list[Any] = [None] * len(commands)
        left = list(range(len(commands)))
        for _ in range(_MOST_TURNS):
            left = self._turn(commands, left, answers)
            if not left:
                return answers
            self._refresh()
        for index in left:
            answers[index] = DurableTierUnavailableError(
                f"{self._url} is moving slots: {answers[index]}"
            )
        return answers

    def facts(self, section: str = "default") -> list[dict[str, Any]]:
        """See `RedisLink.facts`."""
        self._learn_slots()
        primaries = sorted(set(self._slots.values()), key=str)
        return [self._node(address).facts(section) for address in primaries]

    def available(self) -> bool:
        """See `RedisLink.available`."""
        in_use = set(self._slots.values()) or set(self._nodes)
        return all(self._nodes[address].breaker.is_closed for address in in_use)

    def wait_s(self) -> float:
        """See `RedisLink.wait_s`."""
        in_use = set(self._slots.values()) or set(self._nodes)
        return min(self._nodes[address].breaker.wait_s() for address in in_use)

    def close(self) -> None:
        """See `RedisLink.close`."""
        for node in list(self._nodes.values()):
            node.close()

    def _turn(
        self, commands: Sequence[KeyCommand], todo: list[int], answers: list[Any]
    ) -> list[int]:
        """Send what is to do; the positions that belong to another node than was thought."""
        try:
            self._learn_slots()
        except DurableTierUnavailableError as error:
            for index in todo:
                answers[index] = error
            return []
        by_place: dict[RedisAddress | None, list[int]] = {}
        for index in todo:
            slot = key_slot(commands[index].key.encode())
            by_place.setdefault(self._slots.get(slot), []).append(index)
        moved: list[int] = []
        for address, indices in by_place.items():
            moved += self._ask(address, commands, indices, answers)
        return moved

    def _ask(
        self,
        address: RedisAddress | None,
        commands: Sequence[KeyCommand],
        indices: list[int],
        answers: list[Any],
    ) -> list[int]:
        """Have one node answer ``indices``; those that it says are elsewhere."""
        if address is None:
            error = DurableTierUnavailableError(f"no node of {self._url} serves some of its slots")
            self._mark_stale()
            for index in indices:
                answers[index] = error
            return []
        node = self._node(address)
        try:
            got = node.run([commands[index].words for index in indices])
        except DurableTierUnavailableError as error:
            self._mark_stale()
            for index in indices:
                answers[index] = error
            return []
        moved = []
        for index, answer in zip(indices, got, strict=True):
            if isinstance(answer, AskError) and not isinstance(answer, MovedError):
                answer = self._follow_ask(answer, commands[index].words)
            if isinstance(answer, (MovedError, TryAgainError)):
                moved.append(index)
                answers[index] = answer
            else:
                answers[index] = node.judge(answer)
        return moved

    def _follow_ask(self, ask: AskError, words: Command) -> Any:
        """Ask for a key of a slot that is being moved where the key is already."""
        try:
            _, answer = self._node(RedisAddress(ask.host, ask.port)).run([("ASKING",), words])
        except DurableTierUnavailableError as error:
            return TryAgainError(str(error))
        return answer

    def _node(self, address: RedisAddress) -> RedisNode:
        with self._lock:
            if address not in self._nodes:
                self._nodes[address] = RedisNode(self._url, address)
            return self._nodes[address]

    def _mark_stale(self) -> None:
        """A node that fails may be replaced by its replica: look again soon, not at every call."""
        with self._lock:
            self._refresh_from_s = min(self._refresh_from_s, time.monotonic() + _REFRESH_PAUSE_S)

    def _learn_slots(self) -> None:
        if not self._slots or time.monotonic() >= self._refresh_from_s:
            self._refresh()

    def _refresh(self) -> None:
        """Learn which node has which slots, from the first node that answers."""
        refused: DurableTierError | None = None
        for address in list(self._nodes):
            node = self._node(address)
            try:
                (answer,) = node.run([("CLUSTER", "SLOTS")])
                ranges = node.judge(answer)
            except RedisTierError as error:
                if not self._slots:
                    refused = refused or error
                continue
            except DurableTierUnavailableError as error:
                refused = refused or error
                continue
            if isinstance(ranges, list):
                self._take_slots(ranges, address)
                return
        if not self._slots:
            raise refused or DurableTierUnavailableError(f"no node of {self._url} answers")

    def _take_slots(self, ranges: list[Any], asked: RedisAddress) -> None:
        slots: dict[int, RedisAddress] = {}
        for first, last, primary, *_ in ranges:
            # A node that doesn't know its own address leaves it out.
            host = (primary[0] or b"").decode() or asked.host
            address = RedisAddress(host, int(primary[1]))
            slots.update(dict.fromkeys(range(first, last + 1), address))
        for address in set(slots.values()):
            self._node(address)
        with self._lock:
            self._slots = slots
            self._refresh_from_s = float("inf")
