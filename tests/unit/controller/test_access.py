"""How the operator gets in, by every way that a kubeconfig knows, and what happens when the credentials change."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import aiohttp
import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio.client import Configuration
from kubernetes.aio.config import ConfigException

from finetune.controller.cluster import access as module
from finetune.controller.cluster.access import Access, ConfigurationError
from finetune.controller.cluster.client import Api, ApiError
from finetune.controller.cluster.patience import Patience

PLUGIN = """
import json, pathlib, sys
folder = pathlib.Path(__file__).parent
with (folder / "runs").open("a") as runs:
    runs.write("x")
token = (folder / "issued").read_text()
if token == "none":
    sys.exit("the plug-in has no network")
print(json.dumps({
    "apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": token},
}))
"""


class Server:
    """Takes one token at a time."""

    def __init__(self) -> None:
        self.taken, self.asked = "first", []

    async def answer(self, request: web.Request) -> web.Response:
        authorization = request.headers.get("Authorization", "")
        self.asked.append((request.method, authorization, await request.text()))
        if authorization != f"Bearer {self.taken}":
            return web.json_response({"reason": "Unauthorized", "message": "Unauthorized"}, status=401)
        return web.json_response({"who": authorization})


@pytest.fixture
async def server(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LOADS", 0.0)
    found = Server()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", found.answer)
    async with TestServer(app) as running:
        found.url = str(running.make_url("/")).rstrip("/")
        yield found


def kubeconfig(folder: Path, server: str, user: dict | None, **cluster) -> dict[str, str]:
    """An environment that names a kubeconfig file with that user."""
    path = folder / "config"
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": server, **cluster}}],
        "users": [{"name": "u", "user": user}] if user is not None else [],
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
    }
    path.write_text(yaml.safe_dump(document))
    return {"KUBECONFIG": str(path)}


def with_plugin(folder: Path, token: str) -> dict:
    (folder / "plugin.py").write_text(PLUGIN)
    (folder / "issued").write_text(token)
    run = {"apiVersion": "client.authentication.k8s.io/v1", "command": sys.executable, "args": ["plugin.py"]}
    return {"exec": run | {"args": [str(folder / "plugin.py")], "interactiveMode": "Never"}}


async def asked(environment: dict[str, str], *requests) -> list:
    access = await Access.load(environment)
    api = Api(access)
    try:
        return [await request(api) for request in requests]
    finally:
        await access.close()


def get(api: Api):
    return api.get("/api")


async def test_a_program_of_the_kubeconfig_gives_the_token(server, tmp_path):
    environment = kubeconfig(tmp_path, server.url, with_plugin(tmp_path, "first"))
    assert await asked(environment, get, get) == [{"who": "Bearer first"}] * 2
    assert (tmp_path / "runs").read_text() == "x"


async def test_a_token_file_is_read_without_its_line_break(server, tmp_path):
    (tmp_path / "token").write_text("first\n")
    assert await asked(kubeconfig(tmp_path, server.url, {"tokenFile": "token"}), get) == [{"who": "Bearer first"}]


@pytest.mark.parametrize("way", ["exec", "tokenFile"])
async def test_credentials_that_are_no_longer_taken_are_loaded_anew_and_nothing_is_lost(server, tmp_path, way):
    (tmp_path / "token").write_text("first")
    user = with_plugin(tmp_path, "first") if way == "exec" else {"tokenFile": "token"}

    async def renewed(api: Api):
        server.taken = "second"
        for name in ("token", "issued"):
            (tmp_path / name).write_text("second")
        return await api.create("/jobs", {"kind": "Job"})

    answers = await asked(kubeconfig(tmp_path, server.url, user), get, renewed)
    assert answers == [{"who": "Bearer first"}, {"who": "Bearer second"}]
    # The body is sent whole each time.
    assert server.asked[-2:] == [(("POST", f"Bearer {token}", '{"kind": "Job"}')) for token in ("first", "second")]


async def test_a_plugin_that_hangs_is_given_up_with_a_word(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LOADING_SECONDS", 0.2)
    user = with_plugin(tmp_path, "first")
    (tmp_path / "plugin.py").write_text("import time; time.sleep(1)")
    with pytest.raises(ConfigurationError, match="took longer than"):
        await Access.load(kubeconfig(tmp_path, server.url, user))
    await asyncio.sleep(1.5)  # the client leaves the program running: its end belongs into this loop


async def test_requests_that_are_given_up_start_no_plugin_each(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LOADING_SECONDS", 20)
    access = await Access.load(kubeconfig(tmp_path, server.url, with_plugin(tmp_path, "first")))
    server.taken = "another"
    started = 'import pathlib, time; (pathlib.Path(__file__).parent / "runs").open("a").write("y"); time.sleep(3)'
    (tmp_path / "plugin.py").write_text(started)
    api = Api(access, timeout=0.2)
    for _ in range(4):
        with pytest.raises(TimeoutError):
            await api.get("/api")
    await access._loading
    assert (tmp_path / "runs").read_text() == "xy"
    await access.close()


@pytest.mark.parametrize("after", ["0.01", "Thu, 01 Jan 1970 00:00:00 GMT", "nan", None])
async def test_kopf_is_told_to_try_again_whatever_retry_after_says(after):
    async def busy(_: web.Request) -> web.Response:
        return web.json_response({}, status=429, headers={"Retry-After": after} if after else {})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", busy)
    async with TestServer(app) as running:
        access = Access(Configuration(host=str(running.make_url("/")).rstrip("/")))
        async with access.session(Patience()) as session:
            with pytest.raises(aiohttp.ClientConnectionError, match="429"):
                await session.request("get", running.make_url("/apis"))


async def test_kopfs_session_has_the_same_credentials_and_their_renewal(server, tmp_path):
    (tmp_path / "token").write_text("first")
    access = await Access.load(kubeconfig(tmp_path, server.url, {"tokenFile": "token"}))
    server.taken = "second"
    (tmp_path / "token").write_text("second")
    async with access.session() as session, session.request("get", server.url + "/apis") as answer:
        assert await answer.json() == {"who": "Bearer second"}
    await access.close()


async def test_credentials_that_stay_refused_are_an_error_after_a_few_tries(server, tmp_path):
    server.taken = "another"
    (tmp_path / "token").write_text("first")
    with pytest.raises(ApiError, match="401 Unauthorized"):
        await asked(kubeconfig(tmp_path, server.url, {"tokenFile": "token"}), get)
    assert len(server.asked) == 3


async def test_a_plugin_that_fails_later_leaves_the_credentials_that_there_were(server, tmp_path):
    def fails(api: Api):
        (tmp_path / "issued").write_text("none")
        return api.get("/api")

    environment = kubeconfig(tmp_path, server.url, with_plugin(tmp_path, "first"))
    assert await asked(environment, get, fails) == [{"who": "Bearer first"}] * 2


async def test_a_pods_token_that_is_being_replaced_is_waited_for_like_a_server_that_is_away(server):
    def read(configuration: Configuration) -> None:
        raise ConfigException("Token file exists but empty.")

    configuration = Configuration(host=server.url)
    configuration.refresh_api_key_hook = read
    access = Access(configuration)
    with pytest.raises(ConnectionError, match="Token file exists but empty"):
        await Api(access).get("/api")
    async with access.session() as session:
        with pytest.raises(aiohttp.ClientConnectionError):  # which kopf tries again
            await session.request("get", server.url)
    await access.close()


@pytest.mark.parametrize(
    ("user", "cluster", "said"),
    [
        (None, {}, "cannot be used: its current context names no user"),
        ("plugin", {}, "gives its current user no credentials"),
        ({"username": "x"}, {}, "gives its current user no credentials"),
        ({"tokenFile": "nowhere"}, {}, "cannot be used: .*nowhere"),
        ({"token": "x"}, {"certificate-authority": "nowhere.crt"}, "cannot be used: .*nowhere.crt"),
    ],
)
async def test_a_kubeconfig_that_lets_nobody_in_is_refused_with_its_name(tmp_path, user, cluster, said):
    user = with_plugin(tmp_path, "none") if user == "plugin" else user
    environment = kubeconfig(tmp_path, "https://127.0.0.1:1", user, **cluster)
    with pytest.raises(ConfigurationError, match=f"the kubeconfig {environment['KUBECONFIG']} {said}"):
        await Access.load(environment)


@pytest.mark.parametrize("text", ["", "{", "a: b", "- x", json.dumps({"current-context": "x", "contexts": []})])
async def test_a_file_that_is_no_kubeconfig_is_refused_with_its_name(tmp_path, text):
    (tmp_path / "config").write_text(text)
    with pytest.raises(ConfigurationError, match=f"the kubeconfig {tmp_path / 'config'} cannot be used"):
        await Access.load({"KUBECONFIG": str(tmp_path / "config")})


async def test_without_a_way_in_the_message_says_what_to_set(tmp_path):
    with pytest.raises(ConfigurationError, match="set KUBECONFIG"):
        await Access.load({"KUBECONFIG": str(tmp_path / "none")})


async def test_several_files_are_one_kubeconfig(server, tmp_path):
    path = kubeconfig(tmp_path, server.url, {"token": "first"})["KUBECONFIG"]
    assert await asked({"KUBECONFIG": f"{tmp_path / 'none'}:{path}"}, get) == [{"who": "Bearer first"}]
