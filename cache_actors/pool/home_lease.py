"""A pool of a home runs on one Ray cluster at a time: a lease with a heartbeat.

Nobody compares clocks of two machines: who finds another cluster's lease watches whether its
heartbeat still moves.
"""

from __future__ import annotations

import fcntl
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cache_actors.atomic_files import write_hint

BEAT_INTERVAL_S = 1.0
LEASE_S = 6.0
"""A lease whose heartbeat stands still for so long belongs to a dead cluster."""

_PROBE_S = 0.5


class PoolInUseError(RuntimeError):
    """Another Ray cluster runs the pool."""


@dataclass(frozen=True)
class Lease:
    """Who runs a pool; ``beat`` counts up while it lives."""

    cluster: str
    beat: int


def has_ended_here(cluster: str) -> bool:
    """Whether ``cluster``, an address ``host:port``, was on this machine and nobody answers there.
    Of other machines nothing is said: a firewall may refuse as well as a dead process."""
    host, _, port = cluster.rpartition(":")
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))  # only an address of this machine can be bound
        socket.create_connection((host, int(port)), _PROBE_S).close()
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return False


class HomeLease:
    """The lease in ``directory`` as one process of ``cluster`` sees it."""

    def __init__(self, directory: Path, cluster: str) -> None:
        self._directory = directory
        self._cluster = cluster
        self._seen: Lease | None = None

    def acquire(self) -> None:
        """Return when the pool is this cluster's; raise `PoolInUseError` if another one lives."""
        self._directory.mkdir(parents=True, exist_ok=True)
        first = self._claim_unless_foreign(None)
        deadline = time.monotonic() + LEASE_S
        while first is not None:
            is_due = time.monotonic() >= deadline or has_ended_here(first.cluster)
            found = self._claim_unless_foreign(first if is_due else None)
            if found is None:
                return
            if found != first:
                raise PoolInUseError(
                    f"the memory pool in {self._directory} is run by another Ray cluster "
                    f"({found.cluster}; this one is {self._cluster}); join that one (--address "
                    f"{found.cluster}, with RAY_AUTH_MODE=token where it asks for a token), stop "
                    "the pool there first, or use another home or pool name"
                )
            time.sleep(BEAT_INTERVAL_S / 4)

    def beat(self) -> bool:
        """Show that this cluster lives; false when the pool belongs to another one by now."""
        with self._locked():
            found = self._read() or Lease(self._cluster, 0)
            if found.cluster != self._cluster:
                return False
            if self._seen in (None, found):  # else another shard of the cluster has just done it
                found = Lease(self._cluster, found.beat + 1)
                self._write(found)
            self._seen = found
            return True

    def release(self) -> None:
        """Give the pool up, if it is this cluster's."""
        with self._locked():
            found = self._read()
            if found is not None and found.cluster == self._cluster:
                self._path.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self._directory / "lease.json"

    def _claim_unless_foreign(self, dead: Lease | None) -> Lease | None:
        """Take the lease if it is free, ours, or still exactly ``dead``; else whose it is."""
        with self._locked():
            found = self._read()
            if found is not None and found.cluster != self._cluster and found != dead:
                return found
            if found is None or found.cluster != self._cluster:
                self._write(Lease(self._cluster, 0))
            return None

    def _read(self) -> Lease | None:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            return Lease(str(content["cluster"]), int(content["beat"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None  # whatever it was, nobody keeps it alive

    def _write(self, lease: Lease) -> None:
        write_hint(self._path, json.dumps(asdict(lease)))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._directory / "lease.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class Heartbeat:
    """Keeps a lease alive from a thread; calls ``lost`` once if another cluster took the pool."""

    def __init__(self, lease: HomeLease, lost: Callable[[], None]) -> None:
        self._lease = lease
        self._lost = lost
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop beating."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(BEAT_INTERVAL_S):
            try:
                if not self._lease.beat():
                    self._lost()
                    return
            except OSError:
                continue  # a full or absent disk: the next beat tries again
