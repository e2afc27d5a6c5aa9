"""The home directory of a deployment: where its log, models, memory and runs live."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    """One deployment's directory. Every process of the deployment is given the same path."""

    path: Path

    def __post_init__(self) -> None:
        # Actors are named after the home, so two spellings of one path must be one value.
        object.__setattr__(self, "path", Path(self.path).expanduser().resolve())

    @property
    def log(self) -> Path:
        """Events and items: the truth from which everything else can be recomputed."""
        return self.path / "log"

    @property
    def models(self) -> Path:
        """Published model versions."""
        return self.path / "models"

    @property
    def memory(self) -> Path:
        """Stored memory rows, by pool epoch and shard."""
        return self.path / "memory"

    @property
    def exposures(self) -> Path:
        """What was shown to whom, by which arms and model versions."""
        return self.path / "exposures"

    @property
    def runs(self) -> Path:
        """Checkpoints and reports of training runs."""
        return self.path / "runs"

    def create(self) -> Home:
        """Make the directories that are missing; safe to call again and from several processes."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(
                f"home must be a directory, but {self.path} is a file; choose another path"
            )
        for directory in (self.log, self.models, self.memory, self.exposures, self.runs):
            directory.mkdir(parents=True, exist_ok=True)
        return self
