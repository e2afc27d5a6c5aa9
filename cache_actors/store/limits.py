"""Bounds of one shard's store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Durability = Literal["process", "machine"]
"""What an acknowledged save survives: the death of every process, or of the machine too."""

MIN_BYTES = 4 << 20


@dataclass(frozen=True)
class StoreLimits:
    """None is no bound.

    Attributes:
        max_bytes: files of the shard, all namespaces together. Least recently used users of the
            namespace that needs room are evicted.
        max_rows_per_user: newest rows of a user to keep.
        ttl_s: a user to whom nothing was written for so long is a miss, and is removed.
        namespace_bytes: quota of single namespaces, by `marm.memory.Namespace.name`.
    """

    max_bytes: int | None = None
    max_rows_per_user: int | None = None
    ttl_s: float | None = None
    namespace_bytes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.max_rows_per_user is not None and self.max_rows_per_user < 1:
            raise ValueError(
                f"max_rows_per_user must be at least 1, or None for all, got "
                f"{self.max_rows_per_user}"
            )
        if self.ttl_s is not None and not self.ttl_s >= 1:
            raise ValueError(f"ttl_s must be at least 1 second, or None, got {self.ttl_s}")
        quotas = [("max_bytes", self.max_bytes), *self.namespace_bytes]
        for name, size in quotas:
            if size is not None and size < MIN_BYTES:
                raise ValueError(f"{name} must be at least {MIN_BYTES} bytes, got {size}")

    @property
    def evicts(self) -> bool:
        """Whether users may have to be evicted, so that it matters when each was used."""
        return self.max_bytes is not None or bool(self.namespace_bytes)

    def quota(self, namespace_name: str) -> int | None:
        """Bytes that a namespace may take, if it has a quota of its own."""
        return dict(self.namespace_bytes).get(namespace_name)


UNLIMITED = StoreLimits()
