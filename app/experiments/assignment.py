"""What routing decided for one request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stages.request import StageName


@dataclass(frozen=True)
class Assignment:
    """The arms of one user's request, and why they are theirs.

    Attributes:
        arms: the arm of every stage.
        experiments: the key of the experiment that the user takes part in, by stage; a stage is
            missing when the user is outside of the experiment's traffic share, in the holdout or on
            an overridden arm, or when the stage has no experiment.
        holdout: the user is in the global holdout.
        overridden: stages whose arm the caller asked for; such requests don't count in reports.
        shadows: arms that are asked the same off the response path, by stage.
        popular: the holdout is answered with popular items, without asking any stage.
    """

    arms: Mapping[StageName, str]
    experiments: Mapping[StageName, str] = field(default_factory=dict)
    holdout: bool = False
    overridden: tuple[StageName, ...] = ()
    shadows: Mapping[StageName, tuple[str, ...]] = field(default_factory=dict)
    popular: bool = False
