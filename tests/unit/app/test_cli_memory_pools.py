"""Naming a pool that is not there: refused before Ray starts, and nothing is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli.memory.pools import known_pools, opened_pool, pool_directory
from cache_actors.home import Home


def test_a_mistyped_pool_is_refused_and_the_others_are_named(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with (
        pytest.raises(ValueError, match=r"no memory of a pool .unknown. .* only of none"),
        opened_pool(home, "unknown", None),
    ):
        pass
    assert not home.path.exists()
    for name in ("default", "other-pool"):
        pool_directory(home, name).mkdir(parents=True)
    assert known_pools(home) == ["default", "other-pool"]
    with (
        pytest.raises(ValueError, match=r"only of \['default', 'other-pool'\]; .* --pool"),
        opened_pool(home, "unknown", None),
    ):
        pass
    assert known_pools(home) == ["default", "other-pool"]
