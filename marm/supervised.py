"""Models that predict labels of (user, item) pairs: ranking and cascading."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from marm.items import ItemFeatures
from marm.memory import UserRows
from marm.network import Embedded, Prediction
from marm.pairwise import pairs_within_users
from marm.scoring_plan import ScoringPlan
from marm.search import layer_overlap
from marm.stage_model import Net, StageModel, StepOutput, check_single_user


class SupervisedModel(StageModel):
    """A dense half that maps (embedded inputs, item prior) to a `Prediction`."""

    def training_forward(
        self,
        net: Net,
        embedded: Embedded,
        labels_B: NDArray[np.float32],
        block_memory_BLD: Tensor | None = None,
    ) -> StepOutput:
        """See `StageModel.training_forward`."""
        prior = self.item_prior(self.item_slots(embedded.inputs))
        predicted = Prediction(*net(embedded, prior, block_memory_BLD))
        targets = self.targets(labels_B)
        predictions = (predicted.logits_BT, *predicted.corrected_BET.unbind(dim=1))
        loss = _auxiliary_loss(predicted.auxiliary_BA, self._lead(targets))
        for logits_BT in predictions:
            loss = loss + self.supervised_loss(logits_BT, targets)
        if self.config.pairwise_weight:
            order = self._order_loss(predictions, labels_B, embedded)
            loss = loss + self.config.pairwise_weight * order
        scores = self.probabilities(predicted.best.detach())
        return StepOutput(loss, scores, predicted.rows_BLD.detach())

    def _order_loss(
        self, predictions_BT: Sequence[Tensor], labels_B: NDArray[np.float32], embedded: Embedded
    ) -> Tensor:
        """Summed loss of each prediction of each binary task in the order of a user's events."""
        user_row_B = embedded.inputs.slab.user_row_B
        logits_BXT = torch.stack(tuple(predictions_BT), dim=1)
        loss = logits_BXT.new_zeros(())
        for at in np.flatnonzero(~self._is_regression):
            pairs = pairs_within_users(user_row_B, labels_B[:, self._task_columns[at]])
            loss = loss + pairs.loss(logits_BXT[:, :, at])
        return loss

    def _lead(self, targets_BT: Tensor) -> Tensor:
        """Targets ``[B, 1]`` of the task that auxiliary predictions are of."""
        positive = self.config.positive_task
        at = self.tasks.index(positive) if positive in self.tasks else 0
        return targets_BT[:, at : at + 1]

    @torch.inference_mode()
    def predict(
        self,
        rows: UserRows,
        user_id: int,
        candidates: ItemFeatures,
        now_ms: int,
        context_id: int,
    ) -> NDArray[np.float32]:
        """Predictions for all ``candidates`` in one pass over one copy of the user's rows,
        ``[M, T]``.

        Equal to scoring them one by one: candidates attend to the history, never to each other.

        Raises:
            ValueError: when ``rows`` is not of exactly this user.
        """
        check_single_user(rows, user_id)
        inputs = self.inputs.for_candidates(rows, candidates, now_ms, context_id)
        prior = self.item_prior(self.item_slots(inputs))
        predicted: Prediction = self.net(self.look_up(inputs), prior)
        return self.probabilities(predicted.best)

    def freeze(self, plan: ScoringPlan) -> None:
        """Predict with the amortised attention of ``plan`` from now on, with the weights as they
        are now. Training, and loading other weights, goes back to the plain one.

        Raises:
            ValueError: when the device cannot compute what the plan asks for.
        """
        self._sequence.freeze(plan)

    @torch.inference_mode()
    def layer_overlap(
        self,
        rows: UserRows,
        user_id: int,
        candidates: ItemFeatures,
        now_ms: int,
        context_id: int,
    ) -> NDArray[np.float32]:
        """Fig. 6: the Jaccard overlap of the rows that the layers' searches find, ``[L+1, L+1]``.

        Raises:
            ValueError: when ``rows`` is not of exactly this user, or the model is not frozen with
                a search.
        """
        check_single_user(rows, user_id)
        inputs = self.inputs.for_candidates(rows, candidates, now_ms, context_id)
        embedded = self.look_up(inputs)
        query = embedded.target_BF + embedded.context_BF
        sequence = self._sequence
        found = sequence.memory_augmented.search_rows(query, sequence.history(embedded))
        return layer_overlap(found, embedded.slab_UNF.shape[1]).cpu().numpy()


def _auxiliary_loss(logits_BA: Tensor, targets_B1: Tensor) -> Tensor:
    """Summed BCE of auxiliary predictions of one task, over observed labels."""
    observed = ~targets_B1.isnan()
    target = torch.where(observed, targets_B1, torch.zeros_like(targets_B1)).clamp(0.0, 1.0)
    loss = nn.functional.binary_cross_entropy_with_logits(
        logits_BA, target.expand_as(logits_BA), reduction="none"
    )
    return (loss * observed).sum()
