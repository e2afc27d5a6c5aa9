from __future__ import annotations

from pathlib import Path

import pytest

from cache_actors.home import Home


def test_create_makes_every_directory_and_may_be_repeated(tmp_path: Path) -> None:
    home = Home(tmp_path / "a" / "home").create().create()
    assert {path.name for path in home.path.iterdir()} == {
        "log",
        "models",
        "memory",
        "exposures",
        "runs",
    }


def test_two_spellings_of_a_path_are_the_same_home(tmp_path: Path) -> None:
    assert Home(tmp_path / "x" / ".." / "home") == Home(tmp_path / "home")


def test_a_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    path.write_text("not a directory")
    with pytest.raises(ValueError, match=r"taken is a file; choose another path"):
        Home(path).create()
    assert path.read_text() == "not a directory"
