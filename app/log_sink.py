"""The log writer as `app.feedback` sees it."""

from __future__ import annotations

import asyncio

from ray.exceptions import ActorDiedError, ActorUnavailableError

from cache_actors.log_writer import LogWriter
from marm.events import EventBatch


class LogSink:
    """Appends without holding a thread, except while the writer restarts."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer

    async def append(self, events: EventBatch) -> list[bool]:
        """For each event whether it was appended (true) or is a duplicate (false)."""
        try:
            return await self._writer.append_async(events)
        except (ActorDiedError, ActorUnavailableError):
            return await asyncio.to_thread(self._writer.append, events)
