"""The pool beyond one Ray cluster on one node: a lost node, and a second cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cache_actors.pool.lifecycle import describe_pool, start_pool, stop_pool

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 240.0

START_ELSEWHERE = """
import sys
from pathlib import Path
import ray
from cache_actors.pool.home_lease import PoolInUseError
from cache_actors.pool.lifecycle import start_pool
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 << 20)
try:
    start_pool(Path(sys.argv[1]))
except PoolInUseError as error:
    print(error)
"""


def run_python(*arguments: str) -> str:
    """What a Python process of its own prints."""
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


def test_a_lost_node_costs_no_row_and_no_read(tmp_path: Path) -> None:
    output = run_python(str(REPOSITORY / "tests" / "node_loss.py"), str(tmp_path))
    report = json.loads(output.strip().splitlines()[-1])
    assert report["lost_replicas"] >= 1
    assert report["unavailable_users"] == 0
    assert report["missing_rows"] == 0
    assert report["members"] == 4
    assert report["nodes_by_shard"] == [2, 2]


def test_a_single_replica_stays_with_its_files_unless_its_node_is_lost(tmp_path: Path) -> None:
    output = run_python(str(REPOSITORY / "tests" / "process_restarts.py"), str(tmp_path))
    assert json.loads(output.strip().splitlines()[-1]) == {
        "nodes": 3,
        "stayed_after_kills": True,
        "stayed_after_a_stop": True,
        "left_the_lost_node": True,
    }


@pytest.mark.usefixtures("ray_cluster")
def test_a_second_ray_cluster_is_refused(tmp_path: Path) -> None:
    pool = start_pool(tmp_path, 1)
    output = run_python("-c", START_ELSEWHERE, str(tmp_path))
    assert "is run by another Ray cluster" in output
    assert len(describe_pool(pool)) == 1
    stop_pool(pool)
