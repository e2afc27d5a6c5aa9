"""The load as Ray actors, so that it reads and writes as an application's processes do."""

from __future__ import annotations

import os
import threading
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from benchmarks.perf.faults.load import (
    LoadReader,
    LoadSettings,
    LoadWriter,
    Loop,
    ReaderReport,
    WriterReport,
)
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.shard_link import PoolInfo


class WritingProcess:
    """One writer in a process of its own."""

    def __init__(
        self, pool: PoolInfo, load: LoadSettings, writer: int, num_writers: int, seed: int
    ) -> None:
        self._client = MemoryClient(pool, load.namespace)
        self._writer = LoadWriter(self._client, load, writer, num_writers, seed)
        self._loop = Loop(lambda: self._writer.write_once(self._loop.is_stopping), "writer")
        self._loop.start()

    def stop(self) -> WriterReport:
        """Stop, and tell what was done."""
        self._loop.stop()
        self._client.close()
        return self._writer.report


class ReadingProcess:
    """One reader in a process of its own."""

    def __init__(self, pool: PoolInfo, load: LoadSettings, seed: int) -> None:
        self._client = MemoryClient(pool, load.namespace)
        node_id = ray.get_runtime_context().get_node_id()
        self._reader = LoadReader(pool, self._client, load, node_id, seed)
        self._turn = threading.Lock()
        self._loop = Loop(self._read, "reader").start()

    def pid(self) -> int:
        """The process."""
        return os.getpid()

    def look_again(self) -> None:
        """Find out again what is on this node, between two reads."""
        with self._turn:
            self._reader.look_again()

    def report(self) -> tuple[ReaderReport, ReaderReport]:
        """Local and remote reads so far."""
        return self._reader.local, self._reader.remote

    def stop(self) -> tuple[ReaderReport, ReaderReport]:
        """Stop, and tell what was seen."""
        self._loop.stop()
        self._client.close()
        return self.report()

    def _read(self) -> None:
        with self._turn:
            self._reader.read_once()


def start_on(node_id: str, process: type, *arguments: object) -> Any:
    """An actor on a certain node, which it does not outlive."""
    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0)(process).options(scheduling_strategy=here).remote(*arguments)
