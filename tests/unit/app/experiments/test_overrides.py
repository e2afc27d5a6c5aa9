from __future__ import annotations

import pytest

from app.errors import RefusedError
from app.experiments.overrides import parse_overrides


def test_a_header_names_arms_by_stage():
    assert parse_overrides([]) == {}
    assert parse_overrides(["ranking=marm-l4"]) == {"ranking": "marm-l4"}
    assert parse_overrides([" retrieval = wide , ranking=din "]) == {
        "retrieval": "wide",
        "ranking": "din",
    }


def test_a_header_that_comes_twice_counts_whole():
    assert parse_overrides(["ranking=din", "retrieval=wide"]) == {
        "ranking": "din",
        "retrieval": "wide",
    }
    with pytest.raises(RefusedError, match="must name ranking once"):
        parse_overrides(["ranking=din", "ranking=din"])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "must be like 'ranking=marm-l4"),
        ("ranking", "got 'ranking'"),
        ("ranking=", "got 'ranking='"),
        ("rank=din", "with stages of"),
        ("ranking=din,", "got ''"),
        ("ranking=din,ranking=marm-l4", "must name ranking once"),
        ("ranking=" + "x" * 600, "at most 512 characters, got 608"),
    ],
)
def test_a_header_that_is_no_list_of_arms_is_refused(header, message):
    with pytest.raises(RefusedError, match=message):
        parse_overrides([header])
