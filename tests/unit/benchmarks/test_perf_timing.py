import gc

import numpy as np
import pytest

from benchmarks.perf.timing import Case, ratio_of_medians, time_in_turn


def test_cases_take_turns_and_only_run_is_given_what_was_drawn() -> None:
    calls: list[tuple[str, int]] = []
    drawn = iter(range(1_000))

    def case(name: str) -> Case:
        return Case(lambda: next(drawn), lambda argument: calls.append((name, argument)))

    seconds = time_in_turn({"a": case("a"), "b": case("b")}, rounds=2, repeats=3, warmup_rounds=1)
    assert [name for name, _ in calls] == ["a"] * 3 + ["b"] * 3 + (["a"] * 3 + ["b"] * 3) * 2
    assert [argument for _, argument in calls] == list(range(18))
    assert seconds["a"].shape == seconds["b"].shape == (2, 3)
    assert np.all(seconds["a"] > 0)


def test_the_collector_is_on_again_after_an_error() -> None:
    def fail(argument: object) -> None:
        assert not gc.isenabled()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        time_in_turn({"a": Case(lambda: None, fail)}, rounds=1, repeats=1)
    assert gc.isenabled()


def test_a_ratio_is_of_medians_over_all_rounds_and_spreads_over_rounds() -> None:
    slow = np.array([[2.0, 2.0, 90.0], [4.0, 4.0, 4.0], [6.0, 6.0, 6.0]])
    fast = np.full((3, 3), 2.0)
    ratio = ratio_of_medians(slow, fast)
    assert ratio.value == 2.0
    assert (ratio.lower_quartile, ratio.upper_quartile) == (1.5, 2.5)
