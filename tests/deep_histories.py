"""Batches for methods whose rows attend to one another; what each token sees, in plain loops."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sample_events import fetch_for, make_events, replaced, small_model
from torch import Tensor

from marm.attention import RecencyBias
from marm.config import InterestConfig
from marm.events import EventBatch
from marm.interest.interface import History, Interest
from marm.items import ItemFeatures
from marm.memory import InProcessMemory, Namespace, UserRows
from marm.ranker import Ranker
from marm.sequence import distance_bucket, gap_bucket, raw_rows

LATE_USER, EMPTY_USER = 7, 8
SITUATIONS = ("training", "reading", "request")


@dataclass(frozen=True)
class Seen:
    """A row as a token sees it."""

    row: int
    distance: int
    gap_ms: int


class PlainMethod(ABC):
    """Layers over one user's rows, one token at a time."""

    num_layers: int
    row_inputs: list[list[Tensor]]  # of each layer reached so far, those of all rows

    @abstractmethod
    def token(self, query: Tensor) -> Tensor:
        """What enters layer 0 for a query."""

    @abstractmethod
    def output(self, layer: int, x: Tensor, seen: list[Seen]) -> Tensor:
        """A layer's output for one token that sees ``seen`` of the rows."""


@dataclass(frozen=True)
class DeepCase:
    """A method, its inputs, and the events behind them."""

    model: Ranker
    method: Interest
    query_BF: Tensor
    history: History
    events: EventBatch  # all events; rows are given by their keys
    given: UserRows  # stored rows that the model was given
    batch: EventBatch  # queries; in training also rows
    situation: str

    @property
    def n(self) -> int:
        """History length."""
        return self.model.config.history_length

    def given_rows(self, user: int) -> EventBatch:
        """All rows of one user that the batch has, in the order of storage."""
        position = self.given.user_ids.tolist().index(user)
        keys = self.given.of(position)["event_key"].tolist()
        if self.situation == "training":
            keys += self.batch.event_key[self.batch.user_id == user].tolist()
        rows = self.events.take(np.isin(self.events.event_key, np.array(keys, np.uint64)))
        return rows.take(np.lexsort((rows.event_key, rows.timestamp_ms)))

    def seen(self, rows: EventBatch, now_ms: int) -> list[Seen]:
        """The newest n of ``rows`` strictly before ``now_ms``, oldest first."""
        earlier = [i for i in range(len(rows)) if rows.timestamp_ms[i] < now_ms]
        found = [
            Seen(row, len(earlier) - number, now_ms - int(rows.timestamp_ms[row]))
            for number, row in enumerate(earlier)
        ]
        return found[-self.n :]

    def kept(self, user: int, rows: EventBatch) -> list[int]:
        """Rows that any query of the user sees."""
        stamps = self.batch.timestamp_ms[self.batch.user_id == user].tolist()
        return sorted({one.row for stamp in stamps for one in self.seen(rows, stamp)})

    def reference(self, plain: Callable[[EventBatch], PlainMethod]) -> Tensor:
        """What the method of each user's rows answers to every query, ``[B, D]``."""
        methods: dict[int, tuple[EventBatch, list[int], PlainMethod]] = {}
        outputs = []
        for number, query in enumerate(self.query_BF):
            at = number if len(self.batch) > 1 else 0
            user, now_ms = int(self.batch.user_id[at]), int(self.batch.timestamp_ms[at])
            if user not in methods:
                rows = self.given_rows(user)
                methods[user] = rows, self.kept(user, rows), plain(rows)
            rows, kept, method = methods[user]
            outputs.append(self._answer(method, rows, kept, now_ms, query))
        return torch.stack(outputs)

    def _answer(
        self, method: PlainMethod, rows: EventBatch, kept: list[int], now_ms: int, query: Tensor
    ) -> Tensor:
        def seen(stamp: int) -> list[Seen]:
            return [one for one in self.seen(rows, stamp) if one.row in kept]

        x = method.token(query)
        for layer in range(method.num_layers):
            if layer == len(method.row_inputs):
                below = method.row_inputs[-1]
                above = [
                    method.output(layer - 1, row, seen(int(rows.timestamp_ms[number])))
                    if number in kept
                    else row
                    for number, row in enumerate(below)
                ]
                method.row_inputs.append(above)
            x = method.output(layer, x, seen(now_ms))
        return x


def deep_events() -> EventBatch:
    """Events in time order, many of them simultaneous, of users 0..3, the late and the empty."""
    events = make_events(64, 4, 3)
    users = events.user_id.copy()
    users[[4, 9, 14, 19, 24, 40]] = LATE_USER
    users[50] = EMPTY_USER
    stamps = events.timestamp_ms // 5_000 * 5_000  # five events share a moment
    return replaced(events, user_id=users, timestamp_ms=stamps)


def deep_case(situation: str, n: int, **interest: object) -> DeepCase:
    """Half of the events stored, half as the batch; user `LATE_USER` has one late event in it and
    user `EMPTY_USER` no past."""
    torch.manual_seed(0)
    namespace = Namespace(depth=0, dim=8, dtype="float32")
    method = InterestConfig(**interest)  # type: ignore[arg-type]
    model = small_model(namespace=namespace, history_length=n, interests=(method,))
    assert isinstance(model, Ranker)
    events = deep_events()
    stored, batch = events.take(slice(0, 32)), events.take(slice(32, 64))
    late = events.timestamp_ms.copy()
    late[40] = events.timestamp_ms[15]
    events = replaced(events, timestamp_ms=late)
    batch = replaced(batch, timestamp_ms=late[32:])
    memory = InProcessMemory(namespace)
    memory.save(stored.user_id, raw_rows(stored, namespace.row_dtype))
    if situation == "training":
        given = fetch_for(batch, memory, n)
        inputs = model.inputs.for_training(batch, given)
    else:
        memory.save(batch.user_id, raw_rows(batch, namespace.row_dtype))
        given = memory.fetch(np.unique(batch.user_id), 100)
        if situation == "reading":
            inputs = model.inputs.for_reading(batch, given)
        else:
            batch = batch.take(slice(29, 30))
            given = memory.fetch(batch.user_id, 100)
            items = ItemFeatures(
                events.item_id[:6], events.author_id[:6], events.tag_id[:6], events.duration_ms[:6]
            )
            now_ms, context_id = int(batch.timestamp_ms[0]), int(batch.context_id[0])
            inputs = model.inputs.for_candidates(given, items, now_ms, context_id)
    model.table.weight.requires_grad_()
    embedded = model.embed(inputs)
    sequence = model.net.sequence
    return DeepCase(
        model,
        sequence.methods[0],
        embedded.target_BF + embedded.context_BF,
        sequence.history(embedded),
        events,
        given,
        batch,
        situation,
    )


def seen_bias(recency: RecencyBias, layer: int, seen: list[Seen]) -> Tensor:
    """Recency bias of rows in one layer, ``[H, rows]``."""
    distance = torch.from_numpy(distance_bucket(np.array([s.distance for s in seen], np.int64)))
    gap = torch.from_numpy(gap_bucket(np.array([s.gap_ms for s in seen], np.int64)))
    both = recency.distance[distance] + recency.gap[gap]
    return both.view(len(seen), recency.num_layers, recency.num_heads)[:, layer].T


def assert_same_gradients(case: DeepCase, actual: Tensor, expected: Tensor) -> None:
    """Both outputs, and the gradients of what they depend on, are the same."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    named = [*case.method.named_parameters(), ("table", case.model.table.weight)]
    weights = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    leaves = [leaf for _, leaf in named]
    got, wanted = (
        torch.autograd.grad((out * weights).sum(), leaves, retain_graph=True)
        for out in (actual, expected)
    )
    for (name, _), one, other in zip(named, got, wanted, strict=True):
        scale = float(other.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            one, other, rtol=1e-3, atol=1e-4 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )
