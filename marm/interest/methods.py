"""From a configuration to a method of modelling interest."""

from __future__ import annotations

from collections.abc import Callable

from marm.config import InterestConfig, ModelConfig
from marm.interest.decoder import Decoder
from marm.interest.din import Din
from marm.interest.hstu import Hstu
from marm.interest.interface import Interest
from marm.interest.memory_augmented import MemoryAugmented
from marm.interest.sim import SimHard, SimSoft
from marm.interest.stca import StackedTargetAttention
from marm.interest.sum_pooling import SumPooling
from marm.interest.twin import Twin
from marm.interest.twin_v2 import TwinV2
from marm.search import AllRows, TopRows

_METHODS: dict[str, Callable[[ModelConfig, InterestConfig], Interest]] = {
    "marm": lambda model, _: MemoryAugmented(model, AllRows()),
    "marm_sim": lambda model, interest: MemoryAugmented(model, TopRows(interest.top_k)),
    "sum_pooling": lambda model, _: SumPooling(model),
    "din": lambda model, _: Din(model),
    "sim_soft": SimSoft,
    "sim_hard": SimHard,
    "twin": Twin,
    "twin_v2": TwinV2,
    "stca": StackedTargetAttention,
    "hstu": Hstu,
    "decoder": Decoder,
}


def build_interest(model: ModelConfig, interest: InterestConfig) -> Interest:
    """A freshly initialised method."""
    return _METHODS[interest.method](model, interest)
