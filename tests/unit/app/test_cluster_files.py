"""The shipped cluster configurations are closed: Ray's tokens and API keys are switched on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from app.args import AppArgs

REPO = Path(__file__).resolve().parents[3]
CLUSTER = REPO / "cluster"


def read(name: str) -> Any:
    return next(yaml.safe_load_all((CLUSTER / name).read_text()))


def test_kubernetes_asks_for_tokens_and_keys() -> None:
    spec = read("rayservice.yaml")["spec"]
    assert spec["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert AppArgs.model_validate(application["args"]).security.require_keys


def test_ray_up_asks_for_a_token_on_every_node() -> None:
    config = read("ray-up-local.yaml")
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[commands] if "ray start" in command]
        assert starts
        assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "security: {require_keys: true}" in (CLUSTER / "ray-up-local.yaml").read_text()


def test_the_local_demo_needs_no_keys() -> None:
    config = yaml.safe_load((REPO / "serve_config.yaml").read_text())
    args = AppArgs.model_validate(config["applications"][0]["args"])
    assert not args.security.require_keys
