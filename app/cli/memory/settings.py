"""The settings of a memory pool as commands read them from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.memory_args import MemoryArgs
from app.yaml_file import read_yaml


def read_memory_args(
    path: Path | None, *, pool: str | None = None, shards: int | None = None
) -> MemoryArgs:
    """The ``memory`` section of a file, which may be a Serve config; options given on the command
    line win over it. Without a file, nothing but those is given."""
    section = {} if path is None else dict(_memory_section(path))
    options = {"pool": pool, "shards": shards}
    section |= {name: value for name, value in options.items() if value is not None}
    try:
        return MemoryArgs.model_validate(section)
    except ValidationError as error:
        where = "the memory pool" if path is None else f"memory in {path}"
        raise ValueError(f"settings of {where}: {error}") from error


def _memory_section(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    expected = ValueError(
        f"{path} must hold a mapping with 'memory', or be a Serve config with 'applications'"
    )
    if not isinstance(content, dict):
        raise expected
    if "memory" in content:
        section = content["memory"]
    elif isinstance(applications := content.get("applications"), list):
        found = [app["args"]["memory"] for app in applications if "memory" in _args_of(app)]
        if len(found) > 1:
            raise ValueError(f"{path} has {len(found)} applications with 'memory', expected one")
        section = found[0] if found else {}
    else:
        raise expected
    if not isinstance(section, dict):
        raise ValueError(f"memory in {path} must be a mapping of settings, got {section!r}")
    return section


def _args_of(application: Any) -> dict[str, Any]:
    args = application.get("args") if isinstance(application, dict) else None
    return args if isinstance(args, dict) else {}
