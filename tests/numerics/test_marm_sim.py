"""MARM with SIM: training against plain loops, against plain MARM, and against serving."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from interest_histories import SITUATIONS, random_history, random_queries
from sample_events import fetch_for, make_events, make_items, small_model
from torch import Tensor, nn

from marm import searched_keys
from marm.amortised import UserHistory
from marm.config import InterestConfig, ModelConfig
from marm.interest.interface import History, InterestOutput
from marm.interest.memory_augmented import MemoryAugmented
from marm.interest.methods import build_interest
from marm.items import ItemFeatures
from marm.key_reading import Keys
from marm.memory import InProcessMemory, Namespace
from marm.ranker import Ranker
from marm.reference import decode_history
from marm.scoring_plan import ScoringPlan
from marm.search import AllRows, TopRows
from marm.search_reference import searched_outputs
from marm.searched_keys import found_keys
from marm.sequence import raw_rows

DEPTHS = [1, 2, 4]
DIM = 8


pytestmark = pytest.mark.usefixtures("one_thread")


def method_of(name: str, depth: int, top_k: int = 3) -> MemoryAugmented:
    """A method of double precision whose every parameter is random, the same for both names."""
    torch.manual_seed(depth)
    config = ModelConfig(
        namespace=Namespace(depth=depth, dim=DIM, dtype="float32"),
        depth=depth,
        attention_dim=DIM,
        feature_dim=6,
    )
    method = build_interest(config, InterestConfig(method=name, top_k=top_k))
    assert isinstance(method, MemoryAugmented)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return method.double()


def history_of(situation: str, depth: int, cached_block: bool = False) -> History:
    """A random history with cached vectors, some rows without."""
    history = random_history(situation, seed=depth)
    generator = torch.Generator().manual_seed(depth)
    users, num_rows = history.slab.features.shape[:2]

    def vectors(*shape: int) -> Tensor:
        return 3 * torch.randn(*shape, depth, DIM, generator=generator, dtype=torch.float64)

    visible = history.slab.visible
    memorised = visible & (torch.rand(visible.shape, generator=generator) < 0.7)
    block = vectors(len(visible)) if cached_block and history.block is not None else None
    return replace(
        history,
        memory_UNLD=vectors(users, num_rows),
        memorised_BN=memorised,
        block_memory_BLD=block,
    )


def seen_history(history: History, query: int, past: list[Tensor], depth: int) -> UserHistory:
    """What one query sees, slab rows first; ``past`` has y_1..y_L of the queries before it."""
    slab, block = history.slab, history.block
    line = query if len(slab.visible) > 1 else 0
    assert slab.user_row is not None
    user = int(slab.user_row[line])
    live, memory = slab.features[user], history.memory_UNLD[user]
    visible, memorised = slab.visible[line], history.memorised_BN[line]
    distance, gap = slab.distance[line], slab.gap[line]
    if block is not None:
        own = torch.zeros(len(block.features), depth, DIM, dtype=torch.float64)
        if history.block_memory_BLD is not None:
            own = history.block_memory_BLD
        elif past:
            own[: len(past)] = torch.stack(past)
        seen = block.visible[query]
        live, memory = torch.cat([live, block.features]), torch.cat([memory, own])
        visible, memorised = torch.cat([visible, seen]), torch.cat([memorised, seen])
        distance = torch.cat([distance, block.distance[query]])
        gap = torch.cat([gap, block.gap[query]])
    return UserHistory(live, memory, visible, memorised, distance, gap)


def reference_outputs(method: MemoryAugmented, queries: Tensor, history: History) -> list[Tensor]:
    """y_1..y_{L+1}, query by query, row by row, head by head."""
    depth, past, outputs = len(method.attention.layers), [], []
    for number, query_F in enumerate(queries):
        seen = seen_history(history, number, past, depth)
        layers = searched_outputs(method.attention, method.attention.search, query_F[None], seen)
        outputs.append(torch.cat(layers))
        past.append(outputs[-1][:-1])
    return list(torch.stack(outputs, dim=1))


def assert_outputs(known: InterestOutput, expected: list[Tensor]) -> None:
    for ours, theirs in zip([*known.rows, known.interest_BD], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cached_block", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, 100])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_equals_plain_loops(situation: str, depth: int, top_k: int, cached_block: bool) -> None:
    method = method_of("marm_sim", depth, top_k)
    history, queries = history_of(situation, depth, cached_block), random_queries(depth)
    with torch.no_grad():
        known = method(queries, history)
    assert_outputs(known, reference_outputs(method, queries, history))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_is_exactly_marm_where_all_rows_are_found(situation: str, depth: int) -> None:
    history, queries = history_of(situation, depth), random_queries(depth)
    num_rows = history.slab.visible.sum(dim=1)
    if history.block is not None:
        num_rows = num_rows + history.block.visible.sum(dim=1)
    most = int(num_rows.max())
    plain, all_found, too_few = (
        method_of(name, depth, top_k)
        for name, top_k in (("marm", 1), ("marm_sim", most), ("marm_sim", most - 1))
    )
    width = history.slab.visible.shape[1] + (0 if history.block is None else len(queries))
    assert not all_found.attention.search.takes_all(width)  # it does search, and finds them all
    expected = [*plain(queries, history).rows, plain(queries, history).interest_BD]
    known = all_found(queries, history)
    for ours, theirs in zip([*known.rows, known.interest_BD], expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(too_few(queries, history).interest_BD, expected[-1])
    gradients = [
        torch.autograd.grad(
            method(queries, history).interest_BD.sum(), method.attention.first.query.weight
        )
        for method in (plain, all_found)
    ]
    assert torch.equal(gradients[0][0], gradients[1][0])


KEY_VALUE = nn.Linear(1, 2, bias=False)


def keys_of(scores: list[float], visible: list[int], user_row: Tensor | None) -> Keys:
    """Rows whose bias is their score. Their only feature is their number, from 1."""
    number_N1 = torch.arange(1.0, len(scores) + 1).unsqueeze(1)
    inputs = number_N1 if user_row is None else number_N1.expand(2, -1, -1)
    seen_BN = torch.tensor(visible, dtype=torch.bool).expand(2, -1)
    return Keys(
        inputs, seen_BN, torch.tensor(scores, dtype=torch.float32).expand(2, 1, -1), user_row
    )


def rows_found(
    k: int, slab: tuple[list[float], list[int]], block: tuple[list[float], list[int]]
) -> tuple[list[float], list[float]]:
    """Numbers of the rows of slab and block that both of two users' queries attend to."""
    key_sets = [keys_of(*slab, torch.tensor([1, 0])), keys_of(*block, None)]
    narrowed = found_keys(TopRows(k), torch.zeros(2, 1, 1), KEY_VALUE, key_sets)
    numbers = []
    for keys in narrowed:
        of_query = keys.parts[0].values.expand(2, -1, -1)[..., 0]
        found = [
            sorted(row[seen].tolist()) for row, seen in zip(of_query, keys.visible, strict=True)
        ]
        assert found[0] == found[1]
        numbers.append(found[0])
    return numbers[0], numbers[1]


@pytest.fixture(params=["copied", "hidden"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searched_keys, "COPY_COST", 1 if request.param == "copied" else 10**9)


@pytest.mark.usefixtures("way")
def test_rows_of_all_key_sets_are_searched_together() -> None:
    assert rows_found(2, ([1, 5, 2], [1, 1, 1]), ([4, 9], [1, 0])) == ([2], [1])
    assert rows_found(2, ([6, 5, 2], [1, 1, 1]), ([4, 9], [1, 0])) == ([1, 2], [])


@pytest.mark.usefixtures("way")
def test_among_equal_scores_any_are_taken_and_never_more_than_k() -> None:
    slab, block = rows_found(3, ([7] * 20, [1] * 20), ([7] * 20, [1] * 20))
    assert len(slab) + len(block) == 3
    slab, block = rows_found(3, ([7] * 20, [1] * 20), ([8, 7], [1, 0]))
    assert (len(slab), block) == (2, [1])


@pytest.mark.usefixtures("way")
def test_hidden_rows_are_never_found() -> None:
    assert rows_found(3, ([9] * 17, [0] * 17), ([1], [1])) == ([], [1])
    assert rows_found(3, ([9] * 17, [0] * 17), ([1], [0])) == ([], [])


def test_what_needs_no_search_is_not_searched() -> None:
    key_sets = [keys_of([1, 2], [1, 1], torch.tensor([0, 1])), keys_of([1, 2], [1, 1], None)]
    for search in (AllRows(), TopRows(4)):
        assert found_keys(search, torch.zeros(2, 1, 1), KEY_VALUE, key_sets) is key_sets
    assert found_keys(TopRows(2), torch.zeros(2, 1, 1), KEY_VALUE, []) == []


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_copied_and_hidden_keys_give_the_same_numbers_and_gradients(
    situation: str, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, queries = method_of("marm_sim", depth), random_queries(depth)
    history = history_of(situation, depth)
    live_UNF = history.slab.features.requires_grad_()
    numbers = []
    for cost in (1, 10**9):
        monkeypatch.setattr(searched_keys, "COPY_COST", cost)
        known = method(queries, history)
        loss = sum(y.square().sum() for y in [*known.rows, known.interest_BD])
        leaves = [live_UNF, *method.parameters()]
        numbers.append([known.interest_BD, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(numbers[0], numbers[1], rtol=1e-9, atol=1e-9)


def searching_ranker(depth: int, top_k: int = 3) -> Ranker:
    namespace = Namespace(depth=depth, dim=DIM, dtype="float32")
    interests = (InterestConfig(method="marm_sim", top_k=top_k),)
    model = small_model("ranking", namespace=namespace, interests=interests, history_length=12)
    assert isinstance(model, Ranker)
    return model.eval()


@pytest.mark.parametrize("depth", DEPTHS)
def test_streaming_equals_the_decoder_and_what_is_served(depth: int) -> None:
    """Training through the memory, the O(n^2) reference, and a frozen model's answer agree."""
    model, events = searching_ranker(depth), make_events(90, 3)
    memory, logits = InProcessMemory(model.config.namespace), []
    for start in range(0, len(events), 17):
        batch = events.take(slice(start, start + 17))
        inputs = model.inputs.for_training(batch, fetch_for(batch, memory, 12))
        with torch.no_grad():
            prior = model.item_prior(model.item_slots(inputs))
            predicted = model.net(model.embed(inputs), prior)
            out, rows = predicted.best, predicted.rows_BLD
        logits.append(out)
        saved = raw_rows(batch, memory.namespace.row_dtype)
        saved["memory"], saved["written_step"] = rows.numpy(), start
        memory.save(batch.user_id, saved)
    trained = torch.cat(logits)
    for user in np.unique(events.user_id):
        own = np.flatnonzero(events.user_id == user)
        expected = decode_history(model, events.take(own)).logits_PT
        torch.testing.assert_close(trained[own], expected, rtol=1e-4, atol=1e-4)
    model.freeze(ScoringPlan())
    for number in (0, 40, 60, 89):
        user, now_ms = int(events.user_id[number]), int(events.timestamp_ms[number])
        item = ItemFeatures(
            *(
                column[number : number + 1]
                for column in (events.item_id, events.author_id, events.tag_id, events.duration_ms)
            )
        )
        past = memory.fetch(np.array([user]), 12, np.array([now_ms]))
        served = model.score(past, user, item, now_ms, int(events.context_id[number]))
        expected = model.probabilities(trained[number : number + 1])
        np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-5)


def test_a_plan_may_name_another_search() -> None:
    model, items, now_ms = searching_ranker(2), make_items(20), 1_700_000_000_000
    events = make_events(30, 1)
    rows = raw_rows(events, model.config.namespace.row_dtype)
    rows["memory"] = np.random.default_rng(0).normal(size=rows["memory"].shape)
    rows["written_step"] = 1
    memory = InProcessMemory(model.config.namespace)
    memory.save(events.user_id, rows)
    past = memory.fetch(np.array([0]), 12)

    def scores(plan: ScoringPlan) -> np.ndarray:
        model.freeze(plan)
        return model.score(past, 0, items, now_ms)

    own = scores(ScoringPlan())
    np.testing.assert_array_equal(scores(ScoringPlan(search=TopRows(3))), own)
    for other in (TopRows(2), AllRows()):
        assert np.abs(scores(ScoringPlan(search=other)) - own).max() > 1e-4
    overlap = model.layer_overlap
    with pytest.raises(ValueError, match="freeze it with a search"):
        overlap(past, 0, items, now_ms, 0)
    model.freeze(ScoringPlan())  # a search of its own is enough
    assert overlap(past, 0, items, now_ms, 0).shape == (3, 3)
