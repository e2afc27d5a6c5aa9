"""A learner's state as one safetensors file: weights, table statistics and optimiser.

Adam keeps a dict of tensors per parameter and plain settings per group; tensors go under
``optimizer/<parameter>/<name>``, settings as JSON into the file's metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

_MODEL, _OPTIMIZER, _TABLE = "model/", "optimizer/", "table"
_OF_ROWS = (_TABLE, f"{_MODEL}table.weight")
_GROUPS = "optimizer_groups"


def save_learner_state(state: dict[str, Any], path: Path) -> None:
    """Write `Learner.state` to ``path``."""
    tensors = {f"{_MODEL}{name}": tensor for name, tensor in state["model"].items()}
    tensors[_TABLE] = state["table"]
    for parameter, values in state["optimizer"]["state"].items():
        for name, value in values.items():
            tensors[f"{_OPTIMIZER}{parameter}/{name}"] = torch.as_tensor(value)
    # A clone each: tensors that share storage can't be written.
    copies = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    metadata = {_GROUPS: json.dumps(state["optimizer"]["param_groups"])}
    safetensors.torch.save_file(copies, str(path), metadata)


def load_learner_state(path: Path, held_rows: slice) -> dict[str, Any]:
    """What `save_learner_state` wrote, on the CPU, with the ``held_rows`` of its table;
    `Learner.load_state` moves it."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        groups = json.loads(file.metadata()[_GROUPS])
        names = file.keys()
        tensors = {
            name: file.get_slice(name)[held_rows] if name in _OF_ROWS else file.get_tensor(name)
            for name in names
        }
    by_parameter: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(_OPTIMIZER):
            _, parameter, value = name.split("/")
            by_parameter.setdefault(int(parameter), {})[value] = tensor
    model = {
        name.removeprefix(_MODEL): tensor
        for name, tensor in tensors.items()
        if name.startswith(_MODEL)
    }
    optimizer = {"state": by_parameter, "param_groups": groups}
    return {"model": model, "table": tensors[_TABLE], "optimizer": optimizer}
