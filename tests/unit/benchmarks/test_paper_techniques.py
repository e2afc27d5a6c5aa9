"""Ways to train for ablations: each changes what it says, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_up_trials import make_dataset, small_config
from sample_events import fetch_for, replaced
from torch import Tensor

from benchmarks.paper import techniques
from benchmarks.paper.ablations import choose
from benchmarks.paper.phases import PhaseClock, TimedLearner
from benchmarks.paper.plan import CommonSettings
from benchmarks.paper.techniques import TECHNIQUES, by_technique, sequence_of
from benchmarks.paper.trained_by import build_learner
from benchmarks.paper.trial import run_pass, run_trial
from benchmarks.paper.trial_cache import TrialCache
from marm.memory import InProcessMemory
from marm.stage_model import StepOutput

COMMON = CommonSettings(history_length=8, dim=8, batch_size=32)
DATASET = make_dataset(160)
PLAIN = small_config(COMMON, "marm_l2", DATASET)
BEGIN_ELSEWHERE = ("no_feedback", "zero_upper", "vectors_alone")
"""Techniques that begin from other weights."""

pytestmark = pytest.mark.usefixtures("one_thread")


def learner_of(name: str | None) -> TimedLearner:
    return build_learner(PLAIN if name is None else by_technique(name)(PLAIN), PhaseClock())


def step(learner: TimedLearner, memory_BLD: Tensor | None = None) -> StepOutput:
    events = DATASET.events.take(slice(0, 32))
    rows = fetch_for(events, InProcessMemory(PLAIN.namespace), COMMON.history_length)
    inputs = learner.model.inputs.for_training(events, rows)
    output = learner.predict(inputs, events.labels, memory_BLD)
    learner.learn(events.labels, learner.model.num_labels(events.labels))
    return output


def weights(learner: TimedLearner) -> list[Tensor]:
    return [weight.detach().clone() for weight in learner.model.net.parameters()]


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_changes_what_is_predicted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first batch, which nothing was learned before."""
    monkeypatch.setattr(techniques, "LARGEST_GRADIENT", 0.01)
    scores = [run_pass(DATASET, config).score_N for config in (PLAIN, by_technique(name)(PLAIN))]
    assert np.isfinite(scores[1]).all()
    assert not np.array_equal(scores[0][32:], scores[1][32:])
    if name not in BEGIN_ELSEWHERE:
        np.testing.assert_array_equal(scores[0][:32], scores[1][:32])


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_technique_is_a_variation(name: str) -> None:
    (variation,) = choose(name)
    assert variation.apply(PLAIN) == by_technique(name)(PLAIN)


def test_a_trial_by_a_technique_is_kept_apart(tmp_path: object) -> None:
    cache = TrialCache(tmp_path)  # type: ignore[arg-type]
    changed = by_technique("clipping")(PLAIN)
    assert cache.path("data", changed) != cache.path("data", PLAIN)
    assert run_trial(DATASET, changed).settings["train"]["technique"] == (
        "benchmarks.paper.techniques:ClippedLearner"
    )


@pytest.mark.parametrize(
    "name",
    ["upper_lr_third", "upper_lr_triple", "zero_upper", "vectors_alone", "cut_batch_gradient"],
)
def test_what_would_change_nothing_is_refused(name: str) -> None:
    errors = small_config(COMMON, "marm_e_l2", DATASET)
    with pytest.raises(ValueError, match="no attention over cached vectors"):
        by_technique(name)(errors)


def test_clipped_gradients_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(techniques, "LARGEST_GRADIENT", 1e-3)
    for name, clipped in ((None, False), ("clipping", True)):
        learner = learner_of(name)
        step(learner)
        gradients = [one.grad for one in learner.model.net.parameters() if one.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        assert (norm < 1.01e-3) == clipped


def test_the_rate_rises() -> None:
    learner = learner_of("warm_up")
    rates = []
    for _ in range(3):
        rates.append(learner._optimizer.param_groups[0]["lr"])
        step(learner)
    np.testing.assert_allclose(rates, [1e-5, 1.99e-5, 2.98e-5], rtol=1e-9)


@pytest.mark.parametrize(("name", "factor"), [("upper_lr_third", 1 / 3), ("upper_lr_triple", 3)])
def test_only_attention_over_cached_vectors_has_another_rate(name: str, factor: float) -> None:
    """Adam's first step moves every weight by its rate, as far as it has a gradient."""
    plain, changed = learner_of(None), learner_of(name)
    before = weights(plain)
    upper = {id(one) for one in sequence_of(changed).memory_augmented.attention.layers.parameters()}
    for learner in (plain, changed):
        step(learner)
    moved = zip(
        before, weights(plain), weights(changed), changed.model.net.parameters(), strict=True
    )
    for start, usual, other, weight in moved:
        expected = (usual - start) * (factor if id(weight) in upper else 1)
        torch.testing.assert_close(other - start, expected, rtol=1e-3, atol=1e-7)
    assert upper


def test_upper_layers_begin_as_the_identity() -> None:
    """All rows are then the output of the layer below; a step teaches them otherwise."""
    learner = learner_of("zero_upper")
    for begins in (True, False):
        rows_BLD = step(learner).rows_BLD
        assert torch.equal(rows_BLD[:, 0], rows_BLD[:, 1]) == begins
    plain_BLD = step(learner_of(None)).rows_BLD
    assert not torch.equal(plain_BLD[:, 0], plain_BLD[:, 1])


def test_vectors_alone_see_and_learn_nothing_live() -> None:
    learner = learner_of("vectors_alone")
    for _ in range(2):
        step(learner)
    width = PLAIN.models[0].feature_dim
    for layer in sequence_of(learner).memory_augmented.attention.layers:
        weight = layer.key_value.weight  # type: ignore[union-attr]
        assert not weight[:, -width:].any()  # type: ignore[index]
        assert weight[:, :-width].all()  # type: ignore[index]


def test_the_moving_average_writes() -> None:
    plain, averaged = learner_of(None), learner_of("averaged_writer")
    for learner in (plain, averaged):
        step(learner)
    first = weights(averaged)  # where the average begins
    for learner in (plain, averaged):
        step(learner)
    kept = averaged._average.module.parameters()  # type: ignore[attr-defined]
    for start, now, average in zip(first, weights(averaged), kept, strict=True):
        torch.testing.assert_close(average, start + 0.01 * (now - start), rtol=1e-5, atol=1e-8)
    usual, other = step(plain), step(averaged)
    np.testing.assert_array_equal(usual.scores_BT, other.scores_BT)
    assert not torch.equal(usual.rows_BLD, other.rows_BLD)


def test_writing_nothing_cannot_be_averaged() -> None:
    with pytest.raises(ValueError, match="writes no vectors"):
        by_technique("averaged_writer")(small_config(COMMON, "marm_l0", DATASET))


def test_a_cut_gradient_is_that_of_rows_that_were_stored() -> None:
    """The same vectors given as a memory of someone else's have the same gradients."""
    cut, reading = learner_of("cut_batch_gradient"), learner_of(None)
    rows_BLD = step(cut).rows_BLD
    step(reading, rows_BLD)
    pairs = zip(cut.model.net.parameters(), reading.model.net.parameters(), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    plain = learner_of(None)
    step(plain)
    first = [
        sequence_of(learner).memory_augmented.attention.first.query.weight.grad
        for learner in (plain, cut)
    ]
    assert first[0] is not None
    assert first[1] is not None
    assert not torch.allclose(first[0], first[1])


@pytest.mark.parametrize(("name", "equal"), [("no_feedback", True), (None, False)])
def test_rows_without_feedback_say_nothing_of_it(name: str | None, equal: bool) -> None:
    learner = learner_of(name)
    step(learner)
    events = DATASET.events.take(slice(32, 64))
    rows = fetch_for(events, InProcessMemory(PLAIN.namespace), COMMON.history_length)
    scores = []
    for labels in (events.labels, 1 - events.labels):
        inputs = learner.model.inputs.for_training(replaced(events, labels=labels), rows)
        scores.append(learner.predict(inputs, events.labels, None).scores_BT)
    assert np.array_equal(scores[0], scores[1]) == equal
