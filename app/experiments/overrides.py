"""Arms that a caller asks for, for testing: ``X-MARM-Arms: ranking=marm-l4, retrieval=wide``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from app.errors import RefusedError
from app.experiments.args import OverrideArgs
from stages.request import STAGES, StageName

ARMS_HEADER = "X-MARM-Arms"
MAX_HEADER_CHARS = 512


class ForbiddenError(PermissionError):
    """The caller may not do this; the message says what would allow it (HTTP 403)."""


def parse_overrides(headers: Sequence[str]) -> dict[StageName, str]:
    """Arms by stage as the header names them, which may come several times; none without one.

    Raises:
        RefusedError: the header is not a list of ``stage=arm``.
    """
    if not headers:
        return {}
    header = ",".join(headers)
    if len(header) > MAX_HEADER_CHARS:
        raise RefusedError(
            f"the header {ARMS_HEADER} must have at most {MAX_HEADER_CHARS} characters, got "
            f"{len(header)}"
        )
    overrides: dict[StageName, str] = {}
    for part in header.split(","):
        name, equals, arm = (piece.strip() for piece in part.partition("="))
        stage = next((known for known in STAGES if known == name), None)
        if stage is None or not equals or not arm:
            raise RefusedError(
                f"the header {ARMS_HEADER} must be like 'ranking=marm-l4, retrieval=default' with "
                f"stages of {list(STAGES)}, got {part.strip()!r}"
            )
        if stage in overrides:
            raise RefusedError(f"the header {ARMS_HEADER} must name {stage} once")
        overrides[stage] = arm
    return overrides


class OverrideRules:
    """Who may choose arms, and which there are."""

    def __init__(
        self, allowed: OverrideArgs, variants: Mapping[StageName, tuple[str, ...]]
    ) -> None:
        self._user_ids = frozenset(allowed.user_ids)
        self._roles = frozenset(allowed.roles)
        self._variants = variants

    def check(self, overrides: Mapping[StageName, str], user_id: int, role: str | None) -> None:
        """Accept the overrides of a request, or say what is wrong.

        Raises:
            ForbiddenError: neither the user nor the role of the API key may choose arms.
            RefusedError: a stage has no such arm.
        """
        if not overrides:
            return
        if user_id not in self._user_ids and role not in self._roles:
            raise ForbiddenError(
                f"the header {ARMS_HEADER} is not allowed for user {user_id}; list the user in "
                "routing.overrides.user_ids, or send an API key with a role of "
                "routing.overrides.roles"
            )
        for stage, arm in overrides.items():
            if arm not in self._variants[stage]:
                raise RefusedError(
                    f"the header {ARMS_HEADER} asks for {stage}={arm}, but {stage} has the arms "
                    f"{list(self._variants[stage])}"
                )
