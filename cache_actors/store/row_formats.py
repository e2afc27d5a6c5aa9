"""Rows as callers see them, and rows at rest: padding, and int8 with a scale per row and layer.

A float row is stored as it is. An int8 row keeps, per layer, ``scale = max|x| / 127`` in float32
and ``round(x / scale)`` in int8; reading multiplies and rounds to float16. The error of a number
``x`` of a layer whose largest magnitude is ``m``:

    |decode(encode(x)) - x|  <=  m / 254            half a step of the int8 grid
                              +  m / 2048 + 2**-25  rounding to float16, and its smallest numbers

The largest number itself comes back exactly, so its layer gets the same scale and the same int8
numbers when it is encoded again: encoding what was decoded changes nothing, however often rows
move between stores.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.half_floats import narrow_into, widen
from marm.memory import EVENT_BYTES, Namespace

_LEVELS = np.float32(127)
_LARGEST = np.finfo(np.float16).max


def encode(namespace: Namespace, rows: NDArray[np.void]) -> NDArray[np.void]:
    """Rows of ``row_dtype`` as rows of ``stored_dtype``; ``rows`` itself where the two are equal.

    Raises:
        ValueError: the rows have another layout, or numbers that int8 has no scale for.
    """
    _check("rows to store", namespace.name, rows.dtype, namespace.row_dtype)
    stored_dtype = namespace.stored_dtype
    if stored_dtype == namespace.row_dtype:
        return rows
    stored = np.zeros(rows.shape, stored_dtype)
    if namespace.dtype == "int8":
        _copy_first_bytes(rows, stored, EVENT_BYTES)
        _quantize(namespace, rows["memory"], stored)
    else:
        _copy_first_bytes(rows, stored, rows.dtype.itemsize)
    return stored


def decode(
    namespace: Namespace, stored: NDArray[np.void], layers: int | None = None
) -> NDArray[np.void]:
    """Stored rows as rows of ``namespace.layers_dtype(layers)``; ``stored`` itself where equal."""
    wanted = namespace.layers_dtype(layers)
    _check("stored rows", namespace.name, stored.dtype, namespace.stored_dtype)
    if wanted == stored.dtype:
        return stored
    rows = np.empty(stored.shape, wanted)
    decode_into(namespace, stored, rows)
    return rows


def decode_into(namespace: Namespace, stored: NDArray[np.void], out: NDArray[np.void]) -> None:
    """`decode` into a caller's rows; how many layers ``out`` has room for says how many are read.

    Both may be strided, such as rows between which a store keeps something of its own.
    """
    _check("stored rows", namespace.name, stored.dtype, namespace.stored_dtype)
    layers = _layers_of(namespace, out)
    _check("rows to read into", namespace.name, out.dtype, namespace.layers_dtype(layers))
    if out.shape != stored.shape:
        raise ValueError(f"expected room for {len(stored)} rows, got room for {len(out)}")
    if namespace.dtype != "int8":
        _copy_first_bytes(stored, out, out.dtype.itemsize)
        return
    _copy_first_bytes(stored, out, EVENT_BYTES)
    wide = stored["memory"][:, :layers].astype(np.float32)
    wide *= stored["scale"][:, :layers, None]
    narrow_into(wide, out["memory"])


def as_read(namespace: Namespace, rows: NDArray[np.void]) -> NDArray[np.void]:
    """``rows`` as a reader will see them once they are stored: the rows themselves for floats.

    What is used before it is stored (rows that a trainer lays over a fetch) passes through here, so
    that results don't depend on when a save is acknowledged.
    """
    return decode(namespace, encode(namespace, rows)) if namespace.dtype == "int8" else rows


def _quantize(namespace: Namespace, memory: NDArray, stored: NDArray[np.void]) -> None:
    """Fill ``scale`` and ``memory`` of ``stored`` from ``memory`` ``[R, L, D]``."""
    if not memory.size:
        return
    # Magnitudes of float16 are in the order of their bits, which are faster to compare.
    magnitude_bits = memory.view(np.int16) & np.int16(0x7FFF)
    largest = widen(magnitude_bits.max(axis=-1).view(np.float16))
    if largest.max() > _LARGEST:
        row, layer = np.argwhere(largest > _LARGEST)[0].tolist()
        raise ValueError(
            f"rows of {namespace.name} must be finite to be stored as int8: layer {layer} of row "
            f"{row} is not"
        )
    scale = largest / _LEVELS
    # A layer of zeros keeps scale 0 and zeros.
    steps = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    wide = widen(memory)
    wide *= steps[..., None]
    stored["scale"] = scale
    stored["memory"] = np.rint(wide, out=wide)


def _copy_first_bytes(source: NDArray[np.void], target: NDArray[np.void], count: int) -> None:
    """Copy the first ``count`` bytes of every row: numpy assigns structured rows field by field."""
    _first_bytes(target, count)[...] = _first_bytes(source, count)


def _first_bytes(rows: NDArray[np.void], count: int) -> NDArray[np.void]:
    return rows.view(
        np.dtype(
            {
                "names": ["bytes"],
                "formats": [f"V{count}"],
                "offsets": [0],
                "itemsize": rows.dtype.itemsize,
            }
        )
    )["bytes"]


def _layers_of(namespace: Namespace, out: NDArray[np.void]) -> int:
    fields = out.dtype.fields
    if fields is None or "memory" not in fields or len(fields["memory"][0].shape) != 2:
        raise ValueError(f"expected rows of {namespace.name} to read into, got {out.dtype}")
    return fields["memory"][0].shape[0]


def _check(what: str, name: str, got: np.dtype, expected: np.dtype) -> None:
    if got != expected:
        raise ValueError(f"expected {what} to be of {name}: {expected}, got {got}")
