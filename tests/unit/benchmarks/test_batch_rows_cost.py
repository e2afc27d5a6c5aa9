"""Every layout of a batch's own rows is measured, and says when it was taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.perf import batch_rows
from benchmarks.perf.batch_rows import ratio

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", ["marm_l1", "stca_l1"])
def test_all_layouts_are_measured(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    world = "world:num_users=300,num_items=50,num_events=900"
    sizes = ["--events", "900", "--rounds", "1", "--history", "5", "--batch-sizes", "16", "900"]
    output = tmp_path / "result.json"
    batch_rows.main(["--data", world, "--method", method, "--output", str(output), *sizes])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads(output.read_text())
    keys = {f"{name}_over_whole_{size}" for name in ("by_user", "chosen") for size in (16, 900)}
    assert keys <= set(found)
    assert min(found[key] for key in keys) > 0
    shares = [found["medians"][f"chosen_{size}_share_by_user"] for size in (16, 900)]
    assert shares[0] == 0, "sixteen events: no user may have more than one"
    assert shares[1] == 1, "of 900 events a user may have ninety"
    assert found["medians"]["events_per_user_900"] > found["medians"]["events_per_user_16"] >= 1


def test_a_ratio_is_of_medians() -> None:
    found = ratio({"whole": [1.0, 2.0, 4.0], "chosen": [1.0, 1.0, 8.0]}, "chosen", "whole")
    assert (found.value, found.lower_quartile, found.upper_quartile) == (0.5, 0.75, 1.5)
