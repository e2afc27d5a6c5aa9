from pathlib import Path

import numpy as np
import pytest

from benchmarks.perf.faults.ledger import Comparison, Ledger
from benchmarks.perf.faults.rows import is_wrong, make_rows
from marm.memory import InProcessMemory, Namespace

NAMESPACE = Namespace(depth=2, dim=4)
USERS = np.arange(5)
NUM_ROWS = 10


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Every user has rows 0..9 of step 1."""
    ledger = Ledger.create(tmp_path / "ledger", len(USERS), 16)
    ledger.acknowledge(*everything(1))
    return ledger


def everything(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    numbers = np.tile(np.arange(NUM_ROWS), len(USERS))
    return np.repeat(USERS, NUM_ROWS), numbers, np.full(len(numbers), step)


def memory_with(ledger: Ledger, step: int, without: int | None = None) -> InProcessMemory:
    users, numbers, steps = everything(step)
    kept = np.ones(len(users), np.bool_)
    if without is not None:
        kept[without] = False
    identifiers = ledger.users[users[kept]]
    memory = InProcessMemory(NAMESPACE)
    memory.save(identifiers, make_rows(NAMESPACE, identifiers, numbers[kept], steps[kept]))
    return memory


def read(ledger: Ledger, memory: InProcessMemory, n: int) -> Comparison:
    found = memory.fetch(ledger.users, n)
    return ledger.compare(NAMESPACE, USERS, ledger.promised(USERS), found, n)


@pytest.mark.parametrize("n", [3, 10, 100])
def test_a_sound_read_misses_nothing(ledger: Ledger, n: int) -> None:
    rows = len(USERS) * min(n, NUM_ROWS)
    assert read(ledger, memory_with(ledger, 1), n) == Comparison(rows, rows, 0)


def test_newer_steps_and_rows_that_nobody_promised_are_sound(ledger: Ledger) -> None:
    memory = memory_with(ledger, 2)
    identifiers = np.repeat(ledger.users, 2)
    numbers = np.tile([10, 11], len(USERS))
    memory.save(identifiers, make_rows(NAMESPACE, identifiers, numbers, np.full(10, 3)))
    # Of the newest five only three were promised.
    assert read(ledger, memory, 5) == Comparison(15, 15, 0)


def test_a_lost_row_is_missing(ledger: Ledger) -> None:
    compared = read(ledger, memory_with(ledger, 1, without=17), 100)
    assert (compared.missing_rows, compared.wrong_rows) == (1, 0)


def test_a_lost_newest_row_is_missing_from_a_short_read(ledger: Ledger) -> None:
    compared = read(ledger, memory_with(ledger, 1, without=9), 3)
    assert (compared.missing_rows, compared.wrong_rows) == (1, 0)


def test_a_row_of_an_older_step_is_missing(ledger: Ledger) -> None:
    memory = memory_with(ledger, 1)
    ledger.acknowledge(np.array([3]), np.array([4]), np.array([2]))
    assert read(ledger, memory, 100).missing_rows == 1


def test_an_empty_memory_misses_everything(ledger: Ledger) -> None:
    assert read(ledger, InProcessMemory(NAMESPACE), 100) == Comparison(50, 0, 0)


def test_another_process_sees_what_was_acknowledged(ledger: Ledger) -> None:
    other = Ledger(ledger.path, len(USERS), 16)
    ledger.acknowledge(np.array([2]), np.array([10]), np.array([7]))
    assert other.num_rows == 51
    assert other.promised(np.array([2]))[0, 10] == 7


@pytest.mark.parametrize(
    "field", ["event_key", "item_id", "timestamp_ms", "written_step", "written_s", "feedback"]
)
def test_any_changed_field_makes_a_row_wrong(field: str) -> None:
    users, numbers = np.array([7, 7, 8]), np.array([0, 1, 0])
    rows = make_rows(NAMESPACE, users, numbers, np.array([1, 1, 2]))
    assert not is_wrong(NAMESPACE, users, rows).any()
    rows[field][1] += 1
    assert is_wrong(NAMESPACE, users, rows).tolist() == [False, True, False]


def test_another_users_row_and_a_torn_memory_are_wrong() -> None:
    users, numbers = np.array([7, 7, 8]), np.array([0, 1, 0])
    rows = make_rows(NAMESPACE, users, numbers, np.array([1, 1, 2]))
    assert is_wrong(NAMESPACE, users[[0, 2, 2]], rows).tolist() == [False, True, False]
    rows["memory"][2, 1] = rows["memory"][0, 1]
    assert is_wrong(NAMESPACE, users, rows).tolist() == [False, False, True]


def test_a_wrong_row_counts_as_wrong_and_not_as_kept(ledger: Ledger) -> None:
    memory = memory_with(ledger, 1)
    found = memory.fetch(ledger.users, 100)
    found.rows["memory"][3] += 1
    compared = ledger.compare(NAMESPACE, USERS, ledger.promised(USERS), found, 100)
    assert (compared.wrong_rows, compared.missing_rows) == (1, 1)
