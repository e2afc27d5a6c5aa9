"""KuaiRand (Pure, 1K, 27K) as published: log_standard*.csv and video_features_basic*.csv.

Authors, tags and tabs are numbered from 0 there, and 0 means unknown here: all three are stored
plus one. A directory stands for its standard log; a glob such as ``data/log_*.csv`` adds the
random-exposure log, whose events are as real.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from marm.items import ItemFeatures
from train.data.fragments import (
    CsvLayout,
    Fragment,
    RawRows,
    csv_fragments,
    csv_header,
    read_csv,
)
from train.data.ingest_report import IngestError
from train.data.parse_columns import integers, is_text, numbers
from train.data.source import Source, require_columns, resolve

_COLUMNS = {
    "user_id": "user_id",
    "item_id": "video_id",
    "timestamp": "time_ms",
    "click": "is_click",
    "long_view": "long_view",
    "like": "is_like",
    "comment": "is_comment",
    "forward": "is_forward",
    "follow": "is_follow",
    "watch_time_ms": "play_time_ms",
    "duration_ms": "duration_ms",
}
_TAB = "tab"
_FEATURES = {"item_id": "video_id", "author_id": "author_id", "tag_id": "tag"}
_DURATION = "video_duration"


@dataclass(frozen=True)
class KuaiRandLayout:
    """Reads exposures."""

    csv: CsvLayout

    def read(self, fragment: Fragment) -> RawRows:
        """See `Layout.read`."""
        raw = read_csv(fragment, self.csv)
        columns = {name: raw.table.column(column) for name, column in _COLUMNS.items()}
        columns["context_id"] = pa.array(_one_based(raw.table.column(_TAB)))
        return RawRows(pa.table(columns), raw.num_malformed)


def open_kuairand(path: str) -> Source:
    """Plan the ingest of log files, with the video features found beside or around them."""
    files = resolve(path, "log_standard*.csv")
    headers = {file: csv_header(file) for file in files}
    for file, header in headers.items():
        need = {**_COLUMNS, "context_id": _TAB}
        require_columns(file, header, need, "Expected the columns of a KuaiRand log.")
    if len({tuple(header) for header in headers.values()}) > 1:
        raise IngestError(f"columns of {', '.join(map(str, files))} differ; ingest them one by one")
    wanted = (*_COLUMNS.values(), _TAB)
    notes = []
    feature_files = sorted({f for file in files for f in file.parent.glob("video_features_basic*")})
    if not feature_files:
        notes.append("no video_features_basic*.csv beside the log: no authors and no tags")
    return Source(
        format="kuairand",
        files=files,
        fragments=csv_fragments(files, has_header=True),
        layout=KuaiRandLayout(CsvLayout(",", tuple(headers[files[0]]), wanted)),
        timestamp_unit="ms",
        items=read_video_features(feature_files),
        notes=notes,
    )


def read_video_features(files: list[Path]) -> ItemFeatures:
    """Items of video_features_basic*.csv: author, first tag, duration."""
    parts = []
    for file in files:
        header = csv_header(file)
        require_columns(file, header, _FEATURES, "Expected KuaiRand's video features.")
        names = [*_FEATURES.values(), *([_DURATION] if _DURATION in header else [])]
        layout = CsvLayout(",", tuple(header), tuple(names))
        for fragment in csv_fragments([file], has_header=True):
            parts.append(_video_features(read_csv(fragment, layout).table))
    return ItemFeatures(
        *(
            np.concatenate([getattr(part, name) for part in parts] or [np.empty(0, np.int64)])
            for name in ("item_id", "author_id", "tag_id", "duration_ms")
        )
    )


def _video_features(table: pa.Table) -> ItemFeatures:
    ids = integers(table.column("video_id"))
    tag = table.column("tag")
    if is_text(tag):  # "12,39": a list of tags, the first is the main one
        tag = pc.replace_substring_regex(tag, r"[,;|].*$", "")
    duration = np.zeros(len(ids.values))
    if _DURATION in table.column_names:
        duration = np.nan_to_num(numbers(table.column(_DURATION))).clip(0, 1e12)
    usable = ~ids.is_null & ~ids.is_malformed & (ids.values >= 0)
    items = ItemFeatures(
        ids.values,
        _one_based(table.column("author_id")),
        _one_based(tag),
        duration.astype(np.int64),
    )
    return items.take(usable)


def _one_based(column: pa.ChunkedArray) -> NDArray[np.int64]:
    parsed = integers(column)
    known = ~parsed.is_null & ~parsed.is_malformed & (parsed.values >= 0)
    return np.where(known, parsed.values + 1, 0)
