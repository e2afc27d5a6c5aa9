"""From results to tables, plots and programs; the names of methods; laws fitted to points."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks.paper import ablations, fig5, fig6, rq4_cost, table1, table2
from benchmarks.paper.ablations import VARIATIONS, choose, vary
from benchmarks.paper.cost_streams import CostPoint
from benchmarks.paper.datasets import Dataset, load_dataset
from benchmarks.paper.fig5 import Size, fit_cache_sizes
from benchmarks.paper.plan import CommonSettings, parse_method, parse_methods
from benchmarks.paper.power_law import PowerLaw, SaturatingPowerLaw, fit_law
from benchmarks.paper.report import method_rows, methods_table, rows_to_dict
from benchmarks.paper.statistics import Spread
from benchmarks.paper.trial import Cost, Predictions, TrialResult
from marm.events import EventBatch

WORLD = "world:num_users=12,num_items=40,num_events=500"
SMALL = ["--data", WORLD, "--dim", "8", "--history", "12", "--batch-size", "64"]


def make_result(seed: int, signal: float) -> TrialResult:
    count = 600
    label = (np.random.default_rng(7).random(count) < 0.5).astype(np.float32)
    noise = np.random.default_rng([seed, 3]).normal(size=count)
    score = 1 / (1 + np.exp(-(noise + signal * label)))
    found = Predictions(np.arange(count) % 20, label, score.astype(np.float32), np.arange(count))
    return TrialResult({}, {"test": found, "tuning": found}, Cost(count, 2.0, 1.0, {}))


def test_rows_of_a_table() -> None:
    results = {
        "weak": [make_result(seed, 0.2) for seed in range(2)],
        "strong": [make_result(seed, 1.0) for seed in range(2)],
    }
    rows = method_rows(results, {"weak": "Weak", "strong": "Strong"}, "test")
    assert rows[1].differences["weak"].is_gain
    assert rows[0].differences["strong"].difference.high < 0
    assert rows[0].events_per_s.mean == 300
    assert rows[0].events_per_cpu_s.mean == 600
    table = methods_table(rows, ["weak"]).splitlines()
    assert table[0].startswith("| method | AUC | GAUC | log loss | GAUC less Weak |")
    gauc, gain = rows[1].quality["gauc"], rows[1].differences["weak"].difference
    assert f"{gauc.mean:.4f} ± {gauc.std:.4f}" in table[3]
    assert f"{gain.value:+.4f} ({gain.low:+.4f} .. {gain.high:+.4f})" in table[3]
    assert {line.count("|") for line in table} == {8}
    document = json.loads(json.dumps(rows_to_dict(rows), allow_nan=False))
    assert document["strong"]["gauc_difference_to"]["weak"]["difference"] > 0
    assert document["strong"]["gauc"]["values"] == pytest.approx(gauc.values, abs=1e-6)


def test_a_method_that_diverged_is_shown_and_compared_with_nothing() -> None:
    broken = make_result(0, 1.0)
    broken.windows["test"].score[5] = np.nan
    results = {"good": [make_result(0, 1.0)], "bad": [broken]}
    rows = method_rows(results, {"good": "Good", "bad": "Bad"}, "test")
    assert [row.differences for row in rows] == [{}, {}]
    document = json.loads(json.dumps(rows_to_dict(rows), allow_nan=False))
    assert document["bad"]["gauc"]["mean"] is None
    assert document["good"]["gauc"]["std"] is None  # one seed
    assert "| Bad | nan |" in methods_table(rows, ["good"])


def test_names_of_methods() -> None:
    assert parse_method("marm").name == parse_method("marm_l2").name == "marm_l2"
    assert parse_method("marm_l4").depth == 4
    assert parse_method("hstu_l3").interests[0].layers == 3
    assert parse_method("twin_v2").interests[0].method == "twin_v2"
    assert parse_method("marm_l1").title == "MARM (L=1)"
    searching = parse_method("marm_sim_l4")
    assert (searching.name, searching.depth) == ("marm_sim_l4", 4)
    assert searching.title == "MARM + SIM (L=4)"
    assert searching.interests[0].method == "marm_sim"
    for wrong, reason in {
        "transformer": "no method is called 'transformer'",
        "din_l2": "din has no layers",
        "": "no method is called ''",
    }.items():
        with pytest.raises(ValueError, match=reason):
            parse_method(wrong)
    with pytest.raises(ValueError, match="named once, got din, twin, din"):
        parse_methods("din,twin,din")
    assert [one.name for one in parse_methods(table1.METHODS)] == table1.METHODS.split(",")
    assert [one.name for one in parse_methods(table2.METHODS)] == table2.METHODS.split(",")


def test_ensembles_hold_every_method_once() -> None:
    ensemble = parse_method("sum_pooling+din").plus(parse_method("marm_l1"))
    assert (ensemble.name, ensemble.depth) == ("sum_pooling+din+marm_l1", 1)
    deeper = ensemble.plus(parse_method("marm_l4"))
    assert (deeper.name, deeper.depth) == ("sum_pooling+din+marm_l4", 4)
    wider = deeper.plus(parse_method("twin"))
    assert (wider.name, wider.depth) == ("sum_pooling+din+marm_l4+twin", 4)
    assert parse_method(wider.name) == wider
    searching = deeper.plus(parse_method("marm_sim_l2"))  # a model has one memory
    assert (searching.name, searching.depth) == ("sum_pooling+din+marm_sim_l2", 2)
    assert parse_method("marm_sim_l2+din").plus(parse_method("marm_l1")).name == "din+marm_l1"


def test_all_share_the_common_settings() -> None:
    dataset = make_dataset(("item",))
    common = CommonSettings(history_length=7, dim=16, top_k=3, batch_size=5)
    for method in parse_methods(table1.METHODS):
        config = common.train_config(dataset, method, 9)
        model = config.models[0]
        assert (config.seed, config.batch_size, model.history_length) == (9, 5, 7)
        assert (model.attention_dim, model.feature_dim, model.namespace.dim) == (16, 16, 16)
        assert model.depth == model.namespace.depth == method.depth
        assert {one.top_k for one in model.interests} == {3}


def make_dataset(features: tuple[str, ...]) -> Dataset:
    nothing = np.zeros(0, np.bool_)
    return Dataset(
        "nothing", EventBatch.empty(), nothing, nothing, features, ("long_view",), ("distance",)
    )


@pytest.mark.parametrize(
    ("method", "as_it_is", "impossible"),
    [
        ("marm_l2", "no_errors", []),
        (
            "marm_e_l2",
            "two_errors",
            [
                "rows_int8",
                "upper_lr_third",
                "upper_lr_triple",
                "zero_upper",
                "vectors_alone",
                "cut_batch_gradient",
            ],
        ),
    ],
)
def test_every_variation_is_a_valid_configuration(
    method: str, as_it_is: str, impossible: list[str]
) -> None:
    dataset = make_dataset(("item", "tag"))
    base = CommonSettings().train_config(dataset, parse_method(method), 0)
    changed, refused = vary(base, VARIATIONS)
    assert list(refused) == impossible
    same = {name for name, config in changed.items() if config == base}
    assert same == {"distance_only", as_it_is}  # as data and method have it: nothing to vary
    others = [config for name, config in changed.items() if name not in same]
    assert len({json.dumps(config.to_dict()) for config in others}) == len(others)
    assert [one.name for one in choose("depth_4, no_tag")] == ["depth_4", "no_tag"]
    with pytest.raises(ValueError, match="no variation is called depth_9"):
        choose("depth_9")


def test_laws_find_the_parameters_of_their_points() -> None:
    size = np.array([100.0, 200, 400, 800, 1600, 3200])
    fit = fit_law(PowerLaw(), size.tolist(), (0.6 * size**0.02).tolist())
    assert fit is not None
    assert fit.parameters["a"].value == pytest.approx(0.6)
    assert fit.parameters["b"].value == pytest.approx(0.02)
    assert fit.rmse < 1e-9
    noise = np.random.default_rng(0).normal(0, 1e-3, len(size))
    noisy = fit_law(PowerLaw(), size.tolist(), (0.6 * size**0.02 + noise).tolist())
    assert noisy is not None
    b = noisy.parameters["b"]
    assert 0 < b.error < 0.002
    assert abs(b.value - 0.02) < 3 * b.error
    saturating = fit_law(SaturatingPowerLaw(), size.tolist(), (0.75 - 0.4 * size**-0.5).tolist())
    assert saturating is not None
    assert saturating.parameters["limit"].value == pytest.approx(0.75)
    assert saturating.parameters["b"].value == pytest.approx(0.5)
    np.testing.assert_allclose(saturating.at(size), 0.75 - 0.4 * size**-0.5, rtol=1e-6)


def test_points_that_say_too_little() -> None:
    assert fit_law(PowerLaw(), [100.0, 100.0], [0.7, 0.71]) is None
    just_enough = fit_law(PowerLaw(), [100.0, 200.0], [0.7, 0.71])
    assert just_enough is not None
    assert math.isnan(just_enough.parameters["b"].error)
    assert json.loads(json.dumps(just_enough.to_dict(), allow_nan=False))["parameters"]
    grows_for_ever = [0.1 * size for size in (1.0, 2.0, 3.0, 4.0, 5.0)]
    assert fit_law(SaturatingPowerLaw(), [1.0, 2.0, 3.0, 4.0, 5.0], grows_for_ever) is None
    with pytest.raises(ValueError, match="all of them positive"):
        fit_law(PowerLaw(), [0.0, 1.0], [0.7, 0.7])


def test_sizes_are_compared_with_their_neighbours() -> None:
    deep = [fig5.Size(depth, n, 8) for depth in (0, 1, 4) for n in (10, 40)]
    found = fig5.compared_sizes(deep)
    assert found[fig5.Size(0, 10, 8)] == {}
    assert found[fig5.Size(4, 40, 8)] == {
        "L=0": fig5.Size(0, 40, 8),
        "the next fewer layers": fig5.Size(1, 40, 8),
        "the next shorter n": fig5.Size(4, 10, 8),
    }
    assert fig5.compared_sizes(deep[2:])[fig5.Size(1, 10, 8)] == {}


def test_a_share_that_falls_has_no_limit_to_grow_to() -> None:
    sizes = [1_000.0, 2_000.0, 4_000.0, 8_000.0, 16_000.0]
    falls = (0.70 + 0.3 * np.array(sizes) ** -0.4).tolist()
    assert fit_law(SaturatingPowerLaw(), sizes, falls) is None
    assert fit_law(PowerLaw(), sizes, falls).parameters["b"].value < 0


def cost_point(cpu_s: float, macs: float = 0.0) -> CostPoint:
    return CostPoint(2 * cpu_s, cpu_s, macs, 0.0, 0.0, 0.0, 0.0)


def test_cost_of_a_life() -> None:
    """A cost that grows by 1 for every 100 rows, of which the first 100 count as the 100th."""
    points = {n: cost_point(n / 100, 7.0) for n in (100, 200, 400)}
    whole = rq4_cost.life(points)
    assert whole.cpu_s == pytest.approx(100 * 1 + 100 * 1.5 + 200 * 3)
    assert whole.seconds == pytest.approx(2 * whole.cpu_s)
    assert whole.macs == pytest.approx(400 * 7.0)
    assert rq4_cost.life({50: cost_point(2.0)}).cpu_s == 100


def test_costs_over_seeds_are_medians() -> None:
    by_seed = [{"din": {10: cost_point(cpu_s)}} for cpu_s in (1.0, 9.0, 2.0)]
    assert rq4_cost.over_seeds(by_seed)["din"][10] == cost_point(2.0)


def test_sizes_without_a_cache_are_not_fitted() -> None:
    gauc = {
        Size(depth, n, 32): Spread.of([0.7 * max(depth * n, 1) ** 0.01])
        for depth in (0, 1, 2)
        for n in (50, 100)
    }
    fit = fit_cache_sizes(gauc)["power_law"]
    assert fit is not None
    assert fit.parameters["b"].value == pytest.approx(0.01)


def test_chance_overlap() -> None:
    assert fig6.overlap_by_chance(20, 20) == 1
    rng = np.random.default_rng(0)
    drawn = [set(rng.permutation(50)[:20].tolist()) for _ in range(400)]
    shares = [len(a & b) / len(a | b) for a, b in zip(drawn[::2], drawn[1::2], strict=True)]
    assert fig6.overlap_by_chance(20, 50) == pytest.approx(np.mean(shares), abs=0.02)


@pytest.mark.parametrize(
    ("program", "options", "key"),
    [
        (table1, ["--methods", "sum_pooling,marm_l1,marm_l0"], "methods"),
        (table2, ["--methods", "sum_pooling,din,marm_l1"], "steps"),
        (fig5, ["--dims", "4,8", "--lengths", "6,12", "--depths", "0,1"], "power_law"),
        (fig5, ["--method", "marm_e", "--dims", "8", "--lengths", "6,12", "--dim", "8"], "points"),
        (fig6, ["--depth", "1", "--top-k", "4", "--users", "3", "--candidates", "5"], "overlap"),
        (fig6, ["--method", "marm_sim", "--depth", "1", "--top-k", "4", "--users", "2"], "overlap"),
        (ablations, ["--variations", "depth_0,clipping", "--method", "marm_l1"], "variations"),
        (rq4_cost, ["--depth", "1", "--lengths", "6,12", "--slice-events", "64"], "points"),
    ],
)
def test_programs_run(
    program: ModuleType, options: list[str], key: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [*SMALL, "--seeds", "1", "--scratch", str(tmp_path / "scratch")]
    program.main([*arguments, "--out", str(tmp_path / "out"), *options])
    last_line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last_line["settings"]["seeds"] == 1
    assert last_line[key]
    by_suffix = {path.suffix: path for path in (tmp_path / "out").iterdir()}
    assert set(by_suffix) == {".json", ".md", ".png"}
    assert json.loads(by_suffix[".json"].read_text()) == last_line
    assert by_suffix[".png"].stat().st_size > 5_000
    assert by_suffix[".md"].read_text().startswith("# ")


def test_what_a_method_does_not_allow_is_left_out_and_said(capsys: pytest.CaptureFixture) -> None:
    options = ["--method", "marm_e_l2", "--variations", "depth_1,rows_int8", "--dim", "8"]
    ablations.main([*SMALL, "--seeds", "1", *options])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["variations"]) == {"default", "depth_1"}
    assert list(found["refused"]) == ["rows_int8"]
    assert "error_layers needs rows of float16" in found["refused"]["rows_int8"]


def test_as_many_layers_of_errors_as_layers() -> None:
    base = CommonSettings().train_config(load_dataset(WORLD), parse_method("marm_e_l2"), 0)
    (fewer,) = choose("depth_1")
    model = fewer.apply(base).models[0]
    assert (model.depth, model.error_layers, model.namespace.depth) == (1, 1, 1)
