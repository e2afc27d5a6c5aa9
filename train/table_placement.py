"""Which worker holds which rows of the embedding tables, and how a step reaches all of them.

`ReplicatedTables`, the default, are here: every worker holds every row, and all apply the gradients
of all, so that they stay equal. `train.sharded_placement` has the tables whose rows are spread over
the workers; it needs an extra and is imported when a run asks for it.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from marm.config import ModelConfig
from marm.model_factory import Model, build_model
from marm.sparse import SparseRows, SparseTable
from train.collective import Collective
from train.config import TrainConfig

_SHARDED_MODULE = "train.sharded_placement"
_SHARDED_NEEDS = ("torchrec", "fbgemm_gpu")


class MissingExtraError(RuntimeError):
    """Sharded tables were asked for and what they need is not installed; says what to do."""


@dataclass(frozen=True)
class WholeWeights:
    """All weights of a model, wherever their rows are."""

    weights: dict[str, Tensor]  # as of `nn.Module.state_dict` of the plain model
    squared_gradient: Tensor  # of the rows of its table


class TablePlacement(ABC):
    """What a learner leaves to how its table is held. All workers make every call, in step."""

    def __init__(self, config: TrainConfig, collective: Collective) -> None:
        self._config, self._collective = config, collective
        self._device = torch.device(config.device)

    @abstractmethod
    def build(self, model: ModelConfig) -> Model:
        """A freshly initialised model, with the same values for one state of torch's generator."""

    @abstractmethod
    def update(self, table: SparseTable, rows: SparseRows) -> None:
        """Row-wise Adagrad with the gradients that all workers collected; ``rows`` is what this one
        looked up."""

    @abstractmethod
    def held_rows(self, table: SparseTable) -> slice:
        """The rows of the whole table that this worker holds."""

    @abstractmethod
    def whole_weights(self, model: Model) -> WholeWeights | None:
        """Weights as a checkpoint has them, on worker 0; None elsewhere."""

    @abstractmethod
    def whole_model(self, model: Model) -> Model | None:
        """A model that answers without the other workers, on worker 0; None elsewhere."""


class ReplicatedTables(TablePlacement):
    """Every row on every worker."""

    def build(self, model: ModelConfig) -> Model:
        """See `TablePlacement.build`."""
        return build_model(model).to(self._device)

    def update(self, table: SparseTable, rows: SparseRows) -> None:
        """See `TablePlacement.update`."""
        slots, gradient = gradient_of_all(rows, self._collective)
        table.apply_gradient(slots, gradient, self._config.sparse_learning_rate)

    def held_rows(self, table: SparseTable) -> slice:
        """See `TablePlacement.held_rows`."""
        return slice(0, len(table.weight))

    def whole_weights(self, model: Model) -> WholeWeights | None:
        """See `TablePlacement.whole_weights`."""
        if self._collective.rank != 0:
            return None
        return WholeWeights(model.state_dict(), model.table.squared_gradient)

    def whole_model(self, model: Model) -> Model | None:
        """See `TablePlacement.whole_model`."""
        return model if self._collective.rank == 0 else None


def gradient_of_all(rows: SparseRows, collective: Collective) -> tuple[Tensor, Tensor]:
    """Distinct rows that workers looked up in a table that each of them holds whole, and the mean
    over the workers of what they collected."""
    slots, gradient = rows.slots, gradient_of(rows)
    if collective.world_size == 1:
        return slots, gradient
    slots = collective.concat(slots)
    gradient = collective.concat(gradient) / collective.world_size
    slots, row = torch.unique(slots, return_inverse=True)
    summed = gradient.new_zeros(len(slots), gradient.shape[1]).index_add_(0, row, gradient)
    return slots, summed


def gradient_of(rows: SparseRows) -> Tensor:
    """What ``rows`` collected ``[R, F]``; zeros where nothing depended on them."""
    gradient = rows.values.grad
    return torch.zeros_like(rows.values) if gradient is None else gradient


def require_placement(config: TrainConfig) -> None:
    """Refuse tables that this installation can't hold, before anything is started.

    Raises:
        MissingExtraError: with what to install.
    """
    if config.tables != "sharded":
        return
    missing = [name for name in _SHARDED_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(_advice(f"cannot find {' and '.join(missing)}"))


def table_placement(config: TrainConfig, collective: Collective) -> TablePlacement:
    """The placement that ``config`` asks for.

    Raises:
        MissingExtraError: with what to install.
    """
    if config.tables != "sharded":
        return ReplicatedTables(config, collective)
    try:
        module = importlib.import_module(_SHARDED_MODULE)
    except ImportError as error:
        raise MissingExtraError(_advice(str(error))) from error
    placement: TablePlacement = module.ShardedTables(config, collective)
    return placement


def _advice(problem: str) -> str:
    return (
        f"tables 'sharded' need torchrec and fbgemm: {problem}; install them with `make sharded`, "
        "or `pip install 'marm[sharded]'` and then `pip install --no-deps torchrec==1.8.0 "
        "fbgemm-gpu-cpu==1.8.0`, or train with tables 'replicated'"
    )
