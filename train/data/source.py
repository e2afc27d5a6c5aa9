"""What every format is turned into: files in pieces, and how a piece becomes cleanable columns."""

from __future__ import annotations

import glob
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from marm.items import ItemFeatures
from train.data.fragments import Fragment, RawRows
from train.data.ingest_report import IngestError
from train.data.staged_rows import PROBLEM, clean, tally_rows


class Layout(Protocol):
    """One format's reading: picklable, since it runs in Ray Data tasks."""

    def read(self, fragment: Fragment) -> RawRows:
        """Rows of a fragment with the columns of `train.data.staged_rows.FIELDS`."""
        ...


@dataclass(frozen=True)
class Source:
    """A log outside, ready to be read."""

    format: str
    files: list[Path]
    fragments: list[Fragment]
    layout: Layout
    timestamp_unit: str
    items: ItemFeatures = field(default_factory=ItemFeatures.empty)  # side table of the format
    notes: list[str] = field(default_factory=list)


def stage(fragment: Fragment, layout: Layout, unit: str) -> pa.Table:
    """A fragment as staged rows. A fragment that can't be read becomes a tally that says why, so
    that the reason reaches the caller as data."""
    try:
        raw = layout.read(fragment)
        return clean(raw.table, unit, fragment.first_ordinal, raw.num_malformed)
    except (IngestError, OSError, pa.ArrowException) as error:
        return tally_rows({f"{PROBLEM}{error}": 1})


def resolve(path: str, names: str, recursive: bool = True) -> list[Path]:
    """Files that ``path`` means: itself, the matches of a glob, or what is called ``names`` (a
    glob) inside a directory. Sorted, since their order decides ties."""
    given = Path(path).expanduser()
    if given.is_file():
        return [given]
    if given.is_dir():
        found = given.rglob(names) if recursive else given.glob(names)
        files = sorted(file for file in found if file.is_file())
        if not files:
            raise IngestError(f"found no {names} in the directory {given}; pass the file itself")
        return files
    matches = sorted(Path(match) for match in glob.glob(str(given)) if Path(match).is_file())
    if not matches:
        raise IngestError(f"no such file: {given}; pass a file, a directory or a glob in quotes")
    return matches


def require_columns(path: Path, have: list[str], need: dict[str, str], advice: str) -> None:
    """Refuse a file that lacks a column. ``need`` maps fields to columns."""
    missing = [
        f"{column!r}" + ("" if column == name else f" (for {name})")
        for name, column in need.items()
        if column not in have
    ]
    if missing:
        raise IngestError(
            f"{path} has no column {', '.join(missing)}; "
            f"its columns are {', '.join(have)}. {advice}"
        )
