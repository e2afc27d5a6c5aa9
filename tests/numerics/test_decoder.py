"""The decoder against plain loops, against the reference of MARM, and against MARM itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from deep_histories import (
    SITUATIONS,
    DeepCase,
    PlainMethod,
    Seen,
    assert_same_gradients,
    deep_case,
    seen_bias,
)
from sample_events import fetch_for, make_events, replaced, small_model
from torch import Tensor

from marm.attention import TargetAttention
from marm.config import InterestConfig
from marm.events import EventBatch
from marm.interest.decoder import Decoder
from marm.memory import InProcessMemory, Namespace
from marm.ranker import Ranker
from marm.reference import _attend, _live_features, _look_up, decode_history
from marm.sequence import raw_rows

ITEM_COLUMNS = {
    "item": "item_id",
    "author": "author_id",
    "tag": "tag_id",
    "context": "context_id",
}


class PlainDecoder(PlainMethod):
    """A row's key is its live embedding and, above layer 0, what its item attended to."""

    def __init__(self, case: DeepCase, rows: EventBatch) -> None:
        assert isinstance(case.method, Decoder)
        self.attention = case.method.attention
        self.num_layers = len(self.attention.layers) + 1
        self.live = _live_features(case.model, case.model.net, rows)
        items = [
            _look_up(case.model, name, getattr(rows, column))
            for name, column in ITEM_COLUMNS.items()
        ]
        self.row_inputs = [list(torch.stack(items).sum(dim=0))]

    def token(self, query: Tensor) -> Tensor:
        return query

    def output(self, layer: int, x: Tensor, seen: list[Seen]) -> Tensor:
        attention = self.attention
        module = [attention.first, *attention.layers][layer]
        assert isinstance(module, TargetAttention)
        keys = [self._key(layer, one.row) for one in seen]
        stacked = torch.stack(keys) if keys else x.new_zeros(0, module.key_value.in_features)
        return _attend(module, x, stacked, seen_bias(attention.recency, layer, seen))

    def _key(self, layer: int, row: int) -> Tensor:
        live = self.attention.feature_norms[layer](self.live[row])
        if not layer:
            return live
        y = self.row_inputs[layer][row]
        return torch.cat([self.attention.memory_norms[layer - 1](y), live])


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize("layers", [0, 2])
def test_equals_plain_loops(situation: str, n: int, layers: int) -> None:
    case = deep_case(situation, n, method="decoder", layers=layers)
    actual = case.method(case.query_BF, case.history).interest_BD
    expected = case.reference(lambda rows: PlainDecoder(case, rows))
    assert_same_gradients(case, actual, expected)


def decoder_and_marm(layers: int, n: int) -> tuple[Ranker, Ranker]:
    """Two rankers of the same weights; without durations, as rows have none."""
    settings = {"history_length": n, "features": ("item", "author", "tag", "context")}
    marm = small_model(namespace=Namespace(depth=layers, dim=8, dtype="float32"), **settings)
    decoder = small_model(
        namespace=Namespace(depth=0, dim=8, dtype="float32"),
        interests=(InterestConfig(method="decoder", layers=layers),),
        **settings,
    )
    decoder.load_state_dict(marm.state_dict())
    assert isinstance(marm, Ranker)
    assert isinstance(decoder, Ranker)
    return decoder, marm


def logits_of(model: Ranker, batch: EventBatch, memory: InProcessMemory) -> tuple[Tensor, Tensor]:
    inputs = model.inputs.for_training(batch, fetch_for(batch, memory, model.config.history_length))
    with torch.no_grad():
        prior = model.item_prior(model.item_slots(inputs))
        logits, rows, _, _ = model.net(model.embed(inputs), prior)
    return logits, rows


@pytest.mark.parametrize("n", [1, 4, 50])
def test_a_whole_history_in_one_batch_equals_the_reference_of_marm(n: int) -> None:
    """All rows are given, so nothing is cut off: the banded decoder of `marm.reference`."""
    decoder, marm = decoder_and_marm(2, n)
    events = make_events(30, 2)
    memory = InProcessMemory(decoder.config.namespace)
    logits, _ = logits_of(decoder, events, memory)
    for user in (0, 1):
        own = np.flatnonzero(events.user_id == user)
        expected = decode_history(marm, events.take(own))
        torch.testing.assert_close(logits[own], expected.logits_PT, rtol=1e-4, atol=1e-4)


def test_marm_with_frozen_weights_and_a_fresh_memory_is_the_decoder() -> None:
    """Where histories fit into n, every row was memorised from all of its past."""
    decoder, marm = decoder_and_marm(2, 50)
    events = make_events(60, 3)
    memory = InProcessMemory(marm.config.namespace)
    raw_memory = InProcessMemory(decoder.config.namespace)
    for start in range(0, 60, 10):
        batch = events.take(slice(start, start + 10))
        expected, computed = logits_of(marm, batch, memory)
        logits, _ = logits_of(decoder, batch, raw_memory)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        rows = raw_rows(batch, memory.namespace.row_dtype)
        rows["memory"], rows["written_step"] = computed.numpy(), 1
        memory.save(batch.user_id, rows)
        raw_memory.save(batch.user_id, raw_rows(batch, raw_memory.namespace.row_dtype))


def test_stale_memory_is_where_marm_and_the_decoder_part() -> None:
    decoder, marm = decoder_and_marm(1, 50)
    events = make_events(20, 1)
    memory = InProcessMemory(marm.config.namespace)
    stale = raw_rows(events.take(slice(0, 10)), memory.namespace.row_dtype)
    stale["memory"], stale["written_step"] = 1.0, 1
    memory.save(np.zeros(10, np.int64), stale)
    raw_memory = InProcessMemory(decoder.config.namespace)
    raw = raw_rows(events.take(slice(0, 10)), raw_memory.namespace.row_dtype)
    raw_memory.save(np.zeros(10, np.int64), raw)
    batch = events.take(slice(10, 20))
    assert not torch.allclose(
        logits_of(marm, batch, memory)[0], logits_of(decoder, batch, raw_memory)[0]
    )


def test_a_row_asks_without_its_own_feedback() -> None:
    """The newest row's feedback reaches a query in its key alone, never in its state."""
    case = deep_case("request", 40, method="decoder", layers=1)
    method = case.method
    assert isinstance(method, Decoder)
    with torch.no_grad():
        # Live features then reach layers above the first through cached vectors only.
        method.attention.layers[0].key_value.weight[:, 8:] = 0
        method.attention.first.key_value.weight.zero_()
        before = method(case.query_BF, case.history).interest_BD
        slab = replace(case.history.slab, features=case.history.slab.features + 1.0)
        after = method(case.query_BF, replace(case.history, slab=slab)).interest_BD
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_history_without_a_sequence_or_items_is_refused() -> None:
    case = deep_case("request", 5, method="decoder", layers=1)
    with pytest.raises(ValueError, match=r"needs History\.sequence, got None; build the inputs"):
        case.method(case.query_BF, replace(case.history, sequence=None))
    with pytest.raises(ValueError, match=r"set History\.items"):
        case.method(case.query_BF, replace(case.history, items=None))


def test_other_numbers_of_queries_than_placed_are_refused() -> None:
    case = deep_case("reading", 5, method="decoder", layers=1)
    with pytest.raises(ValueError, match="place 32 queries, got 3; only a view of one line"):
        case.method(case.query_BF[:3], case.history)


def test_events_that_do_not_enter_the_sequence_are_no_rows() -> None:
    """A batch in which only positives are rows equals the loops over positives."""
    settings = {"history_length": 6, "features": ("item", "author", "tag", "context")}
    marm = small_model(
        namespace=Namespace(depth=1, dim=8, dtype="float32", sequence="like"), **settings
    )
    decoder = small_model(
        namespace=Namespace(depth=0, dim=8, dtype="float32", sequence="like"),
        interests=(InterestConfig(method="decoder", layers=1),),
        **settings,
    )
    decoder.load_state_dict(marm.state_dict())
    events = replaced(make_events(25, 1), user_id=np.zeros(25, np.int64))
    logits, _ = logits_of(decoder, events, InProcessMemory(decoder.config.namespace))
    expected = decode_history(marm, events).logits_PT
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
