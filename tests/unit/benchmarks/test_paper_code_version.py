"""The digest of the code follows what is run, and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks.paper import code_version as versions
from benchmarks.paper.code_version import code_version


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "marm" / "inner").mkdir(parents=True)
    files = {
        "marm/__init__.py": "",
        "marm/top.py": "import numpy\nfrom marm.middle import f\nfrom marm import inner\n",
        "marm/middle.py": "def f():\n    return 1\n",
        "marm/inner/__init__.py": "from marm.top import numpy\n",
        "marm/other.py": "x = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    return tmp_path


def version(not_followed: tuple[str, ...] = ()) -> str:
    versions._tree_and_imports.cache_clear()
    return code_version(["marm.top"], not_followed)


def test_only_what_is_run_counts(project: Path) -> None:
    before = version()
    (project / "marm/other.py").write_text("x = 2\n")
    (project / "marm/middle.py").write_text('def f():  # one\n    """One."""\n    return 1\n')
    assert version() == before
    (project / "marm/middle.py").write_text("def f():\n    return 2\n")
    assert version() != before


def test_a_registry_does_not_bring_in_its_entries(project: Path) -> None:
    before = version(("marm.top",))
    (project / "marm/middle.py").write_text("def f():\n    return 2\n")
    assert version(("marm.top",)) == before
    (project / "marm/top.py").write_text("from marm.middle import f\ny = 1\n")
    assert version(("marm.top",)) != before


def test_code_is_what_it_was_when_it_was_first_read(project: Path) -> None:
    before = version()
    (project / "marm/middle.py").write_text("def f():\n    return 2\n")
    assert code_version(["marm.top"]) == before
    assert version() != before


def test_a_body_of_nothing_but_text_stays_a_body() -> None:
    tree = versions._without_docstrings(ast.parse('class A:\n    """Text."""\n'))
    assert ast.unparse(tree) == "class A:\n    pass"
