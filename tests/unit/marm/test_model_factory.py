"""Models without values, for weights that come from elsewhere."""

from __future__ import annotations

import pytest
import torch
from serving_models import small_config

from marm.model_factory import build_model, build_unfilled


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
