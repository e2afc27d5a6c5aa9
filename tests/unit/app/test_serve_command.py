from __future__ import annotations

import socket

import pytest
import yaml

from app.cli.serve import ServeAddress, check_config, check_port_free, serve_command
from cache_actors.home import Home


def write_config(tmp_path, args, **config):
    path = tmp_path / "config.yaml"
    application = {"name": "marm", "import_path": "app.build:build_app", "args": args}
    path.write_text(yaml.safe_dump({"applications": [application], **config}))
    return path


def test_a_good_config_tells_where_it_listens(tmp_path):
    home = Home(tmp_path / "home").create()
    path = write_config(tmp_path, {"home": str(home.path)})
    assert check_config(path) == ServeAddress("127.0.0.1", 8000)
    path = write_config(
        tmp_path, {"home": str(home.path)}, http_options={"host": "0.0.0.0", "port": 18999}
    )
    assert check_config(path) == ServeAddress("0.0.0.0", 18999)


def test_what_is_wrong_with_a_config_is_said(tmp_path):
    missing = tmp_path / "nothing"
    with pytest.raises(ValueError, match=f"there is no home at {missing}; run `marm demo`"):
        check_config(write_config(tmp_path, {"home": str(missing)}))
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="there is no model directory at"):
        check_config(write_config(tmp_path, {"home": str(tmp_path / "bare")}))
    with pytest.raises(ValueError, match="Extra inputs"):
        check_config(write_config(tmp_path, {"magic": 1}))
    with pytest.raises(ValueError, match="cannot read"):
        check_config(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("{")
    with pytest.raises(ValueError, match="is not YAML"):
        check_config(broken)
    broken.write_text("- 1")
    with pytest.raises(ValueError, match="must be a Serve config"):
        check_config(broken)


@pytest.mark.parametrize("reuse", [False, True])
def test_a_busy_port_is_refused(reuse, tmp_path):
    home = Home(tmp_path / "home").create()
    with socket.socket() as listener:
        if reuse:  # as Serve's own proxy does
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        path = write_config(tmp_path, {"home": str(home.path)}, http_options={"port": port})
        with pytest.raises(ValueError, match=f"port {port} on 127.0.0.1 is not available"):
            serve_command(path)
    check_port_free(ServeAddress("127.0.0.1", port))
