"""States of errors as cascading reads them: equal to a loop, in training, reading and serving."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_error_memory import past_of, ranker
from test_oracle import TOLERANCE, random_events
from torch import Tensor

from marm.cascader import Cascader
from marm.error_reading import ErrorReading
from marm.error_vectors import INITIAL_DEVIATION, state_widths
from marm.events import EventBatch
from marm.items import ItemFeatures
from marm.memory import RAW_STEP, InProcessMemory, UserRows
from marm.model_factory import build_model
from marm.ranker import Ranker
from marm.scoring_plan import ScoringPlan
from marm.sequence import raw_rows
from stages.depth import first_layers

N = 4  # rows that a query sees: less than a life has


def reader(of: Ranker) -> Cascader:
    """A random cascading model that reads the memory of ``of``."""
    config = replace(of.config, stage="cascading")
    torch.manual_seed(5)
    model = build_model(config)
    assert isinstance(model, Cascader)
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.table.weight.mul_(4)
    return model.eval()


def reading_of(model: Cascader) -> ErrorReading:
    assert model.net.sequence.errors is not None
    return model.net.sequence.errors


def stored_before(events: EventBatch, memory: InProcessMemory) -> UserRows:
    """Rows from before each user's first event of ``events``."""
    users = np.unique(events.user_id)
    before = [events.timestamp_ms[events.user_id == user].min() for user in users]
    return memory.fetch(users, N, np.array(before, np.int64))


def outputs(model: Cascader, inputs, block: Tensor | None) -> Tensor:
    """What the heads say of every query, ``[B, ...]``."""
    embedded = model.embed(inputs)
    return model.net(embedded, model.item_prior(model.item_slots(inputs)), block).logits_BT


def read_along(
    model: Cascader, writer: Ranker, events: EventBatch, batch_size: int, memory: InProcessMemory
) -> Tensor:
    """Outputs of ``model`` trained beside ``writer``, which fills ``memory``."""
    found = []
    for start in range(0, len(events), batch_size):
        batch = events.take(slice(start, start + batch_size))
        stored = stored_before(batch, memory)
        with torch.no_grad():
            of_writer = writer.inputs.for_training(batch, stored)
            prior = writer.item_prior(writer.item_slots(of_writer))
            written = writer.net(writer.embed(of_writer), prior).rows_BLD
            found.append(outputs(model, model.inputs.for_training(batch, stored), written))
        rows = raw_rows(batch, memory.namespace.row_dtype)
        rows["memory"], rows["written_step"] = written.numpy(), 1
        memory.save(batch.user_id, rows)
    return torch.cat(found)


@pytest.mark.parametrize(("depth", "error_layers"), [(1, 1), (2, 2), (4, 3)])
def test_what_is_added_is_the_newest_state_mapped(depth: int, error_layers: int) -> None:
    events = random_events(np.random.default_rng(0), 3, 60)
    events.timestamp_ms[26:29] = events.timestamp_ms[26]  # simultaneous, among the stored ...
    events.timestamp_ms[40:44] = events.timestamp_ms[40]  # ... and in the block
    rows = np.random.default_rng(1).standard_normal((60, depth, 16)).astype(np.float32)
    writer = ranker(depth, error_layers)
    model = reader(writer)
    memory = InProcessMemory(model.config.namespace)
    stored = raw_rows(events.take(slice(0, 30)), memory.namespace.row_dtype)
    stored["memory"], stored["written_step"] = rows[:30], 1
    stored["written_step"][[5, 28]] = RAW_STEP
    memory.save(events.user_id[:30], stored)
    batch = events.take(slice(30, 60))
    inputs = model.inputs.for_training(batch, stored_before(batch, memory))
    block = torch.from_numpy(rows[30:])
    with torch.no_grad():
        added = reading_of(model)(model.net.sequence.history(model.embed(inputs), block))
    weight = reading_of(model).weight.detach()
    raw = {5, 28}
    for query in range(30, 60):
        past = [other for other in past_of(events, query) if other not in raw]
        latest = max((events.timestamp_ms[other] for other in past), default=0)
        newest = [other for other in past if events.timestamp_ms[other] == latest]
        expected = torch.zeros(len(weight))
        for other in newest:
            states = [rows[other, i, :width] for i, width in enumerate(state_widths(model.config))]
            state = torch.from_numpy(np.concatenate(states)) / INITIAL_DEVIATION
            expected += weight @ state / len(newest)
        torch.testing.assert_close(added[query - 30], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("depth", [2, 3])
def test_batches_change_nothing(depth: int) -> None:
    events = random_events(np.random.default_rng(1), 2, 60)
    events.timestamp_ms[15:18] = events.timestamp_ms[15]  # simultaneous
    writer = ranker(depth, 2)
    model = reader(writer)
    memory = InProcessMemory(model.config.namespace)
    expected = read_along(model, writer, events, 1, memory)
    for batch_size in (7, 60):
        memory = InProcessMemory(model.config.namespace)
        found = read_along(model, writer, events, batch_size, memory)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=1e-4)
    # And so does reading when all is stored (time travel).
    inputs = model.inputs.for_reading(events, memory.fetch(np.unique(events.user_id), 100))
    with torch.no_grad():
        later = outputs(model, inputs, None)
    torch.testing.assert_close(later, expected, atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_request_is_answered_as_the_event_was(frozen: bool) -> None:
    events = random_events(np.random.default_rng(2), 1, 30)
    writer = ranker(3, 2)
    model = reader(writer)
    memory = InProcessMemory(model.config.namespace)
    expected = read_along(model, writer, events, 6, memory)[-1]
    last = events.take(slice(29, 30))
    rows = memory.fetch(last.user_id, N, last.timestamp_ms)
    user, now, context = (
        int(column[0]) for column in (last.user_id, last.timestamp_ms, last.context_id)
    )
    if frozen:
        model.freeze(ScoringPlan())
    columns = (last.item_id, last.author_id, last.tag_id, last.duration_ms)
    twice = ItemFeatures(*(np.repeat(column, 2) for column in columns))
    scores = model.score(rows, user, twice, now, context)
    np.testing.assert_allclose(scores, torch.sigmoid(expected).repeat(2), rtol=1e-4, atol=1e-5)


def test_weights_of_zero_leave_the_layers_out() -> None:
    events = random_events(np.random.default_rng(3), 2, 40)
    writer = ranker(3, 2)
    assert not reading_of(build_model(replace(writer.config, stage="cascading"))).weight.any()
    model = reader(writer)
    memory = InProcessMemory(model.config.namespace)
    read = read_along(model, writer, events, 10, memory)
    with torch.no_grad():
        reading_of(model).weight.zero_()
    memory = InProcessMemory(model.config.namespace)
    without = read_along(model, writer, events, 10, memory)
    model.net.sequence.errors = None
    memory = InProcessMemory(model.config.namespace)
    assert torch.equal(without, read_along(model, writer, events, 10, memory))
    assert not torch.allclose(read, without)


def test_what_is_not_there_adds_nothing() -> None:
    events = random_events(np.random.default_rng(4), 1, 20)
    model = reader(ranker(2, 2))
    memory = InProcessMemory(model.config.namespace)
    rows = raw_rows(events, memory.namespace.row_dtype)
    rows["memory"], rows["written_step"] = 1.0, 1
    memory.save(events.user_id, rows)
    newest = memory.fetch(events.user_id[:1], N)
    weight = reading_of(model).weight.detach()
    ones = torch.full((weight.shape[1],), 1 / INITIAL_DEVIATION)
    first = state_widths(model.config)[0]
    ones_of_first = torch.where(torch.arange(len(ones)) < first, ones, 0.0)
    as_raw = UserRows(newest.user_ids, newest.offsets, newest.rows.copy())
    as_raw.rows["written_step"] = RAW_STEP
    nobody = memory.fetch(np.array([10**6]), N)
    for found, states in [
        (newest, ones),
        (first_layers(newest, 1), ones_of_first),
        (first_layers(newest, 0), torch.zeros_like(ones)),
        (as_raw, torch.zeros_like(ones)),
        (nobody, torch.zeros_like(ones)),
    ]:
        item = ItemFeatures(*(np.ones(3, np.int64) for _ in range(4)))
        now_ms = int(events.timestamp_ms[-1]) + 1
        inputs = model.inputs.for_candidates(found, item, now_ms, 0)
        with torch.no_grad():
            added = reading_of(model)(model.net.sequence.history(model.embed(inputs)))
        torch.testing.assert_close(added, (weight @ states)[None, :])


def test_a_block_whose_rows_nobody_gives_is_refused() -> None:
    events = random_events(np.random.default_rng(5), 1, 6)
    model = reader(ranker(1, 1))
    memory = InProcessMemory(model.config.namespace)
    inputs = model.inputs.for_training(events, memory.fetch(np.unique(events.user_id), N))
    with pytest.raises(ValueError, match="pass block_memory_BLD, or set error_layers to 0"):
        outputs(model, inputs, None)


def test_a_narrower_reader_reads_the_same_rows() -> None:
    """The width of rows is the memory's, whatever that of the attention that reads them."""
    writer = ranker(2, 2)
    narrow = replace(writer.config, stage="cascading", attention_dim=8)
    assert state_widths(narrow) == state_widths(writer.config)
    model = build_model(narrow)
    events = random_events(np.random.default_rng(6), 2, 20)
    memory = InProcessMemory(narrow.namespace)
    assert isinstance(model, Cascader)
    found = read_along(model, writer, events, 5, memory)
    assert torch.isfinite(found).all()


def test_retrieval_leaves_errors_alone() -> None:
    config = replace(ranker(3, 2).config, stage="retrieval")
    assert build_model(config).net.sequence.errors is None
    assert config.read_depth == 3  # the third layer is of attention
    assert replace(config, error_layers=3).read_depth == 0
