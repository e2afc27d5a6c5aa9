"""The log writer as `app.feedback` sees it."""

from __future__ import annotations

from cache_actors.log_writer import LogWriter
from marm.events import EventBatch


class LogSink:
    """Appends without holding a thread; the writer's handle retries while it restarts."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer

    async def append(self, events: EventBatch) -> list[bool]:
        """For each event whether it was appended (true) or is a duplicate (false)."""
        return await self._writer.append_async(events)
