"""The processes of the benchmark's own Ray: which they are, what they hold, and the end of one.

Read from /proc, so that it needs no dashboard and no process but those below this one.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

REPLICA_TITLE = "ray::ServeReplica:"

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SHARED_PAGES, _RESIDENT_PAGES = 2, 1
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PARENT_FIELD, _USER_TICKS, _SYSTEM_TICKS = 1, 11, 12  # of what follows the name in /proc/PID/stat


@dataclass(frozen=True)
class Process:
    """A running process. ``title`` is what its command line shows."""

    pid: int
    parent: int
    title: str
    private_bytes: int  # resident, not counting pages of mapped files and shared memory
    cpu_s: float

    @property
    def role(self) -> str:
        """What it is for: a deployment, or the name of its actor or program."""
        if self.title.startswith(REPLICA_TITLE):
            return self.title.removeprefix(REPLICA_TITLE).split(":")[1].partition(".")[0]
        words = self.title.split() or [""]
        if words[0].startswith("ray::"):
            return words[0].removeprefix("ray::").partition(".")[0]
        return words[0].rpartition("/")[2]


def descendants(pid: int) -> list[Process]:
    """All processes below ``pid``."""
    children: dict[int, list[Process]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            process = _read(path)
            if process is not None:
                children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    todo = [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found.extend(below)
        todo.extend(process.pid for process in below)
    return found


def service_processes(client_pid: int) -> list[Process]:
    """Every process that this one started for the service: all but its client."""
    outside = {client_pid} | {process.pid for process in descendants(client_pid)}
    return [process for process in descendants(os.getpid()) if process.pid not in outside]


def replicas(deployment: str) -> list[Process]:
    """The processes of a deployment's replicas."""
    found = descendants(os.getpid())
    return [
        process
        for process in found
        if process.title.startswith(REPLICA_TITLE) and process.role == deployment
    ]


def cpu_by_role(before: list[Process], after: list[Process]) -> dict[str, float]:
    """CPU seconds that processes took between two looks, by role; those that took most first."""
    earlier = {process.pid: process.cpu_s for process in before}
    taken: dict[str, float] = {}
    for process in after:
        spent_s = process.cpu_s - earlier.get(process.pid, 0.0)
        taken[process.role] = taken.get(process.role, 0.0) + spent_s
    return dict(sorted(taken.items(), key=lambda item: -item[1]))


def kill(pid: int) -> None:
    """SIGKILL to a process of the service.

    Raises:
        ValueError: it is not below this process, so it is somebody else's.
    """
    if pid not in {process.pid for process in descendants(os.getpid())}:
        raise ValueError(f"process {pid} is none that this benchmark started; it stays")
    os.kill(pid, signal.SIGKILL)


def _read(path: Path) -> Process | None:
    """None of a process that has ended meanwhile."""
    try:
        # The name is in brackets and may hold anything, brackets too.
        after_name = (path / "stat").read_text(errors="replace").rpartition(")")[2].split()
        title = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        pages = (path / "statm").read_text().split()
    except OSError:
        return None
    private_pages = int(pages[_RESIDENT_PAGES]) - int(pages[_SHARED_PAGES])
    ticks = int(after_name[_USER_TICKS]) + int(after_name[_SYSTEM_TICKS])
    return Process(
        int(path.name),
        int(after_name[_PARENT_FIELD]),
        title.strip(),
        private_pages * _PAGE_BYTES,
        ticks / _TICKS_PER_S,
    )
