"""`marm ab report`: options, files, and one clear line for what a user can mend."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from ab_logs import EXPERIMENT, START_MS, two_arms, write_logs
from typer.testing import CliRunner

from app.ab_report.bootstrap import UserBootstrap
from app.ab_report.configured import (
    configured_controls,
    configured_weights,
    parse_controls,
    parse_weights,
    read_routing,
)
from app.cli.ab import IntervalMethod, lift_method, parse_time_ms, plot
from app.cli.main import cli, cli_app
from cache_actors.home import Home

CONFIG = """
applications:
  - name: marm
    args:
      routing:
        experiments:
          depth: {stage: ranking, arms: {deep: 0.5, control: 0.5}, control: control}
    deployments:
      - name: ingress
        user_config: {experiments: {depth: {arms: {deep: 0.2, control: 0.8}}}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return write_logs(tmp_path_factory.mktemp("ab_cli"), *two_arms(users=80))


def test_report_writes_table_json_and_plot(home: Home, tmp_path: Path) -> None:
    written, plotted = tmp_path / "report.json", tmp_path / "lifts.png"
    options = ["ab", "report", "--home", str(home.path), "--weights", "depth:control=1,deep=1"]
    result = CliRunner().invoke(
        cli_app, [*options, "--json", str(written), "--plot", str(plotted), "--since", "2026-01-01"]
    )
    assert result.exit_code == 0, result.output
    assert "long_view_rate" in result.stdout
    document = json.loads(written.read_text())
    assert document["experiments"][EXPERIMENT]["arms"]["deep"]["users"] == 40
    assert document["first_ms"] >= START_MS
    assert plotted.stat().st_size > 10_000


def test_config_gives_control_and_live_weights(home: Home, tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(CONFIG)
    routing = read_routing(config)
    assert configured_controls(routing) == {"depth": "control"}
    assert configured_weights(routing) == {"depth": {"deep": 0.2, "control": 0.8}}
    result = CliRunner().invoke(
        cli_app, ["ab", "report", "--home", str(home.path), "--config", str(config)]
    )
    assert result.exit_code == 0, result.output
    assert "SAMPLE RATIO MISMATCH" in result.stdout
    assert "not to be trusted" in result.stderr.replace("\n", " ")


def error_of(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *args: str) -> str:
    """The one line that a failing command ends with."""
    monkeypatch.setattr(sys, "argv", ["marm", "ab", "report", *args])
    with pytest.raises(SystemExit) as caught:
        cli()
    assert caught.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--control", "wide"], "the control 'wide' of 'depth' was not seen"),
        (["--experiment", "width"], "no exposures of width"),
        (["--since", "2030-01-01"], "no exposures in that time"),
        (["--since", "yesterday"], "--since must be a date or time"),
        (["--since", "2026-02-01", "--until", "2026-01-01"], "since_ms must be at most"),
        (["--weights", "depth=0.5"], "--weights must be"),
        (["--confidence", "95"], "confidence must be"),
        (["--window-hours", "0"], "attribution window"),
        (["--json", "/nowhere/report.json"], "there is no directory /nowhere"),
        (["--config", "/nowhere/serve.yaml"], "cannot read /nowhere/serve.yaml"),
    ],
)
def test_errors_say_what_to_do(
    home: Home,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    error = error_of(capsys, monkeypatch, "--home", str(home.path), *options)
    assert message in error.replace("\n", " ")


def test_plot_without_matplotlib_says_what_to_install(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "app.ab_report.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ValueError, match=r"pip install 'marm\[plot\]'"):
        plot(None, Path("x.png"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must be a Serve config"),
        ("applications: {", "is not YAML"),
        ("applications: [{args: {routing: {salt: ''}}}]", "routing in"),
        ("applications: [{args: {routing: {}}}, {args: {routing: {}}}]", "2 applications"),
    ],
)
def test_bad_configs_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_routing(path)


def test_config_without_routing_knows_nothing(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("applications: [{args: {home: x}}]")
    assert configured_weights(read_routing(path)) == {}


def test_options_are_parsed() -> None:
    assert parse_controls(["depth=l2", "base"]) == {"depth": "l2", "": "base"}
    assert parse_weights(["depth:a=0.5,b=0.5"]) == {"depth": {"a": 0.5, "b": 0.5}}
    for bad in (["depth="], ["a", "b"]):
        with pytest.raises(ValueError, match="--control"):
            parse_controls(bad)
    for bad in (["depth:a"], ["depth:a=x"], [":a=1"], ["depth:a=1,a=2"], ["d:a=1", "d:a=1"]):
        with pytest.raises(ValueError, match="--weights"):
            parse_weights(bad)


def test_times_are_utc_unless_said_otherwise() -> None:
    assert parse_time_ms("--since", None) is None
    assert parse_time_ms("--since", "2026-01-01") == START_MS
    assert parse_time_ms("--since", "2026-01-01T01:00+01:00") == START_MS


def test_interval_method_is_chosen() -> None:
    assert lift_method(IntervalMethod.bootstrap, 0.9, 500, 3) == UserBootstrap(0.9, 500, 3)
    assert lift_method(IntervalMethod.delta, 0.9).confidence == 0.9
