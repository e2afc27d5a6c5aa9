"""How far stored rows are from fresh ones: measured row by row, summed up by layer and age."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.memory import RAW_STEP

STEP_EDGES = (0, 1, 10, 100, 1_000, 10_000, 100_000)
"""Ages in steps at which a new class begins; rows newer than the version come before the first."""

SECOND_EDGES = (0, 60, 600, 3_600, 21_600, 86_400, 604_800)
"""Ages in seconds at which a new class begins: a minute, ten, an hour, six, a day, a week."""

_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class RowErrors:
    """``R`` stored rows beside fresh ones; ``error`` and ``cosine`` are ``[R, L]``."""

    written_step: NDArray[np.int32]
    written_s: NDArray[np.uint32]
    error: NDArray[np.float32]  # |stored - fresh| / |fresh|
    cosine: NDArray[np.float32]

    def take(self, index: NDArray) -> RowErrors:
        """The rows at ``index`` (integers or a mask)."""
        return RowErrors(
            self.written_step[index], self.written_s[index], self.error[index], self.cosine[index]
        )

    @staticmethod
    def concat(parts: list[RowErrors], num_layers: int) -> RowErrors:
        """All rows of ``parts``."""
        none = np.empty((0, num_layers), np.float32)
        return RowErrors(
            np.concatenate([np.empty(0, np.int32), *(part.written_step for part in parts)]),
            np.concatenate([np.empty(0, np.uint32), *(part.written_s for part in parts)]),
            np.concatenate([none, *(part.error for part in parts)]),
            np.concatenate([none, *(part.cosine for part in parts)]),
        )


def compare_rows(stored: NDArray[np.void], fresh: NDArray[np.void]) -> RowErrors:
    """Errors of memorised rows against fresh ones of the same events."""
    old = stored["memory"].astype(np.float32)
    new = fresh["memory"].astype(np.float32)
    norm_old, norm_new = np.linalg.norm(old, axis=-1), np.linalg.norm(new, axis=-1)
    distance = np.linalg.norm(old - new, axis=-1)
    both = np.maximum(norm_old * norm_new, _SMALLEST_NORM)
    return RowErrors(
        stored["written_step"],
        stored["written_s"],
        (distance / np.maximum(norm_new, _SMALLEST_NORM)).astype(np.float32),
        np.clip((old * new).sum(axis=-1) / both, -1.0, 1.0).astype(np.float32),
    )


@dataclass(frozen=True)
class LayerErrors:
    """One layer's errors over some rows."""

    layer: int  # from 1, as in y_1..y_L
    error_mean: float
    error_p50: float
    error_p95: float
    cosine_mean: float
    cosine_p05: float


@dataclass(frozen=True)
class AgeClass:
    """Rows of one age: from ``at_least`` to below ``below`` steps or seconds (None: unbounded)."""

    at_least: int | None
    below: int | None
    rows: int
    layers: tuple[LayerErrors, ...]


def summarize(errors: RowErrors) -> tuple[LayerErrors, ...]:
    """Errors of each layer over all rows; none where there are no rows."""
    if not len(errors.error):
        return ()
    return tuple(
        LayerErrors(layer + 1, *_moments(errors.error[:, layer], errors.cosine[:, layer]))
        for layer in range(errors.error.shape[1])
    )


def by_steps(errors: RowErrors, step: int) -> tuple[AgeClass, ...]:
    """Errors by how many steps before ``step`` the rows were computed; empty classes are left
    out."""
    return tuple(_classes(errors, step - errors.written_step.astype(np.int64), STEP_EDGES))


def by_seconds(errors: RowErrors, now_s: int) -> tuple[AgeClass, ...]:
    """Errors by how many seconds before ``now_s`` the rows were computed; empty classes are left
    out. Rows of the future (another machine's clock) count as of now."""
    age_s = np.maximum(now_s - errors.written_s.astype(np.int64), 0)
    return tuple(_classes(errors, age_s, SECOND_EDGES))


def is_memorised(rows: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which rows have a memory to compare; the others are raw."""
    memorised: NDArray[np.bool_] = rows["written_step"] != RAW_STEP
    return memorised


def _classes(
    errors: RowErrors, age: NDArray[np.int64], edges: tuple[int, ...]
) -> Iterator[AgeClass]:
    bounds = (None, *edges, None)
    classes = np.searchsorted(np.array(edges), age, side="right")
    for number in np.unique(classes).tolist():
        part = errors.take(classes == number)
        yield AgeClass(bounds[number], bounds[number + 1], len(part.error), summarize(part))


def _moments(error: NDArray[np.float32], cosine: NDArray[np.float32]) -> tuple[float, ...]:
    return (
        float(error.mean(dtype=np.float64)),
        float(np.quantile(error, 0.5)),
        float(np.quantile(error, 0.95)),
        float(cosine.mean(dtype=np.float64)),
        float(np.quantile(cosine, 0.05)),
    )
