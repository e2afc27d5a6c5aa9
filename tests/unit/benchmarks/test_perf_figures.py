import json
from pathlib import Path

import pytest

from benchmarks.perf.figures import (
    Figure,
    Measured,
    Target,
    at_least,
    at_most,
    data_name,
    exactly,
    json_line,
    print_table,
    write_result,
)
from benchmarks.perf.timing import Ratio


@pytest.mark.parametrize(
    ("target", "value", "holds"),
    [
        (at_most(3.0), 3.0, True),
        (at_most(3.0), 3.1, False),
        (at_least(1.0), 1.0, True),
        (at_least(1.0), 0.9, False),
    ],
)
def test_a_target_includes_its_bound(target: Target, value: float, holds: bool) -> None:
    assert target.holds(value) is holds
    assert Figure("key", "what", exactly(value), target).holds is holds


def test_the_result_names_every_figure_and_whether_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = [
        Measured(
            (
                Figure("good", "a / b", Ratio(2.0, 1.5, 2.5), at_most(3.0)),
                Figure("bad", "c / d", Ratio(0.123456, 0.1, 0.2), at_least(1.0)),
                Figure("plain", "e / f", exactly(7.0)),
            ),
            {"a_ms": 12.34567},
        )
    ]
    print_table("title", measured)
    output = tmp_path / "results" / "result.json"
    write_result(json_line("some", measured, {"seed": 5}, 1.23), str(output))
    printed = capsys.readouterr().out.splitlines()
    content = json.loads(printed[-1])
    assert content == json.loads(output.read_text())
    assert (content["good"], content["bad"], content["plain"]) == (2.0, 0.1235, 7.0)
    assert content["all_hold"] is False
    assert content["figures"]["good"]["holds"] is True
    assert content["figures"]["bad"]["target"] == {"bound": "at_least", "value": 1.0}
    assert content["figures"]["plain"]["holds"] is None
    assert content["medians"] == {"a_ms": 12.35}
    assert content["settings"] == {"seed": 5}
    assert any("NO" in line and "bad" in line for line in printed)


def test_a_result_names_its_data_and_not_where_it_was() -> None:
    assert data_name("/somewhere/on/this/machine/ratings.parquet") == "ratings.parquet"
    assert data_name("world:num_users=30,induction_strength=0.5") == (
        "world:num_users=30,induction_strength=0.5"
    )
