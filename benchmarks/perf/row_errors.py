"""How far one reading of a batch is from another: layer by layer, and in what is predicted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from marm.attention import TargetAttention
from marm.events import TASKS, EventBatch
from marm.memory import UserRows
from marm.metrics import gauc
from marm.ranker import RankerNet
from train.learner import Learner


@dataclass(frozen=True)
class Reading:
    """What a model made of a batch."""

    attention: list[torch.Tensor]  # of each layer, before the residual
    outputs: list[torch.Tensor]  # y_1..y_{L+1}
    probabilities: NDArray[np.float32]  # [B, T]
    rows_BLD: NDArray[np.float32]


class FrozenModel:
    """Reads batches with the weights of a learner and learns nothing."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._attention: list[torch.Tensor] = []
        self._outputs: list[torch.Tensor] = []
        net = learner.model.net
        assert isinstance(net, RankerNet), f"expected a ranking model, got {learner.stage}"
        layers = net.sequence.memory_augmented.attention
        layers.register_forward_hook(lambda *call: self._outputs.extend(call[-1]))
        for layer in layers.modules():
            if isinstance(layer, TargetAttention):
                layer.output.register_forward_hook(lambda *call: self._attention.append(call[-1]))

    def read(self, events: EventBatch, rows: UserRows) -> Reading:
        self._attention.clear()
        self._outputs.clear()
        with torch.no_grad():
            inputs = self._learner.model.inputs.for_training(events, rows)
            output = self._learner.predict(inputs, events.labels, None)
        return Reading(
            list(self._attention),
            list(self._outputs),
            output.scores_BT,
            output.rows_BLD.numpy(),
        )


class Difference:
    """Sums of the differences of many batches."""

    def __init__(self, tasks: tuple[str, ...], task: str) -> None:
        self._column = tasks.index(task)
        self._label = TASKS.index(task)
        self._squares: dict[str, NDArray[np.float64]] = {}  # [2, layers]: of errors, of values
        self._changes: list[NDArray[np.float32]] = []
        self._scored: list[tuple[NDArray, NDArray, NDArray, NDArray]] = []

    def add(
        self, events: EventBatch, kept: NDArray[np.bool_], exact: Reading, other: Reading
    ) -> None:
        """Add the ``kept`` events of a batch."""
        pairs = {
            "attention": (exact.attention, other.attention),
            "output": (exact.outputs, other.outputs),
        }
        for name, (right, got) in pairs.items():
            squares = np.array(
                [
                    [
                        float((b[kept] - a[kept]).double().square().sum())
                        for a, b in zip(right, got, strict=True)
                    ],
                    [float(a[kept].double().square().sum()) for a in right],
                ]
            )
            self._squares[name] = self._squares.get(name, 0) + squares
        before, after = exact.probabilities[kept], other.probabilities[kept]
        self._changes.append(np.abs(after - before))
        labels = events.labels[kept, self._label]
        self._scored.append(
            (events.user_id[kept], labels, before[:, self._column], after[:, self._column])
        )

    def figures(self) -> dict[str, float]:
        """Relative L2 error per layer, changes of probabilities and of GAUC."""
        found = {
            f"{name}_error.layer_{layer}": float(value)
            for name, squares in self._squares.items()
            for layer, value in enumerate(np.sqrt(squares[0] / squares[1]), start=1)
        }
        changes = np.concatenate(self._changes)
        users, labels, before, after = (
            np.concatenate(part) for part in zip(*self._scored, strict=True)
        )
        found["probability_change.mean"] = float(changes.mean())
        found["probability_change.max"] = float(changes.max())
        found["gauc_change"] = gauc(users, labels, after) - gauc(users, labels, before)
        return found
