"""Tables that would not fit are refused before they are allocated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sample_events import small_config

from marm.config import ModelConfig, TableConfig
from marm.error_vectors import ErrorTable
from marm.model_factory import build_model
from marm.ranker import Ranker
from train.table_memory import (
    TableMemoryError,
    available_bytes,
    needed_bytes,
    require_table_memory,
)

HUGE = small_config(num_slots=1 << 40, feature_dim=64)  # hundreds of TiB: allocating it would fail


@pytest.mark.parametrize("kind", ["hashed", "admitted"])
def test_the_need_is_what_a_model_takes(kind: str) -> None:
    config = small_config(num_slots=4096, table=TableConfig(kind=kind), error_layers=2)
    model = build_model(config)
    assert isinstance(model, Ranker)
    tables = [model.table, *(of for of in model.error_tables if isinstance(of, ErrorTable))]
    assert len(tables) == 3
    buffers = [*model.stats.buffers(), *(one for of in tables for one in of.buffers())]
    taken = sum(buffer.numel() * buffer.element_size() for buffer in buffers)
    taken += sum(of._position_of_row.nbytes for of in tables)
    copy_too = needed_bytes([config]) / 2
    assert copy_too == pytest.approx(taken, rel=1e-2)


def test_a_table_that_outgrows_memory_is_refused() -> None:
    with pytest.raises(TableMemoryError, match=r"ranking 1,099,511,627,776 rows of 64.* need") as e:
        require_table_memory([HUGE], 8 << 30)
    assert f"{needed_bytes([HUGE]):,} bytes" in str(e.value)
    assert "8,589,934,592 (8.0 GiB) are available; lower num_slots" in str(e.value)


def test_workers_beside_each_other_need_as_much_each() -> None:
    models = [ModelConfig()]
    available = needed_bytes(models)
    require_table_memory(models, available)
    with pytest.raises(TableMemoryError, match="of 2 worker"):
        require_table_memory(models, 2 * available - 1, num_workers=2)


def test_nothing_is_refused_where_nobody_knows() -> None:
    require_table_memory([HUGE], None)


def test_what_is_available(tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    assert available_bytes(meminfo, cgroup) is None
    meminfo.write_text("MemTotal:  16 kB\nMemAvailable:    12 kB\n")
    assert available_bytes(meminfo, cgroup) == 12 * 1024
    cgroup.mkdir()
    (cgroup / "memory.current").write_text("7000\n")
    (cgroup / "memory.stat").write_text("anon 4000\ninactive_file 3000\n")
    (cgroup / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, cgroup) == 12 * 1024
    (cgroup / "memory.max").write_text("9000\n")
    assert available_bytes(meminfo, cgroup) == 9000 - 7000 + 3000


def test_here_it_is_known() -> None:
    found = available_bytes()
    assert found is None or found > torch.tensor([0]).element_size()
