"""Arrow columns of unknown cleanliness to numpy columns of known type, and which values were bad.

Nothing here raises because of a value: rows are judged one by one, by the caller, with the masks
that come back.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

UNIT_MS = {"s": 1_000.0, "ms": 1.0, "us": 1e-3, "ns": 1e-6}
"""Milliseconds per unit of a numeric timestamp."""

MAX_TIMESTAMP_MS = 1 << 43
"""Timestamps from here on (the year 2248) are taken for garbage."""

_INTEGER = r"^[+-]?[0-9]{1,18}(\.0*)?$"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_EXACT_FLOAT = 2.0**53


@dataclass(frozen=True)
class Integers:
    """Values of a column with what was wrong: a row is usable when neither mask is set."""

    values: NDArray[np.int64]
    is_null: NDArray[np.bool_]
    is_malformed: NDArray[np.bool_]


def integers(column: pa.ChunkedArray) -> Integers:
    """Whole numbers, also as floats (``3.0``) or text (``"3"``)."""
    column = _plain(column)
    is_null = _is_null(column)
    if pa.types.is_integer(column.type):
        if pa.types.is_uint64(column.type):
            unsigned = column.fill_null(0).to_numpy()
            too_large = unsigned > np.uint64(np.iinfo(np.int64).max)
            return Integers(np.where(too_large, 0, unsigned).astype(np.int64), is_null, too_large)
        values = column.fill_null(0).to_numpy().astype(np.int64)
        return Integers(values, is_null, np.zeros(len(values), np.bool_))
    if pa.types.is_floating(column.type):
        floats = column.cast(pa.float64()).fill_null(float("nan")).to_numpy()
        usable = np.isfinite(floats) & (np.abs(floats) < _EXACT_FLOAT)
        usable &= np.where(usable, floats, 0.5) == np.floor(np.where(usable, floats, 0.0))
        is_null = is_null | np.isnan(floats)
        return Integers(np.where(usable, floats, 0).astype(np.int64), is_null, ~usable & ~is_null)
    if _is_text(column.type):
        text = pc.utf8_trim_whitespace(column)
        is_null = is_null | _true(pc.equal(text, ""))
        good = pc.fill_null(pc.match_substring_regex(text, _INTEGER), False)
        whole = pc.replace_substring_regex(pc.if_else(good, text, "0"), r"^\+|\.0*$", "")
        values = whole.cast(pa.int64()).to_numpy()
        return Integers(values, is_null, ~_true(good) & ~is_null)
    nothing = np.zeros(len(column), np.int64)
    return Integers(nothing, is_null, ~is_null)


def numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """Numbers and booleans as floats; NaN where there is none."""
    column = _plain(column)
    if _is_text(column.type):
        text = pc.utf8_trim_whitespace(column)
        good = pc.fill_null(pc.match_substring_regex(text, _NUMBER), False)
        column = pc.if_else(good, text, None).cast(pa.float64())
    elif pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    elif not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        return np.full(len(column), np.nan)
    return column.cast(pa.float64(), safe=False).fill_null(float("nan")).to_numpy()


def timestamps_ms(column: pa.ChunkedArray, unit: str) -> Integers:
    """Times as milliseconds since 1970. Date and time types, and ISO 8601 text, bring their unit;
    numbers are in ``unit``. Times without a zone are UTC."""
    column = _as_instants(_plain(column))
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        is_null = _is_null(column)
        instants = column.cast(pa.timestamp("ms", tz=getattr(column.type, "tz", None)), safe=False)
        values = instants.cast(pa.int64()).fill_null(0).to_numpy()
    elif unit == "ms" and not pa.types.is_floating(column.type):
        parsed = integers(column)
        values, is_null = parsed.values, parsed.is_null | parsed.is_malformed
    else:
        floats = numbers(column)
        is_null = np.isnan(floats)
        scaled = np.where(is_null, 0.0, floats) * UNIT_MS[unit]
        values = np.clip(np.rint(scaled), -1.0, float(MAX_TIMESTAMP_MS)).astype(np.int64)
    malformed = (values < 0) | (values >= MAX_TIMESTAMP_MS)
    given_null = _is_null(column) | (
        _true(pc.equal(column, "")) if _is_text(column.type) else False
    )
    return Integers(values, given_null, (malformed | is_null) & ~given_null)


def guess_unit(column: pa.ChunkedArray) -> str:
    """Unit of numeric timestamps by their magnitude: seconds, if they are any recent time."""
    column = _as_instants(_plain(column))
    if not (_is_text(column.type) or pa.types.is_integer(column.type)) and not (
        pa.types.is_floating(column.type)
    ):
        return "ms"
    floats = numbers(column)
    known = np.abs(floats[~np.isnan(floats)])
    typical = float(np.median(known)) if len(known) else 0.0
    for unit, limit in (("s", 1e11), ("ms", 1e14), ("us", 1e17)):
        if typical < limit:
            return unit
    return "ns"


def stable_ids(column: pa.ChunkedArray, bits: int = 52) -> NDArray[np.int64]:
    """A positive id for each text, the same in every process and version; 0 for null and ``""``.

    52 bits survive JSON, and two of a million texts share an id with a chance of one in ten
    thousand.
    """
    encoded = pc.dictionary_encode(_plain(column))
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    texts = encoded.dictionary.to_pylist()
    ids = np.array([stable_id(text, bits) for text in texts] + [0], np.int64)
    return ids[pc.fill_null(encoded.indices, len(texts)).to_numpy(zero_copy_only=False)]


def stable_id(text: str | bytes, bits: int = 52) -> int:
    """The id of one text: see `stable_ids`."""
    data = text.encode() if isinstance(text, str) else text
    if not data.strip():
        return 0
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return 1 + int.from_bytes(digest, "big") % ((1 << bits) - 1)


def is_text(column: pa.ChunkedArray) -> bool:
    """Whether a column holds text, also dictionary-encoded."""
    return bool(_is_text(_plain(column).type))


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """One array without dictionary encoding."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array


def _as_instants(array: pa.Array) -> pa.Array:
    """Text that is not numeric as instants where all of it is ISO 8601; anything else as it is."""
    if not _is_text(array.type):
        return array
    present = pc.drop_null(array)
    if len(present) == 0 or _true(pc.match_substring_regex(present.slice(0, 1), _NUMBER)).all():
        return array
    try:
        return array.cast(pa.timestamp("ms"))
    except pa.ArrowInvalid:
        return array


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_null(array: pa.Array) -> NDArray[np.bool_]:
    return np.asarray(array.is_null().to_numpy(zero_copy_only=False), np.bool_)


def _true(condition: pa.Array) -> NDArray[np.bool_]:
    filled = pc.fill_null(condition, False)
    return np.asarray(filled.to_numpy(zero_copy_only=False), np.bool_)
