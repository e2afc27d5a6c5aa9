from __future__ import annotations

import pickle

import pytest

from app.args import AppArgs, VariantArgs
from stages.index_args import ExactIndexArgs, HnswIndexArgs, IvfIndexArgs, parse_index_args


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("exact", ExactIndexArgs()),
        ({"kind": "exact"}, ExactIndexArgs()),
        ("ivf", IvfIndexArgs()),
        (
            {"kind": "ivf", "nlist": 512, "nprobe": 16, "min_recall": 0.9},
            IvfIndexArgs(nlist=512, nprobe=16, min_recall=0.9),
        ),
        (
            {"kind": "hnsw", "M": 24, "ef_construction": 80, "ef_search": 600, "recall_k": 500},
            HnswIndexArgs(M=24, ef_construction=80, ef_search=600, recall_k=500),
        ),
    ],
)
def test_a_name_or_a_section(written, expected):
    assert parse_index_args(written) == expected
    assert parse_index_args(expected) is expected
    variant = VariantArgs.model_validate({"index": written})
    assert variant.index == expected
    assert pickle.loads(pickle.dumps(variant.index)) == expected  # it travels to replicas


def test_the_index_is_exact_unless_configured():
    assert VariantArgs().index == ExactIndexArgs()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("magic", r"must be one of \['exact', 'hnsw', 'ivf'\], got 'magic'"),
        ({"kind": "magic"}, "must be one of .*, got 'magic'"),
        ({"nlist": 5}, "must be one of .*, got None"),
        (None, "must be one of"),
        (7, "must be one of"),
        ({"kind": ["ivf"]}, "must be one of"),
        ({"kind": "exact", "nlist": 5}, "Extra inputs"),
        ({"kind": "ivf", "M": 16}, "Extra inputs"),
        ({"kind": "hnsw", "nprobe": 16}, "Extra inputs"),
        ({"kind": "ivf", "nlist": 0}, "greater than or equal to 1"),
        ({"kind": "ivf", "nlist": 8, "nprobe": 9}, "nprobe must be at most nlist=8, got 9"),
        ({"kind": "ivf", "min_recall": 1.5}, "less than or equal to 1"),
        ({"kind": "ivf", "min_recall": "nan"}, "less than or equal to 1"),
        ({"kind": "ivf", "recall_k": 10_001}, "less than or equal to 10000"),
        ({"kind": "hnsw", "M": 2}, "greater than or equal to 4"),
        ({"kind": "hnsw", "ef_search": 0}, "greater than or equal to 1"),
    ],
)
def test_what_makes_no_sense_is_refused(written, message):
    with pytest.raises(ValueError, match=message):
        parse_index_args(written)
    with pytest.raises(ValueError, match=message):
        AppArgs.model_validate({"retrieval": {"variants": {"a": {"index": written}}}})


def test_only_retrieval_has_an_index():
    with pytest.raises(ValueError, match=r"one in ranking\.variants\.a; remove it"):
        AppArgs.model_validate({"ranking": {"variants": {"a": {"index": "ivf"}}}})
