"""Writes exposures from a thread of its own, so that answering never waits for a disk."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cache_actors.atomic_files import remove_abandoned
from cache_actors.exposure_log.schema import Exposure, exposures_to_table
from cache_actors.exposure_log.segments import write_segment

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class ExposureCounts:
    """What a writer was given, what is on disk, and what is lost, in rows."""

    recorded: int
    written: int
    dropped: int


class ExposureWriter:
    """Buffers exposures and commits a segment when enough have come, or enough time has passed.

    Any thread may call `record`. When the disk takes no segment, its rows stay in the buffer and
    are tried again; rows that find the buffer full are dropped and counted. A process that is
    killed loses what it buffers: about ``max_age_s`` of exposures.
    """

    def __init__(
        self,
        directory: Path,
        max_rows: int = 2000,
        max_age_s: float = 5.0,
        max_buffered: int = 20_000,
    ) -> None:
        """Rows wait at most about ``max_age_s``; a segment has at most ``max_rows``.

        Raises:
            ValueError: the buffer is smaller than one segment.
        """
        if not 0 < max_rows <= max_buffered:
            raise ValueError(
                f"max_rows must be at least 1 and at most max_buffered={max_buffered}, got "
                f"{max_rows}"
            )
        self._directory = Path(directory)
        self._max_rows = max_rows
        self._max_age_s = max_age_s
        self._max_buffered = max_buffered
        self._buffer: deque[Exposure] = deque()
        self._wake = threading.Condition()
        self._closing = threading.Event()
        self._recorded = self._written = self._dropped = 0
        # The first conversion imports libraries, for as long as a hundred answers take: not then.
        exposures_to_table([])
        self._thread = threading.Thread(target=self._run, name="exposure-writer", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> ExposureCounts:
        """Rows so far."""
        with self._wake:
            return ExposureCounts(self._recorded, self._written, self._dropped)

    def record(self, exposure: Exposure) -> bool:
        """Take an exposure to be written soon; false when it was dropped. Never waits."""
        with self._wake:
            if self._closing.is_set() or len(self._buffer) >= self._max_buffered:
                dropped = self._count_dropped(1)
            else:
                self._buffer.append(exposure)
                self._recorded += 1
                if len(self._buffer) >= self._max_rows:
                    self._wake.notify()
                return True
        if dropped.bit_count() == 1:  # 1, 2, 4, 8, ...: told, without flooding the log
            logger.warning(
                "%d exposures were dropped so far: they come faster than %s takes them",
                dropped,
                self._directory,
            )
        return False

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is buffered and stop; later exposures are dropped. May be called again."""
        with self._wake:
            self._closing.set()
            self._wake.notify()
        self._thread.join(timeout_s)
        lost = len(self._buffer)
        if lost:
            logger.error("%d exposures were not written to %s and are lost", lost, self._directory)

    def _run(self) -> None:
        self._tidy()
        while True:
            with self._wake:
                self._wake.wait_for(self._due, self._max_age_s)
                closing = self._closing.is_set()
                batch = list(islice(self._buffer, self._max_rows))
            if batch and not self._write(batch):
                if closing:
                    return
                self._closing.wait(self._max_age_s)
            elif not batch and closing:
                return

    def _due(self) -> bool:
        return self._closing.is_set() or len(self._buffer) >= self._max_rows

    def _write(self, batch: list[Exposure]) -> bool:
        """Commit the oldest rows and take them out of the buffer; false when to try again."""
        try:
            write_segment(self._directory, exposures_to_table(batch))
        except OSError as error:
            logger.warning("%d exposures are not written yet: %s", len(batch), error)
            return False
        except Exception as error:
            # Rows that don't fit the schema never will, and must not hold up those behind them.
            logger.exception("%d exposures are dropped: %s", len(batch), error)
            self._take_out(len(batch))
            with self._wake:
                self._count_dropped(len(batch))
            return True
        self._take_out(len(batch))
        with self._wake:
            self._written += len(batch)
        return True

    def _take_out(self, rows: int) -> None:
        with self._wake:
            for _ in range(rows):
                self._buffer.popleft()

    def _count_dropped(self, rows: int) -> int:
        self._dropped += rows
        return self._dropped

    def _tidy(self) -> None:
        """Remove what killed writers left unfinished."""
        try:
            for day in self._directory.glob("????-??-??"):
                remove_abandoned(day)
        except OSError as error:
            logger.warning("unfinished files in %s were not removed: %s", self._directory, error)
