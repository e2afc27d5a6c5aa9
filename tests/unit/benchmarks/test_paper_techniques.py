"""Ways to train for ablations: each changes what it says, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_up_trials import make_dataset, small_config
from sample_events import fetch_for
from torch import Tensor

from benchmarks.paper import techniques
from benchmarks.paper.ablations import choose
from benchmarks.paper.phases import PhaseClock, TimedLearner
from benchmarks.paper.plan import CommonSettings
from benchmarks.paper.techniques import TECHNIQUES, build_learner, by_technique, sequence_of
from benchmarks.paper.trial import run_pass, run_trial
from benchmarks.paper.trial_cache import TrialCache
from marm.memory import InProcessMemory
from marm.stage_model import StepOutput

COMMON = CommonSettings(history_length=8, dim=8, batch_size=32)
DATASET = make_dataset(160)
PLAIN = small_config(COMMON, "marm_l2", DATASET)

pytestmark = pytest.mark.usefixtures("one_thread")


def learner_of(name: str | None) -> TimedLearner:
    return build_learner(PLAIN if name is None else by_technique(name)(PLAIN), PhaseClock())


def step(learner: TimedLearner, count: int = 32) -> StepOutput:
    events = DATASET.events.take(slice(0, count))
    rows = fetch_for(events, InProcessMemory(PLAIN.namespace), COMMON.history_length)
    output = learner.predict(learner.model.inputs.for_training(events, rows), events.labels, None)
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
    if name != "no_feedback":
        np.testing.assert_array_equal(scores[0][:32], scores[1][:32])


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_technique_is_a_variation(name: str) -> None:
    (variation,) = choose(name)
    assert variation.apply(PLAIN) == by_technique(name)(PLAIN)


def test_a_trial_by_a_technique_is_kept_apart(tmp_path: object) -> None:
    cache = TrialCache(tmp_path)  # type: ignore[arg-type]
    changed = by_technique("clipping")(PLAIN)
    assert cache.path("data", changed) != cache.path("data", PLAIN)
    assert run_trial(DATASET, changed).settings["train"]["technique"] == "clipping"


@pytest.mark.parametrize("name", ["upper_lr_third", "upper_lr_triple", "cut_batch_gradient"])
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
    np.testing.assert_allclose(rates, [1e-6, 1.999e-6, 2.998e-6], rtol=1e-9)


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


def test_a_cut_gradient_ends_at_the_rows_of_the_batch() -> None:
    """The first layer learns through them; with the cut only through each query itself."""
    plain, cut = learner_of(None), learner_of("cut_batch_gradient")
    assert torch.equal(step(plain).rows_BLD, step(cut).rows_BLD)
    gradients = [
        sequence_of(learner).memory_augmented.attention.first.query.weight.grad
        for learner in (plain, cut)
    ]
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert not torch.allclose(gradients[0], gradients[1])


def test_rows_without_feedback_stay_without() -> None:
    learner = learner_of("no_feedback")
    for _ in range(2):
        step(learner)
    sequence = sequence_of(learner)
    assert not sequence.feedback_signal.weight.any()
    assert not sequence.watch_bucket.weight.any()
