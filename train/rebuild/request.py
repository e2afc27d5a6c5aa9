"""What a rebuild and an audit are asked for, as the driver tells its workers."""

from __future__ import annotations

from dataclasses import dataclass

from train.rebuild.stored import DueRule


@dataclass(frozen=True, kw_only=True)
class RebuildRequest:
    """One rebuild.

    Attributes:
        variant: whose published ranking version computes the rows.
        version: which one; None: the one that serves.
        user_ids: only these users; None: every user of the log.
        limit_users: at most so many, the hottest; None: all.
        older_than_steps: rows are due that were computed more than so many steps before the
            version. 0 takes every row that is older than the version; None only those that are
            absent or raw.
        replace_newer: write also rows that were computed after the version.
        newest: rows of a user to look after, counted from the newest; None: all.
        num_workers: processes, one CPU each.
    """

    variant: str = "default"
    version: int | None = None
    user_ids: tuple[int, ...] | None = None
    limit_users: int | None = None
    older_than_steps: int | None = 0
    replace_newer: bool = False
    newest: int | None = None
    num_workers: int = 1

    def __post_init__(self) -> None:
        for name in ("limit_users", "newest", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.older_than_steps is not None and self.older_than_steps < 0:
            raise ValueError(f"older_than_steps must be at least 0, got {self.older_than_steps}")
        if self.user_ids is not None and not self.user_ids:
            raise ValueError("user_ids must name at least one user, or be None for all; got none")

    def rule(self, step: int) -> DueRule:
        """Which rows are due for a version of ``step``."""
        oldest = 0 if self.older_than_steps is None else max(0, step - self.older_than_steps)
        return DueRule(step, oldest, self.replace_newer)


@dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """One audit.

    Attributes:
        variant: whose published ranking version counts as fresh.
        version: which one; None: the one that serves.
        num_users: users to sample, each with the same chance.
        seed: of the sample.
        newest: rows of a user to compare, counted from the newest; None: all.
        num_workers: processes, one CPU each.
    """

    variant: str = "default"
    version: int | None = None
    num_users: int = 100
    seed: int = 0
    newest: int | None = None
    num_workers: int = 1

    def __post_init__(self) -> None:
        for name in ("num_users", "newest", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
