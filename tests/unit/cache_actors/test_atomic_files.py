from __future__ import annotations

import os
from pathlib import Path

from cache_actors.atomic_files import (
    claim_directory,
    claim_file,
    pending_path,
    remove_abandoned,
    replace_text,
    write_hint,
)


def _pending_file(directory: Path, text: str) -> Path:
    path = pending_path(directory)
    path.write_text(text)
    return path


def _pending_directory(directory: Path, text: str) -> Path:
    path = pending_path(directory)
    path.mkdir()
    (path / "inside").write_text(text)
    return path


def test_a_name_is_claimed_once_whatever_kind_comes_second(tmp_path: Path) -> None:
    assert claim_file(_pending_file(tmp_path, "first"), tmp_path / "1")
    assert claim_directory(_pending_directory(tmp_path, "first"), tmp_path / "2")
    for taken in ("1", "2"):
        assert not claim_file(_pending_file(tmp_path, "second"), tmp_path / taken)
        assert not claim_directory(_pending_directory(tmp_path, "second"), tmp_path / taken)
    assert (tmp_path / "1").read_text() == "first"
    assert (tmp_path / "2" / "inside").read_text() == "first"


def test_replace_text_leaves_only_the_new_text(tmp_path: Path) -> None:
    replace_text(tmp_path / "pin", "one")
    replace_text(tmp_path / "pin", "two")
    assert (tmp_path / "pin").read_text() == "two"
    assert os.listdir(tmp_path) == ["pin"]


def test_only_old_unfinished_work_is_removed(tmp_path: Path) -> None:
    old_file, old_directory = _pending_file(tmp_path, "x"), _pending_directory(tmp_path, "x")
    new_file = _pending_file(tmp_path, "x")
    (tmp_path / "kept").write_text("x")
    for path in (old_file, old_directory, tmp_path / "kept"):
        os.utime(path, (0, 0))
    assert set(remove_abandoned(tmp_path)) == {old_file.name, old_directory.name}
    assert {path.name for path in tmp_path.iterdir()} == {new_file.name, "kept"}


def test_a_hint_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    write_hint(tmp_path / "hint", "1")
    write_hint(tmp_path / "hint", "2")
    assert (tmp_path / "hint").read_text() == "2"
    write_hint(tmp_path / "absent" / "hint", "1")
    (tmp_path / "taken").mkdir()
    write_hint(tmp_path / "taken", "1")
    assert sorted(os.listdir(tmp_path)) == ["hint", "taken"]
