"""One model and the state of its optimisers: predict first, then learn."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marm.config import ModelConfig
from marm.inputs import ModelInputs
from marm.model_factory import Model
from marm.network import Embedded
from marm.stage_model import StepOutput
from train.collective import Collective
from train.config import TrainConfig
from train.table_placement import gradient_of_all, table_placement


class Learner:
    """Trains one stage's model on micro-batches, alone or with other workers.

    Dense parameters are averaged by DDP and updated by Adam. Item statistics are exchanged and
    updated alike on every worker, so all replicas stay equal, and so are table rows, unless they
    are spread over the workers (`train.table_placement`).
    """

    def __init__(self, model: ModelConfig, config: TrainConfig, collective: Collective) -> None:
        torch.manual_seed(config.seed)
        self.device = torch.device(config.device)
        self._tables = table_placement(config, collective)
        self.model = self._tables.build(model)
        self._config, self._collective = config, collective
        self._net = collective.wrap(self.model.net)
        self._optimizer = torch.optim.Adam(
            self.model.net.parameters(), lr=config.dense_learning_rate
        )
        self._batch: tuple[Embedded, StepOutput] | None = None

    @property
    def stage(self) -> str:
        """The stage of the model."""
        return self.model.config.stage

    def predict(
        self, inputs: ModelInputs, labels_B: NDArray[np.float32], memory_BLD: Tensor | None
    ) -> StepOutput:
        """Forward pass on a batch with the weights before it (test-then-train)."""
        embedded = self.model.embed(inputs)
        with self._autocast():
            output = self.model.training_forward(self._net, embedded, labels_B, memory_BLD)
        self._batch = embedded, output
        return output

    def learn(self, labels_B: NDArray[np.float32], num_labels: int) -> None:
        """Update everything from the last `predict`; ``num_labels`` is the sum over workers."""
        assert self._batch is not None, "learn() follows predict()"
        (embedded, output), self._batch = self._batch, None
        # DDP averages over workers; the loss is a mean over the labels of all workers.
        scale = self._collective.world_size / max(1, num_labels)
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(output.loss_sum * scale)
        self._optimizer.step()
        self._tables.update(self.model.table, embedded.sparse)
        for of in self.model.learning_rows(embedded):
            touched, gradient = gradient_of_all(of.rows, self._collective)
            of.table.apply_gradient(
                touched, gradient * num_labels, self._config.error_learning_rate
            )
        slots = self._collective.concat(self.model.item_slots(embedded.inputs))
        targets = self._collective.concat(self.model.targets(labels_B))
        self.model.stats.update(slots, targets)
        own = event_addresses(embedded.inputs)
        self.model.table.observe(lambda: self._collective.concat(own.to(self.device)))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._config.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    @property
    def held_rows(self) -> slice:
        """The rows of the whole table that this worker holds."""
        return self._tables.held_rows(self.model.table)

    def whole_model(self) -> Model | None:
        """A model that answers without the other workers, on worker 0; None elsewhere. All workers
        call it."""
        return self._tables.whole_model(self.model)

    def state(self) -> dict[str, Any] | None:
        """Everything needed to continue exactly: weights, statistics, optimiser state; on worker 0,
        None elsewhere. All workers call it."""
        whole = self._tables.whole_weights(self.model)
        if whole is None:
            return None
        return {
            "model": whole.weights,
            "table": whole.squared_gradient,
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`, of whose table only the `held_rows` are there."""
        self.model.load_state_dict(state["model"])
        self.model.table.squared_gradient.copy_(state["table"])
        self._optimizer.load_state_dict(state["optimizer"])


def event_addresses(inputs: ModelInputs) -> Tensor:
    """Addresses ``[B, K]`` of everything each event has: its item's features, user and context.

    The rows of histories are not among them: an id is in use when it is in an event.
    """
    of_events = np.stack([inputs.user_slots_B, inputs.context_slots_B], axis=1)
    return torch.from_numpy(np.concatenate([inputs.target_slots_BK, of_events], axis=1))
