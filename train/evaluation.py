"""What a run achieved, over all of its workers."""

from __future__ import annotations

from train.agreement import agreement
from train.collective import Collective
from train.predictions import Figures, Predictions
from train.stream import StreamTrainer


def evaluate(trainer: StreamTrainer) -> dict[str, Figures]:
    """Figures of the evaluated part of the log by stage and task, on worker 0; all workers call it.

    Beside the figures of `Predictions.summarize`, the positive task of cascading has those of
    `train.agreement` with ranking, and that of retrieval those of `train.retrieval_metrics`.
    """
    merged = _merged(trainer.metrics.evaluation, trainer.collective)
    found = trainer.retrieval_metrics.figures() if trainer.retrieval_metrics is not None else {}
    if trainer.collective.rank != 0:
        return {}
    evaluation = {stage: part.summarize() for stage, part in merged.items() if len(part)}
    if "ranking" in evaluation and "cascading" in evaluation:
        (task,) = merged["cascading"].tasks
        agreed = agreement(merged["ranking"], merged["cascading"], task)
        evaluation["cascading"].setdefault(task, {}).update(agreed)
    if trainer.retrieval_metrics is not None and found:
        evaluation["retrieval"].setdefault(trainer.retrieval_metrics.task, {}).update(found)
    return evaluation


def _merged(parts: dict[str, Predictions], collective: Collective) -> dict[str, Predictions]:
    """The predictions of all workers, those of one after those of the other."""
    merged = {stage: Predictions(own.tasks) for stage, own in parts.items()}
    for arrays in collective.gather({stage: own.arrays() for stage, own in parts.items()}):
        for stage, together in merged.items():
            together.extend(Predictions.from_arrays(together.tasks, arrays[stage]))
    return merged
