"""What holds for every method of modelling interest, alone and in an ensemble."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sample_events import (
    NOW_MS,
    fetch_for,
    make_events,
    make_items,
    rows_of_user,
    small_model,
)
from torch import Tensor

from marm.batch_rows import KeySource
from marm.config import METHODS, InterestConfig
from marm.events import EventBatch
from marm.inputs import ModelInputs
from marm.interest.interface import History, Interest, Tags
from marm.interest.methods import _METHODS
from marm.items import ItemFeatures
from marm.memory import InProcessMemory, Namespace, UserRows
from marm.model_factory import build_unfilled
from marm.ranker import Ranker
from marm.retriever import Retriever
from marm.scoring_plan import ScoringPlan
from marm.sequence import raw_rows

ENSEMBLE = ("marm", "din", "sim_soft", "twin_v2")
CASES = [*((name,) for name in METHODS if name in _METHODS), ENSEMBLE]
NEEDS_TARGET = {"sim_soft", "sim_hard"}
SELF_ATTENTION = {"hstu", "decoder"}
every_method = pytest.mark.parametrize("names", CASES, ids="+".join)


pytestmark = pytest.mark.usefixtures("one_thread")


def ranker_of(names: tuple[str, ...], stage: str = "ranking", **settings: object) -> Ranker:
    """A model of these methods; MARM without memory, so that all see the same."""
    namespace = Namespace(depth=0, dim=8, dtype="float32")
    # Small enough that every search has to choose and every cluster has to be cut.
    interests = tuple(InterestConfig(method=name, top_k=3, cluster_size=2) for name in names)
    model = small_model(stage, namespace=namespace, interests=interests, **settings)
    model.stats.total_counts.fill_(10.0)  # a prior that is not zero everywhere
    return model  # type: ignore[return-value]


def window_of(names: tuple[str, ...]) -> int:
    """A history length that cuts histories off, unless the method's rows read older rows."""
    return 40 if SELF_ATTENTION & set(names) else 10


def stored_and_batch(model: Ranker) -> tuple[InProcessMemory, EventBatch]:
    """A memory of the first 40 events and the next 40 as a batch."""
    events = make_events(80)
    memory = InProcessMemory(model.config.namespace)
    save_raw(memory, events.take(slice(0, 40)), model)
    return memory, events.take(slice(40, 80))


def save_raw(memory: InProcessMemory, events: EventBatch, model: Ranker) -> None:
    memory.save(events.user_id, raw_rows(events, model.config.namespace.row_dtype))


def training_inputs(model: Ranker) -> tuple[EventBatch, ModelInputs]:
    memory, batch = stored_and_batch(model)
    stored = fetch_for(batch, memory, model.config.history_length)
    return batch, model.inputs.for_training(batch, stored)


def dead_parameters(model: Ranker) -> list[str]:
    """Parameters without any gradient after one batch."""
    batch, inputs = training_inputs(model)
    embedded = model.embed(inputs)
    model.training_forward(model.net, embedded, batch.labels).loss_sum.backward()
    if not isinstance(model, Retriever):
        assert embedded.sparse.values.grad is not None
        assert torch.isfinite(embedded.sparse.values.grad).all()
    named = model.net.named_parameters()
    return [name for name, p in named if p.grad is None or not p.grad.any()]


@every_method
@pytest.mark.parametrize("stage", ["ranking", "cascading"])
def test_every_parameter_learns(names: tuple[str, ...], stage: str) -> None:
    assert dead_parameters(ranker_of(names, stage)) == []


@pytest.mark.parametrize("names", [c for c in CASES if not NEEDS_TARGET & set(c)], ids="+".join)
def test_retrieval_learns_and_asks_with_several_vectors(names: tuple[str, ...]) -> None:
    model = ranker_of(names, "retrieval", num_user_vectors=2)
    assert isinstance(model, Retriever)
    assert dead_parameters(model) == []
    vectors = model.user_vectors(rows_of_user(model.config.namespace, 1, 6), 1, NOW_MS)
    assert vectors.shape == (2, 5)
    assert not np.allclose(vectors[0], vectors[1])


@every_method
def test_a_batch_without_events_gives_every_parameter_a_gradient_of_zero(
    names: tuple[str, ...],
) -> None:
    model = ranker_of(names)
    nobody = EventBatch.empty()
    memory = InProcessMemory(model.config.namespace)
    inputs = model.inputs.for_training(nobody, memory.fetch(nobody.user_id, 10))
    model.training_forward(model.net, model.embed(inputs), nobody.labels).loss_sum.backward()
    for name, parameter in model.net.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    reading = model.inputs.for_reading(nobody, memory.fetch(nobody.user_id, 10))
    assert model.training_forward(model.net, model.embed(reading), nobody.labels).loss_sum == 0


@every_method
def test_training_reading_and_requests_agree(names: tuple[str, ...]) -> None:
    """The same event, whether its past is partly in the batch, all stored, or asked for alone."""
    model = ranker_of(names, history_length=window_of(names))
    memory, batch = stored_and_batch(model)
    _, inputs = training_inputs(model)
    save_raw(memory, batch, model)
    users = np.unique(batch.user_id)
    reading = model.inputs.for_reading(batch, memory.fetch(users, 100))
    with torch.no_grad():
        trained, read = (
            model.training_forward(model.net, model.embed(one), batch.labels).scores_BT
            for one in (inputs, reading)
        )
    np.testing.assert_allclose(read, trained, rtol=1e-4, atol=1e-5)
    for number in (0, 17, 39):
        user, now_ms = int(batch.user_id[number]), int(batch.timestamp_ms[number])
        item = ItemFeatures(
            *(
                column[number : number + 1]
                for column in (batch.item_id, batch.author_id, batch.tag_id, batch.duration_ms)
            )
        )
        past = memory.fetch(np.array([user]), 100, np.array([now_ms]))
        asked = model.score(past, user, item, now_ms, int(batch.context_id[number]))
        np.testing.assert_allclose(asked[0], trained[number], rtol=1e-4, atol=1e-5)


@every_method
@pytest.mark.parametrize("num_rows", [0, 1, 25])
def test_candidates_are_scored_as_if_alone(names: tuple[str, ...], num_rows: int) -> None:
    model, items = ranker_of(names), make_items(7)
    rows = rows_of_user(model.config.namespace, 1, num_rows, raw=True)
    together = model.score(rows, 1, items, NOW_MS)
    assert np.isfinite(together).all()
    alone = [model.score(rows, 1, items.take(slice(i, i + 1)), NOW_MS) for i in range(7)]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-4, atol=1e-5)
    assert model.score(rows, 1, ItemFeatures.empty(), NOW_MS).shape == (0, len(model.tasks))


@every_method
def test_only_the_newest_n_rows_matter(names: tuple[str, ...]) -> None:
    model, items = ranker_of(names, history_length=4), make_items(6)
    rows = rows_of_user(model.config.namespace, 1, 9, raw=True)
    before = model.score(rows, 1, items, NOW_MS)
    oldest = UserRows(rows.user_ids, rows.offsets, rows.rows.copy())
    oldest.rows["item_id"][:5] += 1
    np.testing.assert_array_equal(model.score(oldest, 1, items, NOW_MS), before)
    oldest.rows["item_id"][5:] += 1
    assert not np.allclose(model.score(oldest, 1, items, NOW_MS), before)


@every_method
def test_hidden_rows_and_rows_of_others_do_not_matter(names: tuple[str, ...]) -> None:
    model = ranker_of(names, history_length=window_of(names))
    _, inputs = training_inputs(model)
    with torch.no_grad():
        embedded = model.embed(inputs)
        history, query_BF = model._sequence.history(embedded), embedded.target_BF
        for interest in model._sequence.methods:
            assert isinstance(interest, Interest)
            before = interest(query_BF, history).interest_BD
            for query in (3, 20, 39):
                perturbed = all_else_perturbed(history, query)
                after = interest(query_BF, perturbed).interest_BD
                torch.testing.assert_close(after[query], before[query], rtol=1e-5, atol=1e-6)
                assert not torch.allclose(after, before)


def all_else_perturbed(history: History, query: int) -> History:
    """Other features and tags wherever the query sees nothing."""
    slab, block, tags = history.slab, history.block, history.tags
    assert block is not None
    assert tags is not None
    assert tags.block_P is not None
    assert slab.user_row is not None
    seen_UN = torch.zeros(slab.features.shape[:2], dtype=torch.bool)
    seen_UN[slab.user_row[query]] = slab.visible[query]
    seen_P = block.visible[query]

    def other(source: KeySource, seen: Tensor) -> KeySource:
        features = torch.where(seen[..., None], source.features, 3 - source.features)
        return replace(source, features=features)

    other_tags = Tags(
        tags.query_B,
        torch.where(seen_UN, tags.slab_UN, tags.query_B[query]),
        torch.where(seen_P, tags.block_P, tags.query_B[query]),
    )
    return replace(history, slab=other(slab, seen_UN), block=other(block, seen_P), tags=other_tags)


@every_method
def test_half_precision_stays_close(names: tuple[str, ...]) -> None:
    model = ranker_of(names)
    batch, inputs = training_inputs(model)
    exact = model.training_forward(model.net, model.embed(inputs), batch.labels)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.training_forward(model.net, model.embed(inputs), batch.labels)
    half.loss_sum.backward()
    torch.testing.assert_close(half.loss_sum.float(), exact.loss_sum, rtol=0.1, atol=0.5)


@every_method
def test_a_model_filled_with_saved_weights_scores_alike(names: tuple[str, ...]) -> None:
    model, items = ranker_of(names), make_items(5)
    filled = build_unfilled(model.config)
    filled.load_state_dict(model.state_dict(), assign=True)
    assert isinstance(filled, Ranker)
    rows = rows_of_user(model.config.namespace, 1, 12, raw=True)
    np.testing.assert_allclose(
        filled.score(rows, 1, items, NOW_MS), model.score(rows, 1, items, NOW_MS), rtol=1e-5
    )


@every_method
def test_scores_are_the_same_after_freezing(names: tuple[str, ...]) -> None:
    model, items = ranker_of(names), make_items(5)
    rows = rows_of_user(model.config.namespace, 1, 12, raw=True)
    before = model.score(rows, 1, items, NOW_MS)
    model.freeze(ScoringPlan())
    np.testing.assert_allclose(model.score(rows, 1, items, NOW_MS), before, rtol=1e-4, atol=1e-5)
