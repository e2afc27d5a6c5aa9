"""Physical erasure of users from the event log, while others read it and append to it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache_actors.atomic_files import PENDING_PREFIX, sync_directory
from cache_actors.event_log.forgotten import ForgottenUsers
from cache_actors.event_log.log import EventLog
from cache_actors.event_log.segments import (
    SegmentError,
    SegmentFile,
    SegmentRows,
    read_footer,
    read_rows,
    write_erased,
)
from marm.addressing import NUM_BUCKETS, user_bucket
from marm.events import EventBatch

LOCK_NAME = ".erasing"
"""Held while files are replaced: of two erasures at once, one would undo the other."""

PENDING_NAME = f"{PENDING_PREFIX}erasing"
"""What is to replace a file. Always the same name, so that a crash leaves no old copies about."""


class EraseError(RuntimeError):
    """Some events could not be erased; the message says which files hold them."""


@dataclass(frozen=True)
class ErasedEvents:
    """What an erasure did.

    Attributes:
        events: events removed.
        files_rewritten: files that held any of them.
        files_read: files that may have held some.
    """

    events: int
    files_rewritten: int
    files_read: int


def user_events(log: EventLog, user_id: int) -> EventBatch:
    """Every readable event of a user, in the order of the log; `EventBatch` of none if unknown."""
    bucket = _buckets_of([user_id])
    found = [EventBatch.empty()]
    for file in _files_with(log, bucket):
        rows = log.rows(file, _skip_others(file, bucket))
        if rows is not None:
            events = rows.readable()
            found.append(events.take(events.user_id == user_id))
    events = EventBatch.concat(found)
    return events.take(np.lexsort((events.event_key, events.timestamp_ms)))


def erase_user(log_path: Path, user_id: int, until_ms: int) -> ErasedEvents:
    """`erase_users` for one."""
    return erase_users(log_path, {user_id: until_ms})


def erase_users(log_path: Path, until_ms_of: Mapping[int, int]) -> ErasedEvents:
    """Remove each user's events up to and including their time, and keep later copies away.

    First the users are listed (`ForgottenUsers`): from then on every reader leaves those events
    out, whatever file they are or come to be in. Then each file that holds some is replaced, in one
    step, by one in which their rows are blank. Rows keep their places, so offsets, checkpoints and
    readers that are under way stay valid. Repeating it, also after a crash, does no harm.

    Raises:
        EraseError: when a file could not be rewritten; all others were.
    """
    log_path = Path(log_path)
    if not (log_path / "segments").is_dir():
        raise ValueError(
            f"there is no event log in {log_path} (it has no directory 'segments'); give the log "
            "directory of a home"
        )
    ForgottenUsers(log_path).add(until_ms_of)
    return erase_forgotten(log_path)


def erase_forgotten(log_path: Path) -> ErasedEvents:
    """Erase what came back since: events of listed users that were ingested again."""
    users = ForgottenUsers(log_path)
    buckets = _buckets_of(list(users.until_ms_of()))
    log = EventLog(log_path)
    events = files_read = files_rewritten = 0
    problems: list[str] = []
    segments = Path(log_path) / "segments"
    with _erasing(segments):
        for path in (path for number in log.segments() for path in log.files_of(number)):
            try:
                file = read_footer(path)
                if not file.bucket_rows[buckets].any():
                    continue
                files_read += 1
                erased = _erase_file(segments, file, users, buckets)
            except (SegmentError, OSError, EraseError) as error:
                # Also one too damaged to be read: no reader shows it, but its bytes are there.
                problems.append(f"{path}: {error}")
                continue
            events += erased
            files_rewritten += erased > 0
    if problems:
        raise EraseError(
            f"{events} events were erased, but some files could not be: {'; '.join(problems)}. "
            "Mend or remove them, then forget the user again"
        )
    return ErasedEvents(events, files_rewritten, files_read)


def _erase_file(
    segments: Path, file: SegmentFile, users: ForgottenUsers, buckets: NDArray[np.bool_]
) -> int:
    if not _to_erase(read_rows(file, _skip_others(file, buckets)), users).any():
        return 0
    if file.path.stat().st_nlink > 1:
        # Its other name is in an ingest's staging area, from where a second copy would follow.
        raise EraseError("an ingest is committing it; let `marm ingest` finish that")
    rows = read_rows(file, np.zeros(NUM_BUCKETS, np.int64))
    erased = _to_erase(rows, users)
    pending = segments / PENDING_NAME
    pending.unlink(missing_ok=True)
    write_erased(pending, file, _blanked(rows, rows.erased | erased))
    pending.replace(file.path)
    sync_directory(file.path.parent)
    return int(erased.sum())


def _to_erase(rows: SegmentRows, users: ForgottenUsers) -> NDArray[np.bool_]:
    return users.covers(rows.events.user_id, rows.events.timestamp_ms) & ~rows.erased


def _blanked(rows: SegmentRows, erased: NDArray[np.bool_]) -> SegmentRows:
    """The rows with nothing left of the erased ones but their times, which keep the order.

    An event key takes part in the order of events of one millisecond, and is a hash of what is to
    be forgotten: blank rows borrow the one before them, so that readers sort them to where they
    were.
    """
    blank = rows.events.take(np.arange(len(erased)))  # a copy
    for name in ("user_id", "item_id", "author_id", "tag_id", "duration_ms", "context_id"):
        getattr(blank, name)[erased] = 0
    blank.labels[erased] = np.nan
    for row in np.flatnonzero(erased).tolist():
        follows = (
            row > 0
            and rows.bucket[row - 1] == rows.bucket[row]
            and blank.timestamp_ms[row - 1] == blank.timestamp_ms[row]
        )
        blank.event_key[row] = blank.event_key[row - 1] if follows else 0
    return replace(rows, events=blank, erased=erased)


def _buckets_of(user_ids: list[int]) -> NDArray[np.bool_]:
    buckets = np.zeros(NUM_BUCKETS, np.bool_)
    buckets[user_bucket(np.array(user_ids, np.int64))] = True
    return buckets


def _skip_others(file: SegmentFile, buckets: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.where(buckets, 0, file.bucket_rows)


def _files_with(log: EventLog, buckets: NDArray[np.bool_]) -> Iterator[SegmentFile]:
    """Sound files that hold rows of any of the buckets."""
    for number in log.segments():
        for path in log.files_of(number):
            file = log.footer(path)
            if file is not None and file.bucket_rows[buckets].any():
                yield file


@contextmanager
def _erasing(segments: Path) -> Iterator[None]:
    with (segments / LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            (segments / PENDING_NAME).unlink(missing_ok=True)
