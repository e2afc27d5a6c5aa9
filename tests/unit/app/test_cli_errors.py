"""What a user can mend ends in one clear line and exit code 1, and changes nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sample_events import make_events

from app.cli.main import cli
from cache_actors.event_log.log import EventLog
from cache_actors.home import Home

T0_S = 1_600_000_000

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `marm` with arguments; returns the exit code and what was said on stderr."""

    def call(*args: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["marm", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli()
        return int(ended.value.code or 0), capsys.readouterr().err

    return call


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything below ``path``, with contents."""
    return {
        str(found.relative_to(path)): found.read_bytes() if found.is_file() else None
        for found in sorted(path.rglob("*"))
    }


def assert_refused(run: Run, tmp_path: Path, message: str, *args: str | Path) -> None:
    before = tree(tmp_path)
    code, said = run(*args)
    assert code == 1
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    assert tree(tmp_path) == before


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Some sources, sound and not."""
    directory = tmp_path / "data"
    directory.mkdir()
    good = {"user_id": [1], "item_id": [2], "timestamp": [T0_S], "like": [1]}
    pq.write_table(pa.table(good), directory / "good.parquet")
    pq.write_table(pa.table({"user": [1], "item_id": [2], "like": [1]}), directory / "bare.parquet")
    (directory / "torn.parquet").write_bytes((directory / "good.parquet").read_bytes()[:-20])
    (directory / "ratings.csv").write_text("user,movie,stars\n1,2,3\n")
    (directory / "ratings.dat").write_text("1,2,3,4\n")
    (directory / "empty").mkdir()
    return directory


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["absent.parquet", "--format", "parquet"], "no such file: "),
        (["empty", "--format", "parquet"], "found no *.parquet in the directory"),
        (["good.parquet", "--format", "json"], "format must be one of movielens, kuairand"),
        (["bare.parquet", "--format", "parquet"], "--map user_id=COLUMN --map timestamp=COLUMN"),
        (["good.parquet", "--format", "parquet", "--map", "like"], "expected --map FIELD=COLUMN"),
        (["good.parquet", "--format", "parquet", "--map", "=like"], "expected --map FIELD=COLUMN"),
        (["good.parquet", "--format", "parquet", "--map", "mood=like"], "unknown field mood;"),
        (["good.parquet", "--format", "parquet", "--map", "click=hit"], "'hit' (for click)"),
        (
            [
                "good.parquet",
                "--format",
                "parquet",
                "--map",
                "click=like",
                "--map",
                "click=user_id",
            ],
            "names the field 'click' twice",
        ),
        (
            ["good.parquet", "--format", "parquet", "--timestamp-unit", "h"],
            "timestamp unit must be auto or s, ms, us",
        ),
        (["ratings.csv", "--format", "movielens"], "Expected the columns of MovieLens'"),
        (["ratings.dat", "--format", "movielens"], "does not look like ratings.dat"),
        (["ratings.csv", "--format", "movielens", "--map", "like=stars"], "--map and a timestamp"),
        (["torn.parquet", "--format", "parquet"], "torn.parquet"),
        (["good.parquet", "--format", "kuairand"], "good.parquet"),
    ],
)
def test_ingest_refuses(
    run: Run, data: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    source, *options = args
    home = ["--home", str(tmp_path / "home")]
    assert_refused(run, tmp_path, message, "ingest", data / source, *options, *home)


def test_messages_are_shown_as_they_are(run: Run, tmp_path: Path) -> None:
    """Brackets in a message are no markup."""
    path = tmp_path / "a[bold]b[/red]"
    args = ["ingest", path, "--format", "parquet", "--home", tmp_path / "home"]
    assert_refused(run, tmp_path, str(path), *args)
    pattern = "must match [a-z0-9][a-z0-9._-]*, got 'A B'"
    assert_refused(run, tmp_path, pattern, "train", "--variant", "A B", "--home", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "holds no events; fill it with `marm ingest` or `marm world` first"),
        (["--stages", "ranking,rerank"], "--stages must be some of ranking, cascading, retrieval"),
        (["--stages", ""], "models must be of distinct stages"),
        (["--tasks", "rate"], "tasks must be distinct names"),
        (["--tasks", ","], "tasks must name at least one"),
        (["--recency", "age"], "recency must be distinct names"),
        (["--sequence", "odd"], "sequence must be 'all' or a task"),
        (["--heads", "5"], "must divide attention_dim, got 5 heads"),
        (["--depth", "-1"], "depth >= 0"),
        (["--dim", "0"], "dim >= 1"),
        (["--history", "0"], "history_length must be an integer of at least 1"),
        (["--epoch", "-1"], "epoch >= 0"),
        (["--dtype", "int4"], "dtype must be one of"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--device", "tpu"], "device must be 'cpu' or 'cuda'"),
        (["--precision", "fp8"], "precision must be"),
        (["--publish-every", "-1"], "publish_every_steps must be at least 0"),
    ],
)
@pytest.mark.parametrize("made", [False, True])
def test_train_refuses(
    run: Run, tmp_path: Path, made: bool, options: list[str], message: str
) -> None:
    home = Home(tmp_path / "home")
    if made:
        home.create()
    assert_refused(run, tmp_path, message, "train", "--home", home.path, *options)


@pytest.mark.parametrize("command", [["train"], ["demo"], ["world", "--events", "5"]])
def test_a_file_is_no_home(run: Run, tmp_path: Path, command: list[str]) -> None:
    home = tmp_path / "home"
    home.write_text("something else")
    before = tree(tmp_path)
    code, said = run(*command, "--home", home)
    assert code == 1
    assert said.startswith("error: ")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--users", "0"], "num_users must be a number >= 1, got 0"),
        (["--items", "3"], "every tag needs an item"),
        (["--events", "-1"], "num_events must be a number >= 0, got -1"),
        (["--seed", "-1"], "seed must be a number >= 0"),
    ],
)
def test_world_refuses(run: Run, tmp_path: Path, args: list[str], message: str) -> None:
    assert_refused(run, tmp_path, message, "world", "--home", tmp_path / "home", *args)


def test_a_world_goes_into_a_log_once(run: Run, tmp_path: Path) -> None:
    args = ["world", "--users", "5", "--items", "30", "--events", "40", "--home", tmp_path / "home"]
    assert run(*args)[0] == 0
    assert EventLog(tmp_path / "home" / "log").num_events() == 40
    before = tree(tmp_path)
    code, said = run(*args)
    assert code == 1
    assert "already" in said
    assert "--again" in said
    assert tree(tmp_path) == before
    assert run(*args, "--again")[0] == 0
    assert EventLog(tmp_path / "home" / "log").num_events() == 80


class TestDemo:
    def test_a_home_with_events_is_left_alone(self, run: Run, tmp_path: Path) -> None:
        EventLog(tmp_path / "home" / "log").append(make_events(5))
        home = ["--home", tmp_path / "home"]
        assert_refused(run, tmp_path, "holds events already; choose another", "demo", *home)

    def test_fresh_deletes_no_foreign_directory(self, run: Run, tmp_path: Path) -> None:
        home = tmp_path / "home"
        home.mkdir()
        (home / "thesis.txt").write_text("years of work")
        message = "was not made by a demo, so --fresh does not delete it"
        assert_refused(run, tmp_path, message, "demo", "--fresh", "--home", home)

    def test_fresh_deletes_no_home_of_a_deployment(self, run: Run, tmp_path: Path) -> None:
        home = Home(tmp_path / "home").create()
        EventLog(home.log).append(make_events(5))
        message = "was not made by a demo"
        assert_refused(run, tmp_path, message, "demo", "--fresh", "--home", home.path)

    def test_a_foreign_directory_is_not_marked_as_a_demo(self, run: Run, tmp_path: Path) -> None:
        """Else a later --fresh would delete what the demo never made."""
        home = tmp_path / "home"
        home.mkdir()
        (home / "thesis.txt").write_text("years of work")
        assert_refused(run, tmp_path, "is not empty; choose a new", "demo", "--home", home)

    def test_fresh_deletes_an_earlier_demo_alone(self, run: Run, tmp_path: Path) -> None:
        home = Home(tmp_path / "home").create()
        (home.path / ".marm-demo").touch()
        EventLog(home.log).append(make_events(5))
        (tmp_path / "beside").write_text("stays")
        # What follows is refused, so that nothing is simulated.
        code, said = run("demo", "--fresh", "--users", "0", "--home", home.path)
        assert (code, "num_users" in said) == (1, True)
        assert EventLog(home.log).num_events() == 0
        assert (tmp_path / "beside").read_text() == "stays"


def test_serve_without_a_config(run: Run, tmp_path: Path) -> None:
    assert_refused(run, tmp_path, "cannot read", "serve", tmp_path / "absent.yaml")


@pytest.mark.parametrize("args", [["fly"], ["train", "--workers", "0"], ["models", "pin", "x"]])
def test_wrong_usage_is_explained_with_exit_code_2(run: Run, args: list[str]) -> None:
    code, said = run(*args)
    assert code == 2
    assert "Usage:" in said
