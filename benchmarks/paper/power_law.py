"""Fits of a figure of merit against size, with the error of every parameter (Fig. 5c)."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import OptimizeWarning, curve_fit


@dataclass(frozen=True)
class Parameter:
    """A fitted number and its standard error; the error is NaN where points just suffice."""

    value: float
    error: float


@dataclass(frozen=True)
class Fit:
    """A law with its parameters, by name, and how well it describes the points."""

    law: Law
    parameters: dict[str, Parameter]
    rmse: float  # in units of the figure
    r_squared: float

    def at(self, size: ArrayLike) -> NDArray[np.float64]:
        """What the law says of ``size``."""
        values = [parameter.value for parameter in self.parameters.values()]
        return self.law.value(np.asarray(size, np.float64), *values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an unknown error is null."""
        return {
            "formula": self.law.formula,
            "parameters": {
                name: {
                    "value": float(f"{one.value:.6g}"),
                    "error": float(f"{one.error:.3g}") if math.isfinite(one.error) else None,
                }
                for name, one in self.parameters.items()
            },
            "rmse": float(f"{self.rmse:.3g}"),
            "r_squared": float(f"{self.r_squared:.4g}"),
        }

    def __str__(self) -> str:
        values = ", ".join(
            f"{name} = {one.value:.4g} ± {one.error:.2g}" for name, one in self.parameters.items()
        )
        return f"{self.law.formula}: {values}; rmse {self.rmse:.2g}, R² {self.r_squared:.3f}"


class Law(ABC):
    """A family of curves."""

    formula: str
    names: tuple[str, ...]

    @abstractmethod
    def value(self, size: NDArray[np.float64], *parameters: float) -> NDArray[np.float64]:
        """The curve at ``size``."""

    def is_possible(self, *parameters: float) -> bool:
        """Whether a share such as GAUC can follow this curve; a search that ends elsewhere has
        found nothing."""
        return True

    @abstractmethod
    def first_guess(
        self, size: NDArray[np.float64], figure: NDArray[np.float64]
    ) -> tuple[float, ...]:
        """Where the search for parameters begins."""


class PowerLaw(Law):
    """A straight line in logarithms: what the paper draws against the cache size C."""

    formula = "a * C^b"
    names = ("a", "b")

    def value(self, size: NDArray[np.float64], *parameters: float) -> NDArray[np.float64]:
        """See `Law.value`."""
        a, b = parameters
        return a * size**b

    def first_guess(
        self, size: NDArray[np.float64], figure: NDArray[np.float64]
    ) -> tuple[float, ...]:
        """The line through the logarithms."""
        slope, intercept = np.polyfit(np.log(size), np.log(figure), 1)
        return float(np.exp(intercept)), float(slope)


class SaturatingPowerLaw(Law):
    """A power law of what is missing to a limit: a figure below 1 can't grow for ever."""

    formula = "limit - a * C^-b"
    names = ("limit", "a", "b")

    def value(self, size: NDArray[np.float64], *parameters: float) -> NDArray[np.float64]:
        """See `Law.value`."""
        limit, a, b = parameters
        return limit - a * size**-b

    def is_possible(self, *parameters: float) -> bool:
        """See `Law.is_possible`: a share has a limit above 0, at most 1, and grows towards it."""
        limit, a, b = parameters
        return 0 < limit <= 1 and a > 0 and b > 0

    def first_guess(
        self, size: NDArray[np.float64], figure: NDArray[np.float64]
    ) -> tuple[float, ...]:
        """A limit a little above what was reached, and a square root."""
        reach = float(figure.max() - figure.min()) or 1e-3
        return float(figure.max()) + reach / 2, reach * float(size.min()) ** 0.5, 0.5


def fit_law(law: Law, size: Sequence[float], figure: Sequence[float]) -> Fit | None:
    """Least squares; None when the points do not determine the parameters.

    Raises:
        ValueError: when sizes or figures are not positive.
    """
    x, y = np.asarray(size, np.float64), np.asarray(figure, np.float64)
    if x.shape != y.shape or not ((x > 0).all() and (y > 0).all()):
        raise ValueError("a power law needs as many sizes as figures, all of them positive")
    if len(np.unique(x)) < len(law.names):
        return None
    try:
        with warnings.catch_warnings():
            # Points that just suffice leave no error to estimate: parameters are still known.
            warnings.simplefilter("ignore", OptimizeWarning)
            warnings.simplefilter("ignore", RuntimeWarning)
            found, covariance = curve_fit(law.value, x, y, p0=law.first_guess(x, y), maxfev=20_000)
    except RuntimeError:  # no convergence
        return None
    if not law.is_possible(*found):
        return None
    errors = np.sqrt(np.diag(covariance))
    parameters = {
        name: Parameter(float(value), float(error) if np.isfinite(error) else math.nan)
        for name, value, error in zip(law.names, found, errors, strict=True)
    }
    residual = y - law.value(x, *found)
    spread = float(((y - y.mean()) ** 2).sum())
    r_squared = 1 - float((residual**2).sum()) / spread if spread > 0 else math.nan
    return Fit(law, parameters, float(np.sqrt((residual**2).mean())), r_squared)
