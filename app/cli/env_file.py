"""Files of environment variables, as ``set -a; . FILE`` would read them (``cluster/env``)."""

from __future__ import annotations

import re
from pathlib import Path

_LINE = re.compile(r"(RAY_[A-Za-z0-9_]+)=([A-Za-z0-9_.,:/+-]*)")


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a file: lines of ``RAY_NAME=value``, comments and empty lines.

    Raises:
        ValueError: the file can't be read, or has a line of another kind. A shell would do more
            with such a line than set a variable, so it is not guessed at.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"cannot read {path}: {error}; give a file like those in cluster/env"
        ) from error
    variables: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(
                f"{path}, line {number}: expected RAY_NAME=value without quotes, got {line!r}"
            )
        variables[match[1]] = match[2]
    return variables
