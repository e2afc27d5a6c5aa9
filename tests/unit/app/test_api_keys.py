"""API keys: made, stored, looked up, revoked, and in front of the routes."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
import sys
import threading

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from typer.testing import CliRunner

from app import key_guards as key_guards_module
from app.api_keys import ApiKeys, KeyFileError, find_key, key_id_of
from app.cli.main import cli, cli_app
from app.key_guards import KEY_HEADER, LiveKeys, caller_role, key_guards
from app.security_args import SecurityArgs
from cache_actors.home import Home


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home").create()


def test_a_key_is_stored_as_a_hash_only(home):
    keys = ApiKeys(home)
    text, stored = keys.create("feedback", "the app")
    assert key_id_of(text) == stored.id
    assert len(text.split("_", 2)[2]) == 43  # 256 bits in base64
    content = keys.path.read_text()
    assert text not in content
    assert text.split("_", 2)[2] not in content
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    assert keys.read() == (stored,)
    assert keys.create("feedback")[0] != text


def test_a_key_is_found_whole_or_not_at_all(home):
    keys = ApiKeys(home)
    text, stored = keys.create("admin")
    keys.create("feedback")
    known = keys.read()
    assert find_key(known, text) == stored
    wrong = text[:-1] + ("A" if text[-1] != "A" else "B")
    other_id = "marm_00000000_" + text.split("_", 2)[2]
    for bad in ("", wrong, other_id, text + "A", text[5:], stored.sha256, "ä" * 60):
        assert find_key(known, bad) is None


def test_revoked_keys_are_gone_and_others_stay(home):
    keys = ApiKeys(home)
    first, stored = keys.create("feedback")
    second, _ = keys.create("admin")
    assert keys.revoke(stored.id) == stored
    assert find_key(keys.read(), first) is None
    assert find_key(keys.read(), second) is not None
    with pytest.raises(ValueError, match="there is no API key"):
        keys.revoke(stored.id)


def test_no_home_no_keys(tmp_path):
    keys = ApiKeys(Home(tmp_path / "none"))
    assert keys.read() == ()
    with pytest.raises(ValueError, match="there is no home"):
        keys.create("admin")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[{}]",
        '[{"id": "00000000", "role": "root", "sha256": "0", "created_ms": 1}]',
        "\x00",
        '[{"id": "00000000", "role": "admin", "sha256": "'
        + "0" * 64
        + '", "created_ms": 1, "x": 1}]',
    ],
)
def test_a_damaged_file_is_an_error(home, content):
    keys = ApiKeys(home)
    keys.path.write_text(content)
    with pytest.raises(KeyFileError, match="is not a list of API keys"):
        keys.read()
    with pytest.raises(KeyFileError):
        keys.create("admin")
    assert keys.path.read_text() == content


def test_keys_made_at_once_are_all_kept(home):
    def make() -> None:
        for _ in range(5):
            ApiKeys(home).create("feedback")

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({key.id for key in ApiKeys(home).read()}) == 20


@pytest.fixture
def no_wait(monkeypatch):
    monkeypatch.setattr(key_guards_module, "RELOAD_S", 0.0)


def test_servers_follow_the_file(home, no_wait, caplog):
    keys = ApiKeys(home)
    live = LiveKeys(keys)
    text, stored = keys.create("feedback")
    assert live.find(text) == stored
    good = keys.path.read_text()
    keys.path.write_text("[")
    with caplog.at_level(logging.ERROR, "ray.serve"):
        assert live.find(text) == stored
        assert live.find(text) == stored
    assert [record.getMessage()[-31:] for record in caplog.records] == [
        "the keys known before stay valid"[1:]
    ]
    keys.path.write_text(good)
    keys.revoke(stored.id)
    assert live.find(text) is None
    keys.path.unlink()
    assert live.find(text) is None


def test_the_file_is_not_looked_at_for_every_request(home):
    now_s = 0.0
    keys = ApiKeys(home)
    live = LiveKeys(keys, lambda: now_s)
    text, stored = keys.create("feedback")
    assert live.find(text) is None
    now_s = 1.0
    assert live.find(text) == stored


def test_a_server_does_not_start_with_a_damaged_file(home):
    ApiKeys(home).path.write_text("[")
    for required in (True, False):
        with pytest.raises(KeyFileError):
            SecurityArgs(require_keys=required).guards(home)


class Edge:
    """An application with a route of every kind behind the guards of ``home``."""

    def __init__(self, home: Home, required: bool) -> None:
        guards = key_guards(LiveKeys(ApiKeys(home)), required)
        self.app = FastAPI()
        router = APIRouter()
        for name in ("recommend", "feedback", "admin"):
            router.add_api_route(
                f"/{name}",
                self._role,
                methods=["POST"],
                dependencies=[Depends(getattr(guards, name))],
            )
        self.app.include_router(router)

    def post(self, path: str, key: str | None = None) -> httpx.Response:
        headers = {} if key is None else {KEY_HEADER: key}

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
                return await client.post(path, headers=headers)

        return asyncio.run(send())

    @staticmethod
    async def _role(request: Request) -> str | None:
        return caller_role(request)


def test_routes_ask_for_keys(home):
    keys = ApiKeys(home)
    texts = {role: keys.create(role)[0] for role in ("feedback", "admin", "test")}
    edge = Edge(home, required=True)
    assert (edge.post("/recommend").status_code, edge.post("/recommend").json()) == (200, None)
    assert edge.post("/recommend", texts["test"]).json() == "test"
    for path in ("/feedback", "/admin"):
        refused = edge.post(path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "ApiKey"
        assert "needs an API key in the header X-API-Key" in refused.json()["detail"]
        assert edge.post(path, "marm_x").status_code == 401
        assert edge.post(path, "x" * 5000).status_code == 401
        assert edge.post(path, texts["admin"]).json() == "admin"
        assert edge.post(path, texts["test"]).status_code == 403
    assert edge.post("/feedback", texts["feedback"]).json() == "feedback"
    refused = edge.post("/admin", texts["feedback"])
    assert refused.status_code == 403
    assert "has the role 'feedback'; this route needs 'admin'" in refused.json()["detail"]
    assert edge.post("/recommend", texts["feedback"][:-1] + "!").status_code == 401


def test_without_required_keys_a_wrong_one_is_still_a_mistake(home):
    text, _ = ApiKeys(home).create("test")
    edge = Edge(home, required=False)
    for path in ("/recommend", "/feedback", "/admin"):
        assert edge.post(path).status_code == 200
        assert edge.post(path, text).json() == "test"
        assert edge.post(path, text[:-2]).status_code == 401


def marm_keys(home: Home, *args: str):
    return CliRunner().invoke(cli_app, ["keys", *args, "--home", str(home.path)])


def test_the_command_shows_a_key_once(home):
    made = marm_keys(home, "create", "--role", "admin", "--note", "ops")
    assert made.exit_code == 0, made.output
    text = made.stdout.strip()
    assert find_key(ApiKeys(home).read(), text).role == "admin"
    listed = json.loads(marm_keys(home, "list").stdout)
    assert (listed["role"], listed["note"], listed["id"]) == ("admin", "ops", key_id_of(text))
    assert set(listed) == {"id", "role", "note", "created_ms"}
    assert json.loads(marm_keys(home, "revoke", listed["id"]).stdout)["revoked"] == listed
    assert marm_keys(home, "list").stdout == ""


def test_the_command_refuses_what_it_does_not_know(home, monkeypatch, capsys):
    assert marm_keys(home, "create", "--role", "root").exit_code == 2
    monkeypatch.setattr(
        sys, "argv", ["marm", "keys", "revoke", "12345678", "--home", str(home.path)]
    )
    with pytest.raises(SystemExit) as ended:
        cli()
    assert ended.value.code == 1
    assert "`marm keys list` shows all" in capsys.readouterr().err
