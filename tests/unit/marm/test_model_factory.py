"""Models without values, for weights that come from elsewhere."""

from __future__ import annotations

import pytest
import torch
from serving_models import small_config

from marm import model_factory
from marm.model_factory import build_model, build_unfilled
from marm.ranker import Ranker


@pytest.mark.parametrize("stage", ["retrieval", "cascading", "ranking"])
def test_an_unfilled_model_is_the_same_once_it_has_the_weights(stage):
    config = small_config(stage)
    model, empty = build_model(config), build_unfilled(config)
    state = model.state_dict()
    assert {name: x.shape for name, x in empty.state_dict().items()} == {
        name: x.shape for name, x in state.items()
    }
    assert all(x.is_meta for x in empty.state_dict().values())
    empty.load_state_dict(state, assign=True)
    for (name, full), (other, filled) in zip(
        [*model.named_parameters(), *model.named_buffers()],
        [*empty.named_parameters(), *empty.named_buffers()],
        strict=True,
    ):
        assert name == other
        assert torch.equal(full, filled), name


class WithUnsavedBuffer(Ranker):
    """A model whose scores would need what a checkpoint doesn't have."""

    def __init__(self, config, table=None):
        super().__init__(config, table)
        self.register_buffer("unsaved", torch.ones(3), persistent=False)


def test_an_unsaved_buffer_that_is_not_the_trainers_is_refused(monkeypatch):
    monkeypatch.setitem(model_factory._MODELS, "ranking", WithUnsavedBuffer)
    with pytest.raises(RuntimeError, match="buffer unsaved is not saved"):
        build_unfilled(small_config("ranking"))
