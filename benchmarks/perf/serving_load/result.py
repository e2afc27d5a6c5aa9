"""The result as it is kept: figures of one kind under one key."""

from __future__ import annotations

import json
import re
from typing import Any

_BY_SIZE = re.compile(r"(?P<group>.+)_(?P<name>\d+)")
_BY_PART = re.compile(r"(?P<group>[^.]+)\.(?P<name>.+)")


def nested(line: str) -> str:
    """The same JSON line with ``overload.failed`` as ``{"overload": {"failed": ...}}``, and
    ``rank_over_naive_1000`` as ``{"rank_over_naive": {"1000": ...}}``.

    Only the values of figures at its top move; the sections about them keep whole names.
    """
    content: dict[str, Any] = json.loads(line)
    grouped: dict[str, Any] = {}
    for key, value in content.items():
        found = _BY_PART.fullmatch(key) or _BY_SIZE.fullmatch(key)
        if found is None:
            grouped[key] = value
        else:
            grouped.setdefault(found["group"], {})[found["name"]] = value
    return json.dumps(grouped)
