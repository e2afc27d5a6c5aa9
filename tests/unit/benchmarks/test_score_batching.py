from __future__ import annotations

import json

import pytest
import torch

from benchmarks.perf import score_batching


@pytest.fixture
def same_threads():
    threads = torch.get_num_threads()
    yield threads
    torch.set_num_threads(threads)


def test_every_way_is_compared_with_computing_alone(capsys, same_threads):
    turn = ["--rounds", "1", "--round-s", "0.01", "--sizes", "1", "--clients", "2"]
    score_batching.main([*turn, "--threads", str(same_threads)])
    lines = capsys.readouterr().out.splitlines()
    ratios = json.loads(lines[-1])["score_batching"]["n50_m20_d32_l2"]
    assert set(ratios) == {"alone", "batch_0ms", "batch_2ms"}
    assert set(ratios["alone"].values()) == {1.0}
    assert len(lines) == 1 + 3 + 1
