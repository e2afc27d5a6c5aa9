"""Ways to train that are not the default: what each changes in a learner, for ablations.

They are tried here rather than offered by `train`, which has what was found to help.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from benchmarks.paper.phases import PhaseClock, TimedLearner
from benchmarks.paper.trained_by import trained_by
from marm.attention import TargetAttention
from marm.batch_rows import BatchRows, KeySource, batch_rows
from marm.config import ModelConfig
from marm.inputs import ModelInputs
from marm.network import SequenceNetwork
from marm.stage_model import StepOutput
from train.collective import Collective
from train.config import TrainConfig

WARM_UP_STEPS = 100
LARGEST_GRADIENT = 1.0
"""Norm of the gradient of all dense parameters, of a mean loss."""
WRITER_DECAY = 0.99
"""Of the moving average that writes: it remembers about a hundred steps."""


def by_technique(name: str) -> Callable[[TrainConfig], TrainConfig]:
    """The change of a configuration that has it train by a technique.

    The change raises ValueError for a model in which the technique would change nothing.
    """

    def change(config: TrainConfig) -> TrainConfig:
        model = config.models[0]
        kind = TECHNIQUES[name]
        if kind in _OF_CACHED_ATTENTION and model.depth == model.error_layers:
            raise ValueError("the model has no attention over cached vectors")
        if kind is AveragedWriter and not model.depth:
            raise ValueError("the model writes no vectors")
        return trained_by(config, kind)

    return change


class ClippedLearner(TimedLearner):
    """No gradient of the dense half is longer than `LARGEST_GRADIENT`."""

    def __init__(
        self, model: ModelConfig, config: TrainConfig, collective: Collective, clock: PhaseClock
    ) -> None:
        super().__init__(model, config, collective, clock)
        self._optimizer.register_step_pre_hook(self._clip)

    def _clip(self, *_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.net.parameters(), LARGEST_GRADIENT)


class WarmedUpLearner(TimedLearner):
    """The dense half begins slowly: its rate rises evenly for `WARM_UP_STEPS`."""

    def __init__(
        self, model: ModelConfig, config: TrainConfig, collective: Collective, clock: PhaseClock
    ) -> None:
        super().__init__(model, config, collective, clock)
        self._schedule = torch.optim.lr_scheduler.LinearLR(
            self._optimizer, start_factor=1 / WARM_UP_STEPS, total_iters=WARM_UP_STEPS
        )

    def learn(self, labels_B: NDArray[np.float32], num_labels: int) -> None:
        """See `train.learner.Learner.learn`."""
        super().learn(labels_B, num_labels)
        self._schedule.step()


class UpperRateLearner(TimedLearner):
    """Layers of attention over cached vectors learn at `factor` times the dense rate."""

    factor = 1.0

    def __init__(
        self, model: ModelConfig, config: TrainConfig, collective: Collective, clock: PhaseClock
    ) -> None:
        super().__init__(model, config, collective, clock)
        upper = list(sequence_of(self).memory_augmented.attention.layers.parameters())
        chosen = {id(one) for one in upper}
        others = [one for one in self.model.net.parameters() if id(one) not in chosen]
        rate = config.dense_learning_rate
        groups: list[dict[str, Any]] = [
            {"params": others},
            {"params": upper, "lr": self.factor * rate},
        ]
        self._optimizer = torch.optim.Adam(groups, lr=rate)


class FastUpperLearner(UpperRateLearner):
    """Three times the rate."""

    factor = 3.0


class SlowUpperLearner(UpperRateLearner):
    """A third of the rate."""

    factor = 1 / 3


class ZeroUpperLearner(TimedLearner):
    """Layers of attention over cached vectors begin as the identity: what they add to a query is
    zero until it is learned."""

    def __init__(
        self, model: ModelConfig, config: TrainConfig, collective: Collective, clock: PhaseClock
    ) -> None:
        super().__init__(model, config, collective, clock)
        for layer in sequence_of(self).memory_augmented.attention.layers:
            assert isinstance(layer, TargetAttention)
            for last in (layer.output, layer.feed_forward[-1]):
                assert isinstance(last, torch.nn.Linear)
                torch.nn.init.zeros_(last.weight)
                torch.nn.init.zeros_(last.bias)


class VectorsAloneLearner(TimedLearner):
    """Layers over cached vectors see nothing of a row but its vector: no live item, no feedback."""

    def __init__(
        self, model: ModelConfig, config: TrainConfig, collective: Collective, clock: PhaseClock
    ) -> None:
        super().__init__(model, config, collective, clock)
        self._see_nothing_live()

    def learn(self, labels_B: NDArray[np.float32], num_labels: int) -> None:
        """See `train.learner.Learner.learn`."""
        super().learn(labels_B, num_labels)
        self._see_nothing_live()

    @torch.no_grad()
    def _see_nothing_live(self) -> None:
        for layer in sequence_of(self).memory_augmented.attention.layers:
            assert isinstance(layer, TargetAttention)
            layer.key_value.weight[:, -self.model.config.feature_dim :] = 0


class AveragedWriter(TimedLearner):
    """A moving average of the dense half writes the rows; the current one predicts and learns.

    Within a batch events see the rows of the current one, through which it learns.
    """

    def __init__(
        self, model: ModelConfig, config: TrainConfig, collective: Collective, clock: PhaseClock
    ) -> None:
        super().__init__(model, config, collective, clock)
        self._average = AveragedModel(self.model.net, avg_fn=_moving_average)

    def predict(
        self, inputs: ModelInputs, labels_B: NDArray[np.float32], memory_BLD: Tensor | None
    ) -> StepOutput:
        """See `train.learner.Learner.predict`."""
        output = super().predict(inputs, labels_B, memory_BLD)
        assert self._batch is not None
        embedded, _ = self._batch
        with self._clock.time("predict"), torch.no_grad(), self._autocast():
            written = self.model.training_forward(self._average, embedded, labels_B, memory_BLD)
        return replace(output, rows_BLD=written.rows_BLD)

    def learn(self, labels_B: NDArray[np.float32], num_labels: int) -> None:
        """See `train.learner.Learner.learn`."""
        super().learn(labels_B, num_labels)
        self._average.update_parameters(self.model.net)


class CutBatchGradient(TimedLearner):
    """Rows of the batch itself are read as stored ones are: nothing is learned through them."""

    def predict(
        self, inputs: ModelInputs, labels_B: NDArray[np.float32], memory_BLD: Tensor | None
    ) -> StepOutput:
        """See `train.learner.Learner.predict`."""
        with patch("marm.attention.batch_rows", lambda *of: _CutRows(batch_rows(*of))):
            return super().predict(inputs, labels_B, memory_BLD)


class RowsWithoutFeedback(TimedLearner):
    """The live features of rows do not say what became of them; stored errors do, and so does being
    a row where only long views are."""

    def __init__(
        self, model: ModelConfig, config: TrainConfig, collective: Collective, clock: PhaseClock
    ) -> None:
        super().__init__(model, config, collective, clock)
        sequence = sequence_of(self)
        for weight in (sequence.feedback_signal.weight, sequence.watch_bucket.weight):
            torch.nn.init.zeros_(weight)
            weight.requires_grad_(False)


@dataclass(frozen=True)
class _CutRows:
    """Rows of a batch whose cached vectors take no gradient."""

    of: BatchRows

    @property
    def source(self) -> KeySource:
        return self.of.source

    def rows(self, x_PX: Tensor) -> Tensor:
        return self.of.rows(x_PX.detach())


def _moving_average(average: Tensor, current: Tensor, _: Tensor | int) -> Tensor:
    return average.lerp(current, 1 - WRITER_DECAY)


def sequence_of(learner: TimedLearner) -> SequenceNetwork:
    """The network that reads a learner's rows."""
    sequence = learner.model.net.sequence
    assert isinstance(sequence, SequenceNetwork)
    return sequence


TECHNIQUES: dict[str, type[TimedLearner]] = {
    "clipping": ClippedLearner,
    "warm_up": WarmedUpLearner,
    "upper_lr_third": SlowUpperLearner,
    "upper_lr_triple": FastUpperLearner,
    "zero_upper": ZeroUpperLearner,
    "vectors_alone": VectorsAloneLearner,
    "averaged_writer": AveragedWriter,
    "cut_batch_gradient": CutBatchGradient,
    "no_feedback": RowsWithoutFeedback,
}
_OF_CACHED_ATTENTION = (
    SlowUpperLearner,
    FastUpperLearner,
    ZeroUpperLearner,
    VectorsAloneLearner,
    CutBatchGradient,
)
