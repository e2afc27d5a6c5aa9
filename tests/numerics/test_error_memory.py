"""Accumulated errors: streaming equals a loop over each user's life, in batches of any size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_oracle import TOLERANCE, random_events, random_ranker, stream

from marm.addressing import combine64, feature_slots
from marm.error_memory import (
    COUNT_PRIOR,
    MEAN_PRIOR,
    ErrorLayer,
    ErrorState,
    _pack,
    _unpack,
)
from marm.error_vectors import ErrorTable, TransitionErrors, state_widths
from marm.events import TASKS, EventBatch
from marm.items import ItemFeatures
from marm.memory import InProcessMemory
from marm.ranker import Ranker
from marm.scoring_plan import ScoringPlan
from stages.depth import first_layers

LABEL = TASKS.index("long_view")
LOGIT = -1  # of a stored vector, the number that is the logit below its layer


def ranker(depth: int = 1, error_layers: int = 1) -> Ranker:
    """A random ranker that accumulates errors."""
    model = random_ranker(3, depth=depth, history_length=4, error_layers=error_layers)
    for table in model.error_tables:
        assert isinstance(table, ErrorTable)
        table.weight.mul_(10)  # that what is compared is not near zero
    return model


def known_label(events: EventBatch, index: int) -> float:
    """What a row says of its label: nothing where nothing was observed."""
    if np.isnan(events.labels[index]).all():
        return float("nan")
    return float(events.labels[index, LABEL] > 0)


@pytest.mark.parametrize(("depth", "error_layers"), [(1, 1), (3, 1), (2, 2), (3, 2)])
def test_states_are_sums_over_the_whole_past(depth: int, error_layers: int) -> None:
    events = random_events(np.random.default_rng(0), 3, 60)
    events.labels[::7] = np.nan
    events.timestamp_ms[20:24] = events.timestamp_ms[20]  # simultaneous
    model = ranker(depth, error_layers)
    logits, rows = stream(model, events, [1], InProcessMemory(model.config.namespace))
    task = model.tasks.index("long_view")
    lives = [past_of(events, index) for index in range(len(events))]
    assert model.net.errors is not None
    for layer, module in enumerate(model.net.errors.layers):
        assert isinstance(module, ErrorLayer)
        x = item_vectors(model, events, layer)
        below = rows[:, layer, LOGIT]
        above = rows[:, layer + 1, LOGIT] if layer + 1 < error_layers else logits[:, task]
        error = [known_label(events, i) - float(torch.sigmoid(below[i])) for i in range(len(below))]
        centred = []
        for i, past in enumerate(lives):
            mean = np.nansum([error[other] for other in past]) / (len(past) + MEAN_PRIOR)
            centred.append(np.nan_to_num(error[i] - mean))
        for i, past in enumerate(lives):
            total = torch.zeros(module.width)
            for other in past:
                total += centred[other] * x[other]
            state = total / np.sqrt(len(past) + COUNT_PRIOR)
            torch.testing.assert_close(
                rows[i, layer, : module.width], state, atol=TOLERANCE, rtol=1e-4
            )
            correction = module.weight[task] @ (x[i] * state)
            expected = below[i] + module.share[task] * correction
            torch.testing.assert_close(above[i], expected, atol=TOLERANCE, rtol=1e-4)


def past_of(events: EventBatch, index: int) -> list[int]:
    """The user's earlier events."""
    same = events.user_id == events.user_id[index]
    earlier = events.timestamp_ms < events.timestamp_ms[index]
    return np.flatnonzero(same & earlier).tolist()


def item_vectors(model: Ranker, events: EventBatch, layer: int) -> torch.Tensor:
    """What stands for each event's item, author and tag in a layer of errors, ``[N, P]``."""
    table = model.error_tables[layer]
    assert isinstance(table, ErrorTable)
    if isinstance(table, TransitionErrors):
        return table.weight[torch.from_numpy(transitions(model, events))]
    ids = {"item": events.item_id, "author": events.author_id, "tag": events.tag_id}
    found = [torch.from_numpy(model.table.slots(name, of)) for name, of in ids.items()]
    return torch.stack([table.weight[slots] for slots in found]).sum(dim=0)


def transitions(model: Ranker, events: EventBatch) -> np.ndarray:
    """Places of each event's pair of tags, ``[N]``."""
    liked = []
    for index in range(len(events)):
        order = sorted(
            past_of(events, index), key=lambda i: (events.timestamp_ms[i], events.event_key[i])
        )
        seen = [i for i in order[-model.config.history_length :] if events.labels[i, LABEL] > 0]
        liked.append(int(events.tag_id[seen[-1]]) if seen else -1)
    pairs = combine64(np.array(liked), events.tag_id)
    return feature_slots(7, pairs, model.config.num_slots)


@pytest.mark.parametrize("batch_sizes", [[7], [60], [1, 30]])
def test_batches_change_nothing(batch_sizes: list[int]) -> None:
    events = random_events(np.random.default_rng(1), 2, 60)
    model = ranker(3, 2)
    logits, rows = stream(model, events, [1], InProcessMemory(model.config.namespace))
    memory = InProcessMemory(model.config.namespace)
    others, other_rows = stream(model, events, batch_sizes, memory)
    torch.testing.assert_close(others, logits, atol=TOLERANCE, rtol=1e-4)
    torch.testing.assert_close(other_rows, rows, atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_request_is_scored_as_the_event_was_predicted(frozen: bool) -> None:
    events = random_events(np.random.default_rng(2), 1, 30)
    model = ranker(3, 2)
    memory = InProcessMemory(model.config.namespace)
    stream(model, events.take(slice(0, 29)), [5], memory)
    last = events.take(slice(29, 30))
    rows = memory.fetch(last.user_id, model.config.history_length, last.timestamp_ms)
    expected, _ = stream(model, last, [1], memory)
    if frozen:
        model.freeze(ScoringPlan())
    candidates = ItemFeatures(
        np.repeat(last.item_id, 2),
        np.repeat(last.author_id, 2),
        np.repeat(last.tag_id, 2),
        np.repeat(last.duration_ms, 2),
    )
    user, now, context = (
        int(column[0]) for column in (last.user_id, last.timestamp_ms, last.context_id)
    )
    scores = model.score(rows, user, candidates, now, context)
    np.testing.assert_allclose(scores[0], scores[1])
    np.testing.assert_allclose(scores[0], model.probabilities(expected)[0], rtol=1e-4, atol=1e-5)


def test_with_fewer_layers_a_request_gets_the_corrections_of_those() -> None:
    events = random_events(np.random.default_rng(4), 1, 30)
    model = ranker(2, 2)
    memory = InProcessMemory(model.config.namespace)
    stream(model, events, [5], memory)
    rows = memory.fetch(events.user_id[:1], model.config.history_length)
    one = events.take(slice(29, 30))
    item = ItemFeatures(one.item_id, one.author_id, one.tag_id, one.duration_ms)
    user, now = int(one.user_id[0]), int(one.timestamp_ms[0]) + 1
    scores = [model.score(first_layers(rows, depth), user, item, now) for depth in (0, 1, 2)]
    assert all(np.isfinite(score).all() for score in scores)
    assert not np.array_equal(scores[0], scores[1])
    assert not np.array_equal(scores[1], scores[2])
    assert model.net.errors is not None
    with torch.no_grad():
        model.net.errors.layers[1].weight.zero_()
    np.testing.assert_array_equal(model.score(rows, user, item, now), scores[1])


def test_a_correction_leaves_the_prediction_below_alone() -> None:
    events = random_events(np.random.default_rng(3), 2, 40)
    model, plain = ranker(1, 1), random_ranker(3, depth=0, history_length=4)
    own = {
        name: tensor for name, tensor in model.state_dict().items() if name in plain.state_dict()
    }
    plain.load_state_dict(own)
    memory = InProcessMemory(model.config.namespace)
    rows = memory.fetch(np.unique(events.user_id), 4)
    gradients = []
    for one in (model, plain):
        embedded = one.embed(one.inputs.for_training(events, rows))
        output = one.training_forward(one.net, embedded, events.labels)
        output.loss_sum.backward()
        gradients.append(dict(one.net.named_parameters()))
        gradients[-1]["table"] = embedded.sparse.values
    for name, parameter in gradients[1].items():
        torch.testing.assert_close(gradients[0][name].grad, parameter.grad, msg=name)


def test_states_survive_half_precision() -> None:
    """Counts exactly, far beyond what float16 holds; sums by its 11 bits, whether errors cancel or
    all have one sign."""
    counts = torch.tensor([0.0, 1.0, 2047.0, 2049.0, 1_000_003.0])[:, None]
    size = torch.sqrt(counts + COUNT_PRIOR)
    size[-1] = counts[-1]
    torch.manual_seed(0)
    state = ErrorState(torch.randn(5, 6) * size, torch.randn(5, 1) * size, counts)
    logit, kept = torch.randn(5, 1), torch.randn(5, 2)
    stored = _pack(state, kept, logit).half()
    assert torch.isfinite(stored).all()
    found, found_logit = _unpack(stored.float(), 6)
    torch.testing.assert_close(found.count_B1, counts, rtol=0, atol=0)
    torch.testing.assert_close(found.sum_BP, state.sum_BP, rtol=2**-10, atol=1e-6)
    torch.testing.assert_close(found.total_B1, state.total_B1, rtol=2**-10, atol=1e-6)
    torch.testing.assert_close(found_logit, logit, rtol=2**-10, atol=1e-6)
    torch.testing.assert_close(stored[:, 6:8].float(), kept, rtol=2**-10, atol=1e-6)


def test_states_fill_what_a_row_has_room_for() -> None:
    config = ranker(3, 3).config
    room = config.attention_dim - 4
    assert state_widths(config) == [room, room - 3, room]
    without_tags = replace(config, features=("item",))
    assert state_widths(without_tags) == [room, room, room]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0, "error_layers": 1}, "as many stored layers"),
        ({"depth": 1, "error_layers": 2}, "as many stored layers"),
        ({"error_layers": -1}, "at least 0"),
        ({"error_layers": 1, "tasks": ("click",)}, "positive_task among tasks"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_ranker(0, **settings)


def test_whole_numbers_are_refused() -> None:
    model = ranker().config
    with pytest.raises(ValueError, match="float16 or float32"):
        replace(model, namespace=replace(model.namespace, dtype="int8"))
