"""From a configuration to a model."""

from __future__ import annotations

import torch

from marm.cascader import Cascader
from marm.config import ModelConfig
from marm.ranker import Ranker
from marm.retriever import Retriever
from marm.sparse import SparseTable

Model = Ranker | Cascader | Retriever

_MODELS: dict[str, type[Ranker] | type[Cascader] | type[Retriever]] = {
    "ranking": Ranker,
    "cascading": Cascader,
    "retrieval": Retriever,
}

_TRAINERS_BUFFERS = frozenset({"squared_gradient"})
"""Unsaved buffers that only training reads, and that begin as zeros."""


def build_model(config: ModelConfig, table: SparseTable | None = None) -> Model:
    """A freshly initialised model of ``config.stage``, on ``table`` instead of one of its own."""
    return _MODELS[config.stage](config, table)


def build_unfilled(config: ModelConfig) -> Model:
    """The same without values, for weights that come from elsewhere: nothing is drawn at random.

    Parameters and saved buffers are on torch's meta device until
    ``load_state_dict(weights, assign=True)``; buffers of the trainer's, which are not saved, are
    zeros.

    Raises:
        RuntimeError: when the model has other buffers that are not saved: their values are unknown.
    """
    with torch.device("meta"):
        model = build_model(config)
    saved = model.state_dict()
    for full_name, buffer in list(model.named_buffers()):
        if full_name in saved:
            continue
        path, _, name = full_name.rpartition(".")
        if name not in _TRAINERS_BUFFERS:
            raise RuntimeError(
                f"buffer {full_name} is not saved, so that its values are unknown; save it, or if "
                "it is only the trainer's and begins as zeros, name it in _TRAINERS_BUFFERS"
            )
        zeros = torch.zeros_like(buffer, device="cpu")
        model.get_submodule(path).register_buffer(name, zeros, persistent=False)
    return model
