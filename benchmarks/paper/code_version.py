"""A digest of the code that a result depends on, so that results of other code are not reused.

It covers a module and everything of this project that it imports, directly or not, as syntax trees:
comments, docstrings and formatting don't matter.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

import benchmarks

PACKAGES = ("marm", "cache_actors", "train", "stages", "app", "benchmarks")
ROOT = Path(benchmarks.__file__).parents[1]


def code_version(roots: Collection[str], not_followed: Collection[str] = ()) -> str:
    """Digest of the modules ``roots`` and all they import.

    Args:
        roots: names of modules.
        not_followed: modules that count themselves, but whose imports don't, such as a registry
            of which only one entry is used; name what is used among the roots.
    """
    waiting = list(roots)
    trees: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        path = _path_of(name)
        if name in trees or path is None:
            continue
        trees[name], imported = _tree_and_imports(path)
        if name not in not_followed:
            waiting += imported
    digest = hashlib.sha256()
    for name in sorted(trees):
        digest.update(f"{name}\n{trees[name]}\n".encode())
    return digest.hexdigest()[:16]


def _path_of(module: str) -> Path | None:
    """The file of a module of this project; None for a name inside one, and for other modules."""
    if module.split(".")[0] not in PACKAGES:
        return None
    path = ROOT.joinpath(*module.split("."))
    found = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in found if file.is_file()), None)


@cache
def _tree_and_imports(path: Path) -> tuple[str, tuple[str, ...]]:
    # Read once: all versions that a process asks for are of the code it began with.
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return ast.dump(_without_docstrings(tree)), tuple(_imported(tree))


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [line for line in node.body if not _is_text(line)] or [ast.Pass()]
    return tree


def _is_text(line: ast.stmt) -> bool:
    return (
        isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    )
