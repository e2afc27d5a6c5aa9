"""May a version take over from the one that serves? Not at the price of everybody's history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from marm.memory import Namespace

RowsHeld = Callable[[Namespace], int | None]
"""Rows that the memory holds of a namespace; None when nobody knows just now."""


class ReadsMemory(Protocol):
    """A loaded version as this check sees it."""

    @property
    def version(self) -> int:
        """The published version."""
        ...

    @property
    def namespace(self) -> Namespace:
        """The memory that it reads."""
        ...


class KeepsRows:
    """Refuses a version that would read an empty namespace where the live one reads a full one.

    Rows of other depth or width live in another namespace, so such a version would answer without
    errors, but to users without a past. While a shard does not answer nothing is refused.
    """

    def __init__(self, rows_held: RowsHeld) -> None:
        self._rows_held = rows_held

    def __call__(self, new: ReadsMemory, live: ReadsMemory) -> None:
        """Raise ValueError when ``new`` would lose the rows that ``live`` reads."""
        if new.namespace == live.namespace or self._rows_held(new.namespace) != 0:
            return
        rows = self._rows_held(live.namespace)
        if rows:
            raise ValueError(
                f"it reads {new.namespace.name}, of which the memory holds no rows, and version "
                f"{live.version} reads {rows} rows of {live.namespace.name}; fill it by training "
                "or `marm memory rebuild`, serve it as an arm of its own, or pin it to serve it "
                "all the same"
            )
