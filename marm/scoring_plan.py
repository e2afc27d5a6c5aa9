"""How a loaded model scores: at which precision, and from which rows."""

from __future__ import annotations

from dataclasses import dataclass

from marm.precision import PRECISIONS
from marm.search import RowSearch


@dataclass(frozen=True)
class ScoringPlan:
    """Chosen when a model is loaded; weights and memory are the same whatever it says.

    Attributes:
        precision: ``fp32``; ``bf16``, refused where the device is no faster with it; or ``auto``,
            the faster one. Served and offline scores agree within 1e-4 in fp32 only.
        search: the rows each candidate attends to (Section 2.2). None: as in training, all of them
            or those that the model's own search finds. Another search may serve, but then scores
            are others than those of training.
    """

    precision: str = "fp32"
    search: RowSearch | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")
