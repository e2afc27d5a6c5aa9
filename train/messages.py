"""Small values as bytes between workers: JSON with arrays beside it, in safetensors. No pickle, so
what arrives can be wrong but can't run."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

_DOCUMENT = "document"
_ARRAY_KEY = "__array__"


def encode_message(value: Any) -> bytes:
    """``value`` as bytes: numbers, text, None, arrays of numbers, and lists and dicts of them.

    Tuples come back as lists.

    Raises:
        TypeError: it holds something else, or a dict with a key that is not text.
    """
    arrays: dict[str, NDArray] = {}
    text = json.dumps(_take_arrays(value, arrays))
    arrays[_DOCUMENT] = np.frombuffer(text.encode(), np.uint8)
    return bytes(safetensors.numpy.save(arrays))


def decode_message(content: bytes) -> Any:
    """The value that `encode_message` wrote."""
    arrays = safetensors.numpy.load(content)
    document = json.loads(arrays.pop(_DOCUMENT).tobytes())
    return _put_arrays(document, arrays)


def _take_arrays(value: Any, arrays: dict[str, NDArray]) -> Any:
    if isinstance(value, np.ndarray):
        name = f"array-{len(arrays)}"
        arrays[name] = np.ascontiguousarray(value)
        return {_ARRAY_KEY: name}
    if isinstance(value, dict):
        odd = [key for key in value if not isinstance(key, str) or key == _ARRAY_KEY]
        if odd:
            raise TypeError(f"keys of a message must be text other than {_ARRAY_KEY}, got {odd}")
        return {key: _take_arrays(item, arrays) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_take_arrays(item, arrays) for item in value]
    return value


def _put_arrays(value: Any, arrays: dict[str, NDArray]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_ARRAY_KEY}:
            return arrays[value[_ARRAY_KEY]]
        return {key: _put_arrays(item, arrays) for key, item in value.items()}
    if isinstance(value, list):
        return [_put_arrays(item, arrays) for item in value]
    return value
