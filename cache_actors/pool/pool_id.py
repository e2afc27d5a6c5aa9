"""The id of a pool: two homes may have pools of one name, and keep them in one durable tier."""

from __future__ import annotations

import secrets
from pathlib import Path

from cache_actors.atomic_files import claim_file, pending_path


def claim_pool_id(directory: Path) -> str:
    """The id of the pool in ``directory``, made if it has none yet.

    Of several processes that make it at once, one wins and all get the same. It is no part of a
    snapshot: a pool that was restored elsewhere has an id of its own, and so its own rows in the
    durable tier.
    """
    path = directory / "pool-id"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        pending = pending_path(directory)
        try:
            pending.write_text(secrets.token_hex(8), encoding="utf-8")
            claim_file(pending, path)
        finally:
            pending.unlink(missing_ok=True)
    return path.read_text(encoding="utf-8")
