"""One Ray cluster at a time runs a pool."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from cache_actors.pool import home_lease
from cache_actors.pool.home_lease import Heartbeat, HomeLease, PoolInUseError, has_ended_here


def test_a_cluster_takes_its_own_lease_again(tmp_path: Path) -> None:
    for _ in range(2):
        HomeLease(tmp_path, "a:1").acquire()
    assert HomeLease(tmp_path, "a:1").beat()
    assert not HomeLease(tmp_path, "b:2").beat()


def test_a_pool_that_was_given_up_is_free(tmp_path: Path) -> None:
    HomeLease(tmp_path, "a:1").acquire()
    HomeLease(tmp_path, "b:2").release()  # not its own
    assert not HomeLease(tmp_path, "b:2").beat()
    HomeLease(tmp_path, "a:1").release()
    HomeLease(tmp_path, "b:2").acquire()
    assert not HomeLease(tmp_path, "a:1").beat()


def test_a_living_cluster_keeps_others_out(tmp_path: Path) -> None:
    lease = HomeLease(tmp_path, "a:1")
    lease.acquire()
    heartbeat = Heartbeat(lease, lost=lambda: None)
    with pytest.raises(PoolInUseError, match=r"another Ray cluster \(a:1; this one is b:2\)"):
        HomeLease(tmp_path, "b:2").acquire()
    heartbeat.close()
    assert lease.beat()


def test_the_lease_of_a_dead_cluster_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home_lease, "LEASE_S", 0.5)
    monkeypatch.setattr(home_lease, "BEAT_INTERVAL_S", 0.05)
    dead = HomeLease(tmp_path, "a:1")
    dead.acquire()
    HomeLease(tmp_path, "b:2").acquire()
    lost = threading.Event()
    heartbeat = Heartbeat(dead, lost.set)
    assert lost.wait(30)
    heartbeat.close()


def test_beats_of_several_shards_move_the_lease_together(tmp_path: Path) -> None:
    leases = [HomeLease(tmp_path, "a:1") for _ in range(4)]
    leases[0].acquire()
    before = leases[0]._read()
    for _ in range(3):
        assert all(lease.beat() for lease in leases)
    after = leases[0]._read()
    assert before is not None
    assert after is not None
    assert after.beat > before.beat


@pytest.mark.parametrize("text", ["", "nonsense", "{}"])
def test_a_damaged_lease_belongs_to_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / "lease.json").write_text(text)
    HomeLease(tmp_path, "b:2").acquire()
    assert HomeLease(tmp_path, "b:2").beat()


def test_a_cluster_that_ended_on_this_machine_is_not_waited_for(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home_lease, "LEASE_S", 10**6)
    HomeLease(tmp_path, f"127.0.0.1:{free_port}").acquire()
    HomeLease(tmp_path, "127.0.0.1:1").acquire()


@pytest.mark.parametrize("cluster", ["a:1", "nonsense", "198.51.100.1:6379", "127.0.0.1:x"])
def test_nothing_is_said_of_clusters_elsewhere(cluster: str) -> None:
    assert not has_ended_here(cluster)


def test_a_cluster_that_answers_has_not_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not has_ended_here(f"127.0.0.1:{server.getsockname()[1]}")
