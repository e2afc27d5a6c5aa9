"""From a configuration to a method of modelling interest."""

from __future__ import annotations

from collections.abc import Callable

from marm.config import InterestConfig, ModelConfig
from marm.interest.interface import Interest
from marm.interest.memory_augmented import MemoryAugmented

_METHODS: dict[str, Callable[[ModelConfig, InterestConfig], Interest]] = {
    "marm": lambda model, _: MemoryAugmented(model),
}


def build_interest(model: ModelConfig, interest: InterestConfig) -> Interest:
    """A freshly initialised method."""
    return _METHODS[interest.method](model, interest)
