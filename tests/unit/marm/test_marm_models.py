"""What holds for the models of all stages: live parameters, finite scores, clear refusals."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from sample_events import (
    INT64,
    NOW_MS,
    fetch_for,
    make_events,
    make_items,
    make_rows,
    replaced,
    rows_of_user,
    small_config,
    small_model,
)
from torch import Tensor

from marm.attention import RecencyBias
from marm.cascader import Cascader
from marm.config import STAGES
from marm.events import TASKS, EventBatch
from marm.inputs import ModelInputs
from marm.items import ItemFeatures
from marm.memory import RAW_STEP, InProcessMemory, UserRows
from marm.model_factory import Model
from marm.ranker import Ranker
from marm.retriever import Retriever
from marm.sequence import raw_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def history_and_batch(model: Model) -> tuple[EventBatch, ModelInputs]:
    """A batch of events and its inputs; every user has rows and predecessors in the batch."""
    events = make_events(80)
    first, batch = events.take(slice(0, 40)), events.take(slice(40, 80))
    memory = InProcessMemory(model.config.namespace)
    rows = raw_rows(first, model.config.namespace.row_dtype)
    rows["written_step"] = 1
    rows["memory"] = np.random.default_rng(0).normal(size=rows["memory"].shape)
    memory.save(first.user_id, rows)
    stored = fetch_for(batch, memory, model.config.history_length)
    return batch, model.inputs.for_training(batch, stored)


def block_memory(model: Model, events: EventBatch) -> Tensor | None:
    """What the ranking model would hand to a model that reads."""
    if isinstance(model, Ranker):
        return None
    namespace = model.config.namespace
    return torch.randn(len(events), namespace.depth, namespace.dim)


def answer(
    model: Model, rows: UserRows, items: ItemFeatures, now_ms: int = NOW_MS, context_id: int = 0
) -> np.ndarray:
    """Scores of ``items`` for the user of ``rows``, whatever the stage; ``[M, ...]``."""
    user_id = int(rows.user_ids[0])
    if isinstance(model, Retriever):
        return model.item_vectors(items) @ model.user_vector(rows, user_id, now_ms, context_id)
    return model.score(rows, user_id, items, now_ms, context_id)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("depth", "error_layers"), [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1), (2, 2)]
)
def test_every_parameter_learns(stage: str, depth: int, error_layers: int) -> None:
    namespace = small_config().namespace
    model = small_model(
        stage,
        namespace=type(namespace)(depth=depth, dim=8, dtype="float32"),
        error_layers=error_layers,
    )
    model.stats.total_counts.fill_(10.0)  # a prior that is not zero everywhere
    batch, inputs = history_and_batch(model)
    embedded = model.embed(inputs)
    output = model.training_forward(model.net, embedded, batch.labels, block_memory(model, batch))
    output.loss_sum.backward()
    dead = [
        name
        for name, parameter in model.net.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert dead == []
    assert embedded.sparse.values.grad is not None
    if stage == "ranking":  # and so does every table row that was read
        assert embedded.sparse.values.grad.any(dim=1).all()


@pytest.mark.parametrize("recency", [(), ("distance",), ("gap",), ("distance", "gap")])
def test_what_recency_leaves_out_biases_nothing(recency: tuple[str, ...]) -> None:
    bias = RecencyBias.of_layers(1, 2, recency)
    with torch.no_grad():
        for weight in (bias.distance, bias.gap):
            if weight.requires_grad:
                weight.normal_()
    pairs = bias.pairs()  # [distances, gaps, layers * H]
    assert torch.equal(pairs, pairs[:1].expand_as(pairs)) == ("distance" not in recency)
    assert torch.equal(pairs, pairs[:, :1].expand_as(pairs)) == ("gap" not in recency)


def test_what_recency_leaves_out_does_not_learn() -> None:
    model = small_model("ranking", recency=("distance",))
    batch, inputs = history_and_batch(model)
    model.training_forward(model.net, model.embed(inputs), batch.labels).loss_sum.backward()
    without = {name for name, p in model.net.named_parameters() if p.grad is None}
    assert without == {"sequence.methods.0.attention.recency.gap"}


@pytest.mark.parametrize("error_layers", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_without_events_gives_every_parameter_a_gradient_of_zero(
    stage: str, error_layers: int
) -> None:
    """A worker whose share of the log is behind still takes part in every step."""
    model = small_model(stage, error_layers=error_layers)
    nobody = EventBatch.empty()
    memory = InProcessMemory(model.config.namespace)
    inputs = model.inputs.for_training(nobody, memory.fetch(nobody.user_id, 10))
    embedded = model.embed(inputs)
    output = model.training_forward(model.net, embedded, nobody.labels, block_memory(model, nobody))
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0.0
    assert output.scores_BT.shape == (0, len(model.tasks))
    assert model.num_labels(nobody.labels) == 0
    for name, parameter in model.net.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    reading = model.inputs.for_reading(nobody, memory.fetch(nobody.user_id, 10))
    assert len(model.embed(reading)) == 0
    slots = model.item_slots(inputs)
    model.stats.update(slots, model.targets(nobody.labels))
    assert not model.stats.exposures.any()


@pytest.mark.parametrize("stage", STAGES)
def test_unknown_labels_teach_nothing(stage: str) -> None:
    model = small_model(stage)
    batch, inputs = history_and_batch(model)
    unknown = np.full_like(batch.labels, np.nan)
    embedded = model.embed(inputs)
    output = model.training_forward(model.net, embedded, unknown, block_memory(model, batch))
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0.0
    assert model.num_labels(unknown) == 0
    assert not any(p.grad.any() for p in model.net.parameters() if p.grad is not None)


@pytest.mark.parametrize("error_layers", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_scores_are_finite_whatever_is_asked(stage: str, error_layers: int) -> None:
    model = small_model(stage, error_layers=error_layers)
    namespace = model.config.namespace
    items = make_items(6)
    wild = ItemFeatures(*(np.array([INT64.min, -1, 0, 1, INT64.max], np.int64) for _ in range(4)))
    extreme_rows = rows_of_user(namespace, INT64.min, 5)
    for name in ("item_id", "author_id", "tag_id"):
        extreme_rows.rows[name] = [INT64.min, -1, 0, INT64.max, 7]
    extreme_rows.rows["context_id"] = np.iinfo(np.int32).min
    extreme_rows.rows["feedback"] = np.iinfo(np.uint32).max
    histories = [
        rows_of_user(namespace, 7, 0),
        rows_of_user(namespace, -3, 1),
        rows_of_user(namespace, INT64.max, 25),
        rows_of_user(namespace, 4, 8, raw=True),
        extreme_rows,
    ]
    for rows in histories:
        for candidates in (items, wild):
            for now_ms, context_id in ((NOW_MS, 0), (0, -1), (INT64.max, INT64.max), (-5, 3)):
                scores = answer(model, rows, candidates, now_ms, context_id)
                assert scores.dtype == np.float32
                assert len(scores) == len(candidates)
                assert np.isfinite(scores).all()


@pytest.mark.parametrize("stage", STAGES)
def test_no_candidates_no_scores(stage: str) -> None:
    model = small_model(stage)
    for num_rows in (0, 4):
        rows = rows_of_user(model.config.namespace, 1, num_rows)
        scores = answer(model, rows, ItemFeatures.empty())
        assert len(scores) == 0
        if stage == "ranking":
            assert scores.shape == (0, len(TASKS))


@pytest.mark.parametrize("error_layers", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_raw_rows_count_at_layer_0_only(stage: str, error_layers: int) -> None:
    model, items = small_model(stage, error_layers=error_layers), make_items(6)
    namespace = model.config.namespace
    raw = rows_of_user(namespace, 1, 6, raw=True)
    before = answer(model, raw, items)
    # Layer 0 sees them ...
    assert not np.allclose(before, answer(model, rows_of_user(namespace, 1, 0), items))
    # ... but nothing reads what stands in their memory.
    raw.rows["memory"] = 1e6
    np.testing.assert_array_equal(answer(model, raw, items), before)
    raw.rows["written_step"] = RAW_STEP + 1
    assert not np.allclose(answer(model, raw, items), before)


@pytest.mark.parametrize("stage", STAGES)
def test_only_the_newest_n_rows_matter(stage: str) -> None:
    model, items = small_model(stage, history_length=4), make_items(6)
    rows = rows_of_user(model.config.namespace, 1, 9)
    before = answer(model, rows, items)
    rows.rows["item_id"][:5] += 1
    rows.rows["memory"][:5] += 1
    np.testing.assert_array_equal(answer(model, rows, items), before)
    rows.rows["item_id"][5] += 1
    assert not np.allclose(answer(model, rows, items), before)


@pytest.mark.parametrize("error_layers", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_rows_at_or_after_the_request_are_hidden(stage: str, error_layers: int) -> None:
    model, items = small_model(stage, error_layers=error_layers), make_items(6)
    rows = rows_of_user(model.config.namespace, 1, 6)
    now_ms = int(rows.rows["timestamp_ms"][3])
    past = UserRows(rows.user_ids, np.array([0, 3]), rows.rows[:3])
    np.testing.assert_allclose(
        answer(model, rows, items, now_ms), answer(model, past, items, now_ms), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("stage", STAGES)
def test_rows_of_somebody_else_are_refused(stage: str) -> None:
    model = small_model(stage)
    rows = rows_of_user(model.config.namespace, 1, 3)
    two = UserRows(np.array([1, 2]), np.array([0, 3, 3]), rows.rows)
    ask = model.user_vector if isinstance(model, Retriever) else partial(_score_one, model)
    for given in (rows, two):
        with pytest.raises(ValueError, match="rows of user 2 alone, got rows of"):
            ask(given, 2, NOW_MS)


def _score_one(model: Ranker | Cascader, rows: UserRows, user_id: int, now_ms: int) -> np.ndarray:
    return model.score(rows, user_id, make_items(1), now_ms)


def test_a_batch_whose_users_were_not_fetched_is_refused() -> None:
    model = small_model()
    events = make_events(4, num_users=3)
    memory = InProcessMemory(model.config.namespace)
    with pytest.raises(ValueError, match="an entry, possibly empty, for every user"):
        model.inputs.for_training(events, memory.fetch(np.array([99]), 5))


@pytest.mark.parametrize("stage", STAGES)
def test_the_context_and_the_user_matter(stage: str) -> None:
    """Retrieval asks with user and context, cascading with the context, ranking with both."""
    model, items = small_model(stage), make_items(6)
    namespace = model.config.namespace
    one, other = rows_of_user(namespace, 1, 6), rows_of_user(namespace, 2, 6)
    base = answer(model, one, items)
    assert not np.allclose(answer(model, one, items, context_id=1), base)
    assert np.allclose(answer(model, other, items), base) == (stage == "cascading")


@pytest.mark.parametrize("error_layers", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_training_returns_float32_and_stays_close(stage: str, error_layers: int) -> None:
    model = small_model(stage, error_layers=error_layers)
    batch, inputs = history_and_batch(model)
    memory = block_memory(model, batch)
    exact = model.training_forward(model.net, model.embed(inputs), batch.labels, memory)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.training_forward(model.net, model.embed(inputs), batch.labels, memory)
    half.loss_sum.backward()
    assert half.loss_sum.dtype == torch.float32
    assert half.scores_BT.dtype == np.float32
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.net.parameters())
    torch.testing.assert_close(half.loss_sum, exact.loss_sum, rtol=0.1, atol=0.5)
    stored = half.rows_BLD.float().numpy()  # as training stores them
    # A row of errors ends with a logit, which is no closer than predictions in half precision are.
    compared = slice(None, -1) if error_layers and stage == "ranking" else slice(None)
    np.testing.assert_allclose(
        stored[..., compared], exact.rows_BLD.numpy()[..., compared], rtol=0.1, atol=0.2
    )
    assert stored.shape[0] == len(batch)


def test_only_ranking_yields_rows() -> None:
    for stage in STAGES:
        model = small_model(stage)
        batch, inputs = history_and_batch(model)
        output = model.training_forward(
            model.net, model.embed(inputs), batch.labels, block_memory(model, batch)
        )
        assert not output.rows_BLD.requires_grad
        if stage == "ranking":
            assert output.rows_BLD.shape == (len(batch), 2, 8)


def test_simultaneous_events_of_a_batch_do_not_influence_each_other() -> None:
    model = small_model()
    events = make_events(6)
    events = replaced(
        events, user_id=np.ones(6, np.int64), timestamp_ms=np.full(6, NOW_MS, np.int64)
    )
    memory = InProcessMemory(model.config.namespace)
    memory.save(np.ones(3, np.int64), make_rows(model.config.namespace, [1, 2, 3], 5))

    def scores(batch: EventBatch) -> np.ndarray:
        inputs = model.inputs.for_training(batch, fetch_for(batch, memory, 10))
        with torch.no_grad():
            return model.training_forward(model.net, model.embed(inputs), batch.labels).scores_BT

    together = scores(events)
    alone = np.concatenate([scores(events.take(slice(i, i + 1))) for i in range(6)])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
