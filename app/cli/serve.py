"""``marm serve``: `serve run` after the checks that Serve makes late, or not at all."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from app.args import AppArgs
from app.build import existing_home
from app.cli.env_file import read_env_file
from app.yaml_file import read_yaml

DEFAULT_CONFIG = Path("serve_config.yaml")
IMPORT_PATH = "app.build:build_app"


@dataclass(frozen=True)
class ServeAddress:
    """Where a Serve config listens."""

    host: str
    port: int


def serve_command(
    config: Annotated[Path, typer.Argument(help="The Serve config to run.")] = DEFAULT_CONFIG,
    env: Annotated[
        Path | None,
        typer.Option(
            help="Environment of Ray, such as cluster/env/fast.env. It reaches a Ray that this "
            "command starts; one that runs already has to have been started with it."
        ),
    ] = None,
) -> None:
    """Serve recommendations over HTTP; the same as `serve run CONFIG`, with earlier errors."""
    variables = {} if env is None else read_env_file(env)
    check_port_free(check_config(config))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(config)]
    os.execve(sys.executable, command, {**os.environ, **variables})


def check_config(path: Path) -> ServeAddress:
    """Read a Serve config and check what this project is responsible for."""
    config = read_yaml(path)
    if not isinstance(config, dict) or not isinstance(config.get("applications"), list):
        raise ValueError(
            f"{path} must be a Serve config with 'applications'; see serve_config.yaml"
        )
    for application in config["applications"]:
        if application.get("import_path") == IMPORT_PATH:
            _check_args(path, application.get("args", {}))
    http = config.get("http_options") or {}
    return ServeAddress(str(http.get("host", "127.0.0.1")), int(http.get("port", 8000)))


def check_port_free(address: ServeAddress) -> None:
    """Refuse a port on which anything listens.

    Serve binds with SO_REUSEPORT: two Serves on one port would both start, and take turns in
    answering requests. A bind without it finds either kind of listener.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise ValueError(
                f"port {address.port} on {address.host} is not available ({error.strerror}); stop "
                "what listens there, or set another http_options.port in the Serve config"
            ) from error


def _check_args(path: Path, args: Any) -> None:
    try:
        existing_home(AppArgs.model_validate(args).home)
    except ValidationError as error:
        raise ValueError(f"args in {path}: {error}") from error
