"""From a configuration to a model."""

from __future__ import annotations

import torch

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


def build_unfilled(config: ModelConfig) -> Model:
    """The same without values, for weights that come from elsewhere: nothing is drawn at random.

    Parameters and saved buffers are on torch's meta device until
    ``load_state_dict(weights, assign=True)``; buffers that are not saved are zeros.
    """
    with torch.device("meta"):
        model = build_model(config)
    saved = set(model.state_dict())
    for path, module in model.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if (f"{path}.{name}" if path else name) not in saved:
                zeros = torch.zeros_like(buffer, device="cpu")
                module.register_buffer(name, zeros, persistent=False)
    return model
