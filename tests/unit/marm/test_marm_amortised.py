"""The fast path of inference against the plain one: same numbers, whatever is asked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sample_events import NOW_MS, make_items, rows_of_user, small_model
from torch import Tensor

from marm import frozen_layer
from marm.amortised import AmortisedAttention, UserHistory
from marm.attention import MultiLayerTargetAttention
from marm.attention_kernel import KernelAttention
from marm.batch_rows import KeySource
from marm.cascader import Cascader
from marm.frozen_layer import FrozenLayer
from marm.kernels.native_code import host_registers
from marm.key_inputs import Workspace
from marm.layer_end import LayerEndKernel
from marm.memory import Namespace, UserRows
from marm.normed_linear import NormedLinearKernel
from marm.precision import (
    FullPrecision,
    HalfPrecision,
    Precision,
    build_precision,
    fast_half_precision,
)
from marm.ranker import Ranker
from marm.row_projection import ProjectionKernel
from marm.scoring_plan import ScoringPlan
from marm.search import AllRows, Categories, RowSearch, SameCategory, TopRows
from marm.search_reference import searched_outputs
from marm.sequence import NUM_DISTANCE_BUCKETS, NUM_GAP_BUCKETS

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(host_registers() is None, reason="no fused multiply-add here")
PRECISIONS = [FullPrecision(), HalfPrecision()]
FEATURES = 12


@pytest.fixture(autouse=True)
def nothing_learns(one_thread: None) -> Iterator[None]:
    """Requests are scored without gradients."""
    with torch.inference_mode():
        yield


def attention_of(
    depth: int,
    num_heads: int,
    dim: int = 16,
    query_dim: int = FEATURES,
    scale: float = 0.1,
    features: int = FEATURES,
) -> MultiLayerTargetAttention:
    """Random weights, every bias and norm included."""
    with torch.inference_mode(False):
        torch.manual_seed(depth * 10 + num_heads)
        attention = MultiLayerTargetAttention(
            query_dim, features, dim, dim, depth, num_heads, ("distance", "gap")
        )
        for parameter in attention.parameters():
            parameter.data.add_(scale * torch.randn_like(parameter))
        return attention.requires_grad_(False).eval()


def history_of(
    num_rows: int,
    depth: int,
    dim: int = 16,
    num_candidates: int = 0,
    hidden: float = 0.2,
    raw: float = 0.3,
    seed: int = 0,
    features: int = FEATURES,
) -> UserHistory:
    """Random rows; about ``hidden`` of them are not seen and ``raw`` have no vectors."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, size: int) -> Tensor:
        return torch.randint(0, high, (size,), generator=generator)

    visible = torch.rand(num_rows, generator=generator) >= hidden
    return UserHistory(
        torch.randn(num_rows, features, generator=generator),
        torch.randn(num_rows, depth, dim, generator=generator) * 3,
        visible,
        visible & (torch.rand(num_rows, generator=generator) >= raw),
        integers(NUM_DISTANCE_BUCKETS, num_rows),
        integers(NUM_GAP_BUCKETS, num_rows),
        Categories(
            integers(4, num_candidates),
            integers(4, num_candidates),
            integers(4, num_rows),
            integers(4, num_rows),
        ),
    )


def plain_outputs(
    attention: MultiLayerTargetAttention, query: Tensor, history: UserHistory
) -> list[Tensor]:
    """The reference: one user's slab with masks."""
    slab = KeySource(
        history.live_NF[None],
        history.visible_N[None],
        history.distance_N[None],
        history.gap_N[None],
        torch.zeros(len(query), dtype=torch.int64),
    )
    return attention(query, slab, history.memory_NLD[None], history.memorised_N[None])


def assert_agree(fast: list[Tensor], plain: list[Tensor], precision: Precision) -> None:
    assert len(fast) == len(plain)
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == theirs.shape
        largest = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=precision.tolerance * largest + 1e-6)


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("depth", range(5))
def test_the_fast_path_equals_the_plain_one(
    depth: int, num_heads: int, precision: Precision
) -> None:
    attention = attention_of(depth, num_heads)
    fast = AmortisedAttention(attention, precision)
    for num_candidates, num_rows in [(1, 40), (3, 1), (70, 33), (600, 1700), (5, 0), (0, 4)]:
        history = history_of(num_rows, depth, seed=num_rows)
        query = torch.randn(num_candidates, FEATURES)
        assert_agree(
            fast.outputs(query, history), plain_outputs(attention, query, history), precision
        )


def kernels_of(attention: MultiLayerTargetAttention) -> AmortisedAttention:
    """Frozen in single precision; every layer computes by kernels."""
    fast = AmortisedAttention(attention, FullPrecision())
    for layer in fast._layers:
        assert isinstance(layer._query, NormedLinearKernel)
        assert isinstance(layer._projection, ProjectionKernel)
        assert isinstance(layer._attention, KernelAttention)
        assert isinstance(layer._end, LayerEndKernel)
    return fast


@needs_kernels
@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize(("query_dim", "features", "dim"), [(64, 16, 64), (32, 64, 128)])
@pytest.mark.parametrize("depth", [0, 2])
def test_the_kernels_together_equal_the_plain_path(
    depth: int, query_dim: int, features: int, dim: int, num_heads: int
) -> None:
    attention = attention_of(depth, num_heads, dim, query_dim, features=features)
    fast = kernels_of(attention)
    for num_candidates, num_rows in [(1, 40), (3, 1), (24, 7), (70, 33), (600, 300), (5, 0)]:
        history = history_of(num_rows, depth, dim, seed=num_rows, features=features)
        query = torch.randn(num_candidates, query_dim)
        plain = plain_outputs(attention, query, history)
        assert_agree(fast.outputs(query, history), plain, FullPrecision())


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_may_be_other_numbers(dtype: torch.dtype) -> None:
    attention = attention_of(2, 4, dim=64, query_dim=64, features=16).to(dtype)
    fast = kernels_of(attention)
    history, query = history_of(50, 2, dim=64, features=16), torch.randn(30, 64)
    plain = plain_outputs(attention.float(), query, history)
    assert_agree(fast.outputs(query, history), plain, FullPrecision())


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(("hidden", "raw"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.5, 0.5)])
def test_masks_leave_rows_out(precision: Precision, hidden: float, raw: float) -> None:
    attention = attention_of(2, 2)
    history = history_of(50, 2, hidden=hidden, raw=raw)
    query = torch.randn(9, FEATURES)
    fast = AmortisedAttention(attention, precision).outputs(query, history)
    assert_agree(fast, plain_outputs(attention, query, history), precision)


def test_layers_whose_vectors_were_not_read_have_no_rows() -> None:
    attention = attention_of(3, 2)
    history = history_of(20, 1)
    query = torch.randn(4, FEATURES)
    fast = AmortisedAttention(attention, FullPrecision()).outputs(query, history)
    assert_agree(fast, plain_outputs(attention, query, history), FullPrecision())


@pytest.mark.parametrize("num_rows", [3, 100], ids=["few rows", "many rows"])
def test_linear_maps_convert_what_they_are_given(num_rows: int) -> None:
    x, weight = torch.randn(num_rows, 8, dtype=torch.float64), torch.randn(600, 8)
    got = FullPrecision().linear(x, weight)
    torch.testing.assert_close(got, x.float() @ weight.t(), rtol=1e-5, atol=1e-5)


def test_queries_may_be_as_wide_as_the_attention() -> None:
    attention = attention_of(1, 2, dim=FEATURES)
    history = history_of(20, 1, dim=FEATURES)
    query = torch.randn(4, FEATURES)
    fast = AmortisedAttention(attention, FullPrecision()).outputs(query, history)
    assert_agree(fast, plain_outputs(attention, query, history), FullPrecision())


def test_the_cheaper_association_is_chosen_by_shape() -> None:
    attention = attention_of(1, 4)
    layer = attention.layers[0]
    frozen = FrozenLayer(layer, FullPrecision(), Workspace())  # type: ignore[arg-type]
    width, dim = 16 + FEATURES, 16
    limit = width * dim / (1.5 * 4 * width - dim)
    assert frozen.absorbs(int(limit))
    assert not frozen.absorbs(int(limit) + 1)


def test_both_associations_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, history = attention_of(2, 4), history_of(30, 2)
    query = torch.randn(6, FEATURES)
    outputs = []
    for absorb in (True, False):
        monkeypatch.setattr(FrozenLayer, "absorbs", lambda _self, _m, absorb=absorb: absorb)
        outputs.append(AmortisedAttention(attention, FullPrecision()).outputs(query, history))
    assert_agree(outputs[0], outputs[1], FullPrecision())


def test_logits_too_large_for_a_bare_exponential_are_still_right() -> None:
    attention = attention_of(1, 2, scale=3.0)
    history = history_of(60, 1)
    query = torch.randn(5, FEATURES) * 10
    fast = AmortisedAttention(attention, FullPrecision()).outputs(query, history)
    assert all(y.isfinite().all() for y in fast)


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize(
    "search", [TopRows(1), TopRows(7), TopRows(500), SameCategory("tag", 6), AllRows()]
)
def test_searched_attention_equals_gathering(
    search: RowSearch, depth: int, num_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_layer, "_SEARCH_BLOCK_BYTES", 4 * 200)  # several blocks
    attention = attention_of(depth, num_heads)
    for num_rows in (0, 1, 90):
        history = history_of(num_rows, depth, num_candidates=5, seed=num_rows)
        query = torch.randn(5, FEATURES)
        fast = AmortisedAttention(attention, FullPrecision(), search).outputs(query, history)
        plain = searched_outputs(attention, search, query, history)
        assert_agree(fast, plain, FullPrecision())


def test_searching_for_all_rows_is_dense_attention() -> None:
    attention, history = attention_of(2, 4), history_of(30, 2)
    query = torch.randn(6, FEATURES)
    dense = plain_outputs(attention, query, history)
    assert_agree(searched_outputs(attention, TopRows(100), query, history), dense, FullPrecision())


def test_half_precision_finds_nearly_the_same_rows() -> None:
    attention, history = attention_of(2, 4), history_of(300, 2)
    query = torch.randn(8, FEATURES)
    found: list[list] = [[], []]
    for precision, into in zip((FullPrecision(), HalfPrecision()), found, strict=True):
        AmortisedAttention(attention, precision, TopRows(20)).outputs(query, history, into)
    for exact, rough in zip(*found, strict=True):
        for ours, theirs in zip(exact.position.tolist(), rough.position.tolist(), strict=True):
            assert len(set(ours) & set(theirs)) >= 15


def test_a_precision_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert fast_half_precision(CPU) is None
    assert isinstance(build_precision("auto", CPU), FullPrecision)
    with pytest.raises(ValueError, match="Use fp32 or auto"):
        build_precision("bf16", CPU)
    with pytest.raises(ValueError, match="precision must be one of"):
        build_precision("fp8", CPU)
    with pytest.raises(ValueError, match="precision must be one of"):
        ScoringPlan("fp8")


@pytest.mark.parametrize(
    ("capabilities", "kind"),
    [
        ({"avx512_bf16": True}, FullPrecision),
        ({"avx512_bf16": True, "amx_bf16": True}, HalfPrecision),
    ],
)
def test_auto_takes_the_units_that_a_cpu_has(
    capabilities: dict[str, bool], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert type(build_precision("auto", CPU)) is kind


@pytest.mark.parametrize(
    "build",
    [lambda: TopRows(0), lambda: SameCategory("tag", 0), lambda: SameCategory("colour", 3)],
)
def test_a_search_that_finds_nothing_is_refused(build: object) -> None:
    with pytest.raises(ValueError, match=r"search (finds|is by)"):
        build()  # type: ignore[operator]


def scores(model: Ranker | Cascader, rows: UserRows) -> np.ndarray:
    return model.score(rows, 5, make_items(7), NOW_MS, 1)


@pytest.mark.parametrize("stage", ["ranking", "cascading"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("num_rows", [0, 1, 30])
def test_a_frozen_model_scores_as_before(stage: str, dtype: str, num_rows: int) -> None:
    model = small_model(stage, namespace=Namespace(depth=2, dim=8, dtype=dtype))
    assert isinstance(model, Ranker | Cascader)
    rows = rows_of_user(model.config.namespace, 5, num_rows)
    rows.rows["written_step"][::3] = -1
    plain = scores(model.eval(), rows)
    model.freeze(ScoringPlan())
    np.testing.assert_allclose(scores(model, rows), plain, rtol=1e-5, atol=1e-6)


def test_new_weights_end_the_freeze() -> None:
    model, other = small_model("ranking"), small_model("ranking", seed=1)
    assert isinstance(model, Ranker)
    assert isinstance(other, Ranker)
    rows = rows_of_user(model.config.namespace, 5, 20)
    model.freeze(ScoringPlan())
    before = scores(model, rows)
    model.load_state_dict(other.state_dict())
    after = scores(model, rows)
    np.testing.assert_allclose(after, scores(other, rows), rtol=1e-5)
    assert not np.allclose(before, after)
    model.freeze(ScoringPlan())
    model.train()
    model.load_state_dict({name: x * 0.5 for name, x in model.state_dict().items()})
    assert not np.allclose(scores(model, rows), after)


def test_layers_find_other_rows_and_their_overlap_is_told() -> None:
    model = small_model("ranking", history_length=200)
    assert isinstance(model, Ranker)
    rows = rows_of_user(model.config.namespace, 5, 150)
    ask = (rows, 5, make_items(6), NOW_MS, 0)
    with pytest.raises(ValueError, match="freeze it with a search"):
        model.layer_overlap(*ask)
    model.freeze(ScoringPlan(search=TopRows(10)))
    overlap = model.layer_overlap(*ask)
    assert overlap.shape == (3, 3)
    np.testing.assert_array_equal(np.diag(overlap), 1.0)
    np.testing.assert_array_equal(overlap, overlap.T)
    assert 0 < overlap[0, 1] < 1
    model.freeze(ScoringPlan(search=TopRows(500)))
    np.testing.assert_array_equal(model.layer_overlap(*ask), 1.0)
    model.freeze(ScoringPlan(search=SameCategory("author", 10)))
    np.testing.assert_array_equal(model.layer_overlap(*ask), 1.0)


def test_candidates_do_not_depend_on_their_number() -> None:
    """Blocks of candidates: all weights of 8,000 over 6,400 rows at once would be 800 MB."""
    attention = attention_of(0, 4)
    history = history_of(6400, 0, num_candidates=8000, hidden=0.0)
    query = torch.randn(8000, FEATURES)
    for search in (AllRows(), TopRows(50)):
        fast = AmortisedAttention(attention, FullPrecision(), search)
        outputs = fast.outputs(query, history)
        assert outputs[0].isfinite().all()
        some = fast.outputs(query[4000:4005], history)
        torch.testing.assert_close(outputs[0][4000:4005], some[0], rtol=1e-3, atol=1e-4)
