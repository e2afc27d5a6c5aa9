from __future__ import annotations

import json

import pytest
import torch

from benchmarks.perf import score_turns


@pytest.fixture
def same_threads():
    threads = torch.get_num_threads()
    yield threads
    torch.set_num_threads(threads)


def test_both_ways_are_compared(capsys, same_threads):
    turn = ["--rounds", "1", "--round-s", "0.01", "--sizes", "1", "--clients", "2"]
    score_turns.main([*turn, "--threads", str(same_threads)])
    lines = capsys.readouterr().out.splitlines()
    ratios = json.loads(lines[-1])["score_turns"]["n50_m20_d32_l2"]
    assert set(ratios) == {"beside", "in_turn"}
    assert set(ratios["beside"].values()) == {1.0}
    assert len(lines) == 1 + 2 + 1
