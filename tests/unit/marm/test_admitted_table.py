"""The admitted table against plain dictionaries, and against the hashed table in a model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sample_events import INT64, make_events, small_config
from torch import Tensor

from marm.admitted_table import NUM_SHARED, WAYS, AdmittedTable
from marm.config import ModelConfig, TableConfig
from marm.memory import UserRows
from marm.model_factory import Model, build_model, build_unfilled
from marm.probe import probe
from marm.sparse import FEATURE_SALTS

ADMIT_AFTER, KEEP_EVENTS = 3, 20


def make_table(num_slots: int = 64) -> AdmittedTable:
    torch.manual_seed(0)
    return AdmittedTable(num_slots, 4, ADMIT_AFTER, KEEP_EVENTS)


def see(table: AdmittedTable, ids: list[int], times: int = 1, feature: str = "item") -> None:
    """One event for every id, so often."""
    for _ in range(times):
        table.observe(lambda: torch.from_numpy(table.slots(feature, np.array(ids)))[:, None])


def rows(table: AdmittedTable, ids: list[int], feature: str = "item") -> list[int]:
    return table.find(table.slots(feature, np.array(ids))).tolist()


def has_own(table: AdmittedTable, one: int, feature: str = "item") -> bool:
    return rows(table, [one], feature)[0] >= NUM_SHARED


def test_addresses_take_any_integer_and_name_their_feature() -> None:
    table = make_table()
    ids = np.array([[0, -1, INT64.min], [5, 7, INT64.max]])
    for feature, salt in FEATURE_SALTS.items():
        addresses = table.slots(feature, ids)
        assert addresses.shape == ids.shape
        assert (addresses > 0).all()
        assert (addresses % NUM_SHARED == salt).all()
        assert len(np.unique(addresses)) == 6


def test_unseen_ids_share_a_row_per_feature() -> None:
    table = make_table()
    assert rows(table, [1, 2, 3]) == [FEATURE_SALTS["item"]] * 3
    assert rows(table, [1], "user") == [FEATURE_SALTS["user"]]


def test_an_id_is_admitted_when_it_was_seen_often_enough() -> None:
    table = make_table()
    see(table, [5], ADMIT_AFTER - 1)
    assert not has_own(table, 5)
    see(table, [5])
    assert has_own(table, 5)
    assert not has_own(table, 5, "user")
    assert table.num_admitted == 1


def test_several_times_in_one_batch_count() -> None:
    table = make_table()
    see(table, [5] * ADMIT_AFTER)
    assert has_own(table, 5)


def test_a_row_begins_as_the_shared_one() -> None:
    table = make_table()
    row = FEATURE_SALTS["item"]
    table.apply_gradient(torch.tensor([row]), torch.ones(1, 4), 0.1)
    see(table, [5], ADMIT_AFTER)
    own = rows(table, [5])[0]
    torch.testing.assert_close(table.weight[own], table.weight[row], rtol=0, atol=0)
    assert table.squared_gradient[own] == 0
    assert table.squared_gradient[row] > 0


def test_ids_that_come_once_displace_nothing_that_is_in_use() -> None:
    table = make_table()
    regulars = list(range(20))
    see(table, regulars, ADMIT_AFTER)
    kept = [one for one in regulars if has_own(table, one)]
    assert len(kept) >= 15  # a bucket may be full
    before = rows(table, kept)
    for stranger in range(100, 3000, 10):
        see(table, list(range(stranger, stranger + 10)))
        if stranger % 20 == 0:
            see(table, kept)
    assert rows(table, kept) == before
    assert table.num_admitted == len(kept)


def test_ids_unseen_for_long_make_room() -> None:
    table = make_table(num_slots=WAYS)  # one bucket
    old, new = list(range(WAYS)), 100
    see(table, old, ADMIT_AFTER)
    assert table.num_admitted == WAYS
    see(table, [new], ADMIT_AFTER)
    assert not has_own(table, new)  # nobody is out of date yet
    see(table, old[1:], 3)  # more than KEEP_EVENTS events, and 0 is not among them
    see(table, [new], ADMIT_AFTER)
    assert has_own(table, new)
    assert [has_own(table, one) for one in old] == [False] + [True] * (WAYS - 1)


def test_an_id_keeps_its_row_while_nobody_needs_it() -> None:
    table = make_table()
    see(table, [5], ADMIT_AFTER)
    see(table, [6], 10 * KEEP_EVENTS)
    assert has_own(table, 5)


@dataclass
class _Entry:
    count: int
    seen_at: int


class PlainTable:
    """What the table does, said with a list of dictionaries, one id after the other."""

    def __init__(self, num_buckets: int) -> None:
        self.buckets: list[list[tuple[int, _Entry] | None]] = [
            [None] * WAYS for _ in range(num_buckets)
        ]
        self.now = 0

    def observe(self, seen: NDArray[np.int64]) -> None:
        self.now += len(seen)
        addresses, times = np.unique(seen, return_counts=True)
        unknown = []
        for address, amount in zip(addresses.tolist(), times.tolist(), strict=True):
            entry = self._entry(address)
            if entry is None:
                unknown.append((address, amount))
                continue
            entry.count += amount
            entry.seen_at = self.now
        for address, amount in unknown:
            self._take_in(address, amount)

    def admitted(self) -> set[int]:
        return {
            place[0]
            for bucket in self.buckets
            for place in bucket
            if place is not None and place[1].count >= ADMIT_AFTER
        }

    def _bucket(self, address: int) -> list[tuple[int, _Entry] | None]:
        return self.buckets[(address >> 3) % len(self.buckets)]

    def _entry(self, address: int) -> _Entry | None:
        found = [place[1] for place in self._bucket(address) if place and place[0] == address]
        return found[0] if found else None

    def _take_in(self, address: int, amount: int) -> None:
        bucket = self._bucket(address)
        order = []
        for way, place in enumerate(bucket):
            if place is None:
                order.append((0, 0, way))
            elif place[1].seen_at == self.now:
                continue
            elif place[1].count < ADMIT_AFTER:
                order.append((1, place[1].seen_at, way))
            elif self.now - place[1].seen_at > KEEP_EVENTS:
                order.append((2, place[1].seen_at, way))
        if order:
            bucket[min(order)[2]] = (address, _Entry(amount, self.now))


def test_equals_the_plain_table_on_any_stream() -> None:
    rng = np.random.default_rng(4)
    table, plain = make_table(num_slots=4 * WAYS), PlainTable(4)
    for step in range(120):
        ids = np.minimum(rng.zipf(1.3, 12), 10**6) + step // 8
        seen = table.slots("item", ids)
        plain.observe(seen)
        table.observe(lambda seen=seen: torch.from_numpy(seen)[:, None])
        places = table.ids[table.counts >= ADMIT_AFTER].tolist()
        assert set(places) == plain.admitted()
        assert len(places) == len(set(places))
    assert table.num_admitted > 8
    assert int(table.num_seen) == plain.now


def admitted_config(stage: str = "ranking") -> ModelConfig:
    return small_config(
        stage, table=TableConfig(kind="admitted", admit_after=2, keep_events=100), num_slots=64
    )


def no_rows(config: ModelConfig, users: NDArray[np.int64]) -> UserRows:
    distinct = np.unique(users)
    offsets = np.zeros(len(distinct) + 1, np.int64)
    return UserRows(distinct, offsets, np.empty(0, config.namespace.row_dtype))


def trained_model(stage: str) -> Model:
    """A model whose table has admitted some of the probe's ids, with rows of their own."""
    torch.manual_seed(1)
    model = build_model(admitted_config(stage))
    events = make_events(30)
    events.item_id[:] %= 5
    inputs = model.inputs.for_training(events, no_rows(model.config, events.user_id))
    table = model.table
    for _ in range(2):
        table.observe(lambda: torch.from_numpy(inputs.target_slots_BK))
    assert isinstance(table, AdmittedTable)
    assert table.num_admitted > 3
    with torch.no_grad():
        table.weight.add_(torch.randn_like(table.weight))
    return model


@pytest.mark.parametrize("stage", ["ranking", "cascading", "retrieval"])
def test_a_served_model_looks_ids_up_as_training_does(stage: str) -> None:
    model = trained_model(stage)
    served = build_unfilled(model.config)
    served.load_state_dict(dict(model.state_dict()), assign=True)
    served.eval()
    np.testing.assert_array_equal(probe(served), probe(model.eval()))
    addresses = model.table.slots("item", np.arange(8))
    np.testing.assert_array_equal(served.table.find(addresses), model.table.find(addresses))


def test_training_and_inference_embed_alike() -> None:
    model = trained_model("ranking")
    events = make_events(12)
    inputs = model.inputs.for_training(events, no_rows(model.config, events.user_id))
    learned, served = model.embed(inputs), model.look_up(inputs)
    for name in ("target_BF", "user_BF", "context_BF", "slab_UNF", "block_BF"):
        ours, theirs = getattr(learned, name), getattr(served, name)
        torch.testing.assert_close(ours, theirs.squeeze(1) if ours.dim() < theirs.dim() else theirs)
    assert len(torch.unique(learned.sparse.slots)) == len(learned.sparse.slots)


def test_shared_rows_collect_the_gradient_of_all_their_ids() -> None:
    table = make_table()
    gathered, (position,) = table.rows_of(table.slots("item", np.array([1, 2, 3, 1])))
    assert gathered.slots.tolist() == [FEATURE_SALTS["item"]]
    gathered.gather(position).sum().backward()
    assert isinstance(gathered.values.grad, Tensor)
    assert gathered.values.grad.tolist() == [[4.0] * 4]


def test_configuration_refuses_and_survives_json() -> None:
    config = admitted_config()
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"table kind must be one of .* got 'lru'"):
        TableConfig(kind="lru")
    for name in ("admit_after", "keep_events"):
        with pytest.raises(ValueError, match=f"table {name} must be an integer of at least 1"):
            TableConfig(**{name: 0})
    with pytest.raises(ValueError, match="num_slots must be at least 8, got 7"):
        build_model(replace(config, num_slots=7))
