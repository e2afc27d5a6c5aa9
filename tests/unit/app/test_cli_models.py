"""`marm models`, and the small parts of other commands that need no cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from serving_models import publish_model
from typer.testing import CliRunner

from app.cli.demo import demo_summary, free_port
from app.cli.main import cli, cli_app
from app.cli.memory.namespaces import check_convertible, published_namespaces
from app.cli.train import headline, split_names
from app.demo import ServingReport
from cache_actors.registry import ModelRegistry
from marm.config import ModelConfig
from marm.memory import Namespace
from train.run import TrainingResult

ERRORS = Namespace(family="ranking_errors1", depth=1, dim=8)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with two versions of a ranking model in one variant and one in another."""
    registry = ModelRegistry(tmp_path / "models")
    for variant, epoch in (("default", 0), ("default", 1), ("b", 2)):
        namespace = {**ModelConfig().to_dict()["namespace"], "epoch": epoch}
        registry.publish("ranking", variant, {"w": torch.ones(1)}, {"namespace": namespace})
    return tmp_path


@pytest.fixture
def marm(home: Path) -> Callable[..., list[dict]]:
    """Runs `marm models` on the home; the lines of its output, parsed."""

    def call(*args: str) -> list[dict]:
        result = CliRunner().invoke(cli_app, ["models", *args, "--home", str(home)])
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    return call


def test_versions_are_listed(marm: Callable[..., list[dict]]) -> None:
    assert marm("list") == [
        {"stage": "ranking", "variant": "b", "versions": [1], "serving": 1, "pinned": None},
        {
            "stage": "ranking",
            "variant": "default",
            "versions": [1, 2],
            "serving": 2,
            "pinned": None,
        },
    ]


def test_a_pin_chooses_and_unpin_lifts_it(marm: Callable[..., list[dict]]) -> None:
    line = {"stage": "ranking", "variant": "default"}
    assert marm("pin", "ranking", "default", "1") == [{**line, "pinned": 1}]
    pinned = marm("list")[1]
    assert (pinned["serving"], pinned["pinned"]) == (1, 1)
    assert marm("unpin", "ranking", "default") == [{**line, "pinned": None}]
    assert marm("list")[1]["serving"] == 2


def test_one_command_rolls_back(marm: Callable[..., list[dict]]) -> None:
    line = {"stage": "ranking", "variant": "default"}
    assert marm("rollback", "ranking", "default") == [{**line, "rolled_back": 2, "pinned": 1}]
    assert marm("list")[1]["pinned"] == 1
    with pytest.raises(AssertionError):  # nothing before version 1
        marm("rollback", "ranking", "default")
    assert marm("list")[1]["pinned"] == 1


def test_a_damaged_pin_can_be_taken_off(home: Path, marm: Callable[..., list[dict]]) -> None:
    (home / "models" / "ranking" / "default" / "pin.json").write_text("{")
    marm("unpin", "ranking", "default")
    assert marm("list")[1]["pinned"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pin", "ranking", "default", "9"], "00000009 is missing"),
        (["pin", "cascading", "default", "1"], "is missing"),
        (["pin", "ranking", "b", "2"], "is missing"),
        (["pin", "../up", "default", "1"], "'../up'"),
        (["unpin", "cascading", "default"], "no version of cascading/default is published"),
        (["rollback", "cascading", "default"], "no version of cascading/default is published"),
        (["rollback", "ranking", "b"], "no sound version of ranking/b served before version 1"),
        (["rollback", "ranking", "../b"], "'../b'"),
    ],
)
def test_what_is_not_there_changes_nothing(
    home: Path,
    args: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(home.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["marm", "models", *args, "--home", str(home)])
    with pytest.raises(SystemExit) as ended:
        cli()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
    assert sorted(home.rglob("*")) == before
    assert ModelRegistry(home / "models").pinned("ranking", "default") is None


def test_no_models_no_lines(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli_app, ["models", "list", "--home", str(tmp_path / "home")])
    assert (result.exit_code, result.stdout) == (0, "")
    assert not (tmp_path / "home").exists()


def test_namespaces_in_use_are_those_of_the_newest_models(home: Path) -> None:
    found = published_namespaces(ModelRegistry(home / "models"))
    assert sorted(namespace.epoch for namespace in found) == [1, 2]
    assert all(isinstance(namespace, Namespace) for namespace in found)
    assert published_namespaces(ModelRegistry(home / "none")) == []


def test_a_memory_of_errors_is_not_converted_to_int8(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path)
    publish_model(registry, "ranking")
    publish_model(registry, "ranking", variant="errors", error_layers=1, namespace=ERRORS)
    with pytest.raises(ValueError, match=r"ranking/errors version 1.*float16 or float32"):
        check_convertible(registry, ERRORS, replace(ERRORS, dtype="int8"))
    check_convertible(registry, ERRORS, replace(ERRORS, dtype="float32"))
    plain = replace(ERRORS, family="ranking")
    check_convertible(registry, plain, replace(plain, dtype="int8"))


def test_names_of_a_list() -> None:
    assert split_names(" click, like ,,") == ("click", "like")
    assert split_names("") == ()


def test_the_headline_is_the_long_view_gauc_of_ranking() -> None:
    assert headline({"ranking": {"long_view": {"gauc": 0.61234}}}) == "long-view GAUC 0.6123"
    assert headline({"ranking": {"like": {"gauc": 0.6}}}) == ""
    assert headline({}) == ""


def test_the_last_line_of_the_demo_is_json() -> None:
    training = TrainingResult(
        events_seen=10,
        step=2,
        events_per_s=1234.56,
        versions={"ranking": 1},
        hit_rate=0.98765,
        evaluation={"ranking": {"like": {"gauc": 0.612345}, "watch_time": {"xauc": 0.6}}},
        screened={},
        log_problems=[],
    )
    report = ServingReport({"request": 3.0}, {"ranking": 50}, True)
    line = json.loads(json.dumps(demo_summary(training, report, 0.55558, 10)))
    assert line == {
        "gauc": {"ranking": {"like": 0.6123}},
        "floor_gauc": 0.5556,
        "memory_rows": 10,
        "hit_rate": 0.9877,
        "stage_ms": {"request": 3.0},
        "memory_depth": {"ranking": 50},
        "events_per_s": 1235,
        "feedback_changed_next_answer": True,
    }


def test_the_demo_finds_a_port() -> None:
    assert 0 < free_port() < 65536
