"""What can go wrong with a store."""

from __future__ import annotations

from marm.memory import Namespace


class MemoryStoreError(RuntimeError):
    """A store cannot be opened, read or written."""


class MemoryStoreAbsentError(MemoryStoreError):
    """There is no store at a path, or its writer has not finished making it."""


class StoreInUseError(MemoryStoreError):
    """Another process writes the store."""


class MemoryFullError(MemoryStoreError):
    """Rows do not fit: the byte budget is used up, or the disk is full."""


class NamespaceMismatchError(MemoryStoreError):
    """A store or an array holds rows of another namespace."""

    @staticmethod
    def of(place: str, expected: Namespace, found: object) -> NamespaceMismatchError:
        """The error for ``place``, which should belong to ``expected``."""
        return NamespaceMismatchError(
            f"{place} must hold rows of namespace {expected.name}, but holds {found}; "
            "open it with its own namespace, or raise the namespace's epoch to start afresh"
        )
