"""MovieLens as published by GroupLens: ratings.dat (1M, 10M) or ratings.csv (20M and later).

A rating of 4 or more is a long view, 5 is a like. The movies file beside it gives each item its
first genre as tag.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from marm.items import ItemFeatures
from train.data.fragments import (
    CsvLayout,
    Fragment,
    RawRows,
    csv_fragments,
    csv_header,
    open_source,
    read_csv,
)
from train.data.ingest_report import IngestError
from train.data.parse_columns import numbers, stable_id
from train.data.source import Source, require_columns, resolve

LONG_VIEW_RATING = 4.0
LIKE_RATING = 5.0

GENRES = (
    "Action",
    "Adventure",
    "Animation",
    "Children",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "IMAX",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
"""Published genres; tag ids are 1-based places in this order. Other genres get a hashed id."""

_CSV_FIELDS = {"user_id": "userId", "item_id": "movieId", "rating": "rating"}
_DAT_NAMES = ("userId", "movieId", "rating", "timestamp")


@dataclass(frozen=True)
class MovieLensLayout:
    """Reads ratings."""

    csv: CsvLayout

    def read(self, fragment: Fragment) -> RawRows:
        """See `Layout.read`."""
        raw = read_csv(fragment, self.csv)
        rating = numbers(raw.table.column("rating"))
        unknown = np.isnan(rating)
        table = pa.table(
            {
                "user_id": raw.table.column("userId"),
                "item_id": raw.table.column("movieId"),
                "timestamp": raw.table.column("timestamp"),
                "long_view": np.where(unknown, np.nan, rating >= LONG_VIEW_RATING),
                "like": np.where(unknown, np.nan, rating >= LIKE_RATING),
            }
        )
        return RawRows(table, raw.num_malformed)


def open_movielens(path: str) -> Source:
    """Plan the ingest of a ratings file, or of a directory that holds one."""
    files = [file for file in resolve(path, "ratings.*") if file.suffix in (".dat", ".csv")]
    if len(files) != 1:
        names = ", ".join(map(str, files)) or "none"
        raise IngestError(f"expected one ratings.dat or ratings.csv, found {names}; pass the file")
    ratings = files[0]
    if ratings.suffix == ".dat":
        layout = CsvLayout("::", _DAT_NAMES, _DAT_NAMES)
        with open_source(ratings) as file:
            if b"::" not in file.readline(4096):
                raise IngestError(f"{ratings} does not look like ratings.dat: no '::' in line 1")
    else:
        header = csv_header(ratings)
        need = {**_CSV_FIELDS, "timestamp": "timestamp"}
        require_columns(ratings, header, need, "Expected the columns of MovieLens' ratings.csv.")
        layout = CsvLayout(",", tuple(header), tuple(need.values()))
    notes = []
    movies = ratings.with_name("movies" + ratings.suffix)
    items = ItemFeatures.empty()
    if movies.is_file():
        items = read_movies(movies)
    else:
        notes.append(f"no {movies.name} beside {ratings.name}: items have no tag")
    return Source(
        format="movielens",
        files=[ratings],
        fragments=csv_fragments([ratings], has_header=ratings.suffix == ".csv"),
        layout=MovieLensLayout(layout),
        timestamp_unit="s",
        items=items,
        notes=notes,
    )


def read_movies(path: Path) -> ItemFeatures:
    """Items of movies.dat or movies.csv, with the tag of their first genre."""
    with open_source(path) as file:
        text = file.read().decode("latin-1" if path.suffix == ".dat" else "utf-8-sig", "replace")
    if path.suffix == ".dat":
        rows = [line.split("::") for line in text.splitlines()]
    else:
        rows = list(csv.reader(text.splitlines()))[1:]
    known = [
        (int(row[0]), genre_tag(row[-1])) for row in rows if len(row) >= 3 and row[0].isdigit()
    ]
    columns = np.array(known, np.int64).reshape(-1, 2)
    zeros = np.zeros(len(columns), np.int64)
    return ItemFeatures(columns[:, 0].copy(), zeros, columns[:, 1].copy(), zeros)


def genre_tag(genres: str) -> int:
    """Tag id of the first genre in ``"Drama|War"``; 0 when none is listed."""
    first = genres.split("|")[0].strip()
    if not first or first.startswith("("):
        return 0
    # MovieLens 1M says "Children's" where all others say "Children".
    first = first.removesuffix("'s")
    return GENRES.index(first) + 1 if first in GENRES else stable_id(first)
