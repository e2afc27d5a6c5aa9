"""Which sources a log already holds, and the commit of a source as a whole.

A source is recognised by its content, wherever it lies. Its segments are first written aside; then
an entry of the ledger names them, and only then they get their numbers in the log. A process that
dies in between leaves an entry that says "committing", and whoever comes next finishes the work: so
a source is in the log as a whole, once, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache_actors.atomic_files import claim_file, replace_text
from cache_actors.event_log.log import EventLog
from cache_actors.event_log.segments import segment_path
from train.data.fragments import open_source
from train.data.ingest_report import IngestError

_CHUNK_BYTES = 4 << 20
_ABANDONED_S = 86_400.0


def file_fingerprint(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hash of a file's content; its name and place don't matter. ``progress`` gets bytes done."""
    digest = hashlib.blake2b(digest_size=16)
    size = 0
    with open_source(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            if progress is not None:
                progress(size)
    return f"{size:x}-{digest.hexdigest()}"


def text_fingerprint(text: str) -> str:
    """Hash of a source that is described, not read."""
    return f"text-{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


class SourceLedger:
    """The sources of the log under ``log_path`` (a home's ``log`` directory)."""

    def __init__(self, log_path: Path) -> None:
        self._log_path = Path(log_path)
        self._entries = self._log_path / "sources"
        self._staging = self._log_path / "staging"

    def entries(self) -> list[dict[str, Any]]:
        """Every commit so far, oldest first."""
        paths = self._entries.glob("*.json")
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        return sorted(found, key=lambda entry: entry["committed_ms"])

    def refuse_known(self, fingerprints: dict[str, str]) -> None:
        """Raise if the log holds any of these sources (fingerprints by the name to show)."""
        known = {
            fingerprint: entry
            for entry in self.entries()
            for fingerprint in entry["fingerprints"].values()
        }
        for name, fingerprint in fingerprints.items():
            if entry := known.get(fingerprint):
                day = time.strftime("%Y-%m-%d", time.gmtime(entry["committed_ms"] / 1_000))
                raise IngestError(
                    f"{name} is already in the log (added on {day}, segments "
                    f"{entry['segments']}); pass --again to append its events once more"
                )

    def staging_area(self) -> Path:
        """A fresh directory to stage one source in; old ones that nobody finished are removed."""
        self._staging.mkdir(parents=True, exist_ok=True)
        owned = {entry["staging"] for entry in self.entries() if entry["state"] == "committing"}
        for path in self._staging.iterdir():
            if path.name not in owned and time.time() - path.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)
        area = self._staging / uuid.uuid4().hex
        area.mkdir()
        return area

    def commit(
        self, area: Path, fingerprints: dict[str, str], details: dict[str, Any]
    ) -> list[int]:
        """Move the staged segments into the log, in order; their numbers there."""
        self._entries.mkdir(parents=True, exist_ok=True)
        entry = {
            "state": "committing",
            "staging": area.name,
            "committed_ms": time.time_ns() // 1_000_000,
            "fingerprints": fingerprints,
            "segments": [],
            **details,
        }
        return self._finish(self._entries / f"{area.name}.json", entry)

    def abandon(self, area: Path) -> None:
        """Remove what was staged, unless its commit has begun: that is for `recover` to finish."""
        if not (self._entries / f"{area.name}.json").exists():
            shutil.rmtree(area, ignore_errors=True)

    def recover(self) -> int:
        """Finish the commits of processes that died; how many there were."""
        unfinished = [entry for entry in self.entries() if entry["state"] == "committing"]
        for entry in unfinished:
            self._finish(self._entries / f"{entry['staging']}.json", entry)
        return len(unfinished)

    def _finish(self, path: Path, entry: dict[str, Any]) -> list[int]:
        replace_text(path, json.dumps(entry, indent=1))
        area = self._staging / entry["staging"]
        target = self._log_path / "segments"
        target.mkdir(parents=True, exist_ok=True)
        log = EventLog(self._log_path)
        segments = list(entry["segments"])
        for staged in sorted((area / "segments").glob("*.parquet")):
            if staged.stat().st_nlink > 1:  # it got its number, then the process died
                staged.unlink()
                continue
            number = log.last_segment() + 1
            while not claim_file(staged, segment_path(target, number)):
                number += 1
            segments.append(number)
        entry = {**entry, "state": "done", "segments": segments}
        replace_text(path, json.dumps(entry, indent=1))
        shutil.rmtree(area, ignore_errors=True)
        return segments
