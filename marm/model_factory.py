"""From a configuration to a model."""

from __future__ import annotations

from marm.cascader import Cascader
from marm.config import ModelConfig
from marm.ranker import Ranker
from marm.retriever import Retriever

Model = Ranker | Cascader | Retriever

_MODELS: dict[str, type[Ranker] | type[Cascader] | type[Retriever]] = {
    "ranking": Ranker,
    "cascading": Cascader,
    "retrieval": Retriever,
}


def build_model(config: ModelConfig) -> Model:
    """A freshly initialised model of ``config.stage``."""
    return _MODELS[config.stage](config)
