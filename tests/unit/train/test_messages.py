"""What workers send one another survives the way, and nothing of it can run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train.learner_file import load_learner_state, save_learner_state
from train.messages import decode_message, encode_message


def test_values_come_back() -> None:
    value = {
        "metrics": {"ranking": {"ids": np.arange(3), "scores": np.ones((2, 2), np.float32)}},
        "offsets": ({"segment": [1, 2]}, [0, 5]),
        "rate": 0.25,
        "none": None,
        "nothing": np.empty((0, 7), np.float32),
    }
    back = decode_message(encode_message(value))
    assert back["offsets"] == [{"segment": [1, 2]}, [0, 5]]
    assert (back["rate"], back["none"]) == (0.25, None)
    assert back["nothing"].shape == (0, 7)
    ranking = back["metrics"]["ranking"]
    assert ranking["ids"].tolist() == [0, 1, 2]
    assert ranking["scores"].dtype == np.float32
    assert decode_message(encode_message(float("nan"))) != 0


@pytest.mark.parametrize("value", [object(), {1: 2}, {"__array__": "x"}, {"f": len}])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(TypeError):
        encode_message(value)


def test_an_optimiser_continues_where_it_was_saved(tmp_path) -> None:
    def steps(net: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            net(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    steps(net, optimizer, 3)
    weight = net.weight  # shares storage with an entry of the state below
    state = {
        "model": {**net.state_dict(), "tied": weight},
        "table": torch.zeros(4),
        "optimizer": optimizer.state_dict(),
    }
    save_learner_state(state, tmp_path / "x.safetensors")
    loaded = load_learner_state(tmp_path / "x.safetensors", slice(0, 3))
    again = torch.nn.Linear(3, 2)
    assert torch.equal(loaded["model"].pop("tied"), weight)
    again.load_state_dict(loaded["model"])
    optimizer_again = torch.optim.Adam(again.parameters(), lr=0.5)
    optimizer_again.load_state_dict(loaded["optimizer"])
    steps(net, optimizer, 2)
    steps(again, optimizer_again, 2)
    assert torch.equal(net.weight, again.weight)
