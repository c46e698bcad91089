"""kopf itself before a server in trouble: it goes on watching, whatever it is answered, and meanwhile we say so."""

from __future__ import annotations

import asyncio
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio.client import Configuration

from finetune.api import GROUP, KIND, PLURAL, VERSION
from finetune.controller import main
from finetune.controller.cluster import backoff, patience
from finetune.controller.cluster.access import Access
from finetune.controller.cluster.patience import Patience
from finetune.controller.cluster.resources import watched
from tests.builders import FineTuneJob


def resource(kind: str, plural: str, *, namespaced: bool) -> dict:
    verbs = ["get", "list", "watch"]
    return {"name": plural, "singularName": kind.lower(), "namespaced": namespaced, "kind": kind, "verbs": verbs}


DISCOVERY = {
    "/api": {"versions": ["v1"]},
    "/api/v1": {"resources": [resource("Namespace", "namespaces", namespaced=False)]},
    f"/apis/{GROUP}/{VERSION}": {"resources": [resource(KIND, PLURAL, namespaced=True)]},
}


class ApiServer:
    """Serves discovery and FineTuneJobs; each list and each watch meets the next trouble of its kind first."""

    def __init__(self, lists=(), watches=()) -> None:
        self.lists, self.watches = list(lists), list(watches)
        self.listed = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/apis":
            version = {"groupVersion": f"{GROUP}/{VERSION}", "version": VERSION}
            return web.json_response({"groups": [{"name": GROUP, "versions": [version], "preferredVersion": version}]})
        if request.path in DISCOVERY:
            return web.json_response(DISCOVERY[request.path])
        if "watch" not in request.query:
            if self.lists:
                return web.json_response({"kind": "Status", "message": "trouble"}, status=self.lists.pop(0))
            self.listed += 1
            return web.json_response({"metadata": {"resourceVersion": "1"}, "items": []})
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if self.watches:
            await response.write(self.watches.pop(0))
            return response
        job = FineTuneJob().build()
        await response.write(web.json_response({"type": "ADDED", "object": job}, dumps=_compact).body + b"\n")
        await asyncio.sleep(3600)
        return response


def _compact(item) -> str:
    return json.dumps(item, separators=(",", ":"))


def error(code: int) -> bytes:
    status = {"kind": "Status", "code": code, "reason": "InternalError", "message": "etcdserver: leader changed"}
    return _compact({"type": "ERROR", "object": status}).encode() + b"\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(backoff, "_FIRST_SECONDS", 0.01)
    monkeypatch.setattr(backoff, "_LONGEST_SECONDS", 0.05)
    monkeypatch.setattr(patience, "_LONGEST_WAIT_SECONDS", 0.05)


async def watched_through(server: ApiServer) -> tuple[str, list[str], Patience]:
    """The job that kopf saw in the end, what there was to say meanwhile, and the session's middleware."""
    seen: asyncio.Queue = asyncio.Queue()
    said: list[str] = []
    middleware = Patience()
    failed = middleware._failed
    middleware._failed = lambda words: (said.append(words), failed(words))
    replica = SimpleNamespace(
        settings=SimpleNamespace(namespaces=()), watched=watched(""), patience=middleware,
        saw=lambda kind, change, item: seen.put_nowait(item["metadata"]["name"]),
    )  # fmt: skip
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.answer)
    async with TestServer(app) as running:
        access = Access(Configuration(host=str(running.make_url("/")).rstrip("/")))
        stop = asyncio.Event()
        watching = asyncio.create_task(main.watch(replica, access, stop))
        waiting = asyncio.create_task(seen.get())
        try:
            await asyncio.wait({watching, waiting}, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            assert not watching.done(), watching.exception()
            return waiting.result(), said, middleware
        finally:
            stop.set()
            await asyncio.wait({watching}, timeout=10)
            await access.close()


@pytest.mark.parametrize("status", [403, 404, 410])
async def test_a_list_that_is_refused_is_asked_for_again(status):
    name, said, middleware = await watched_through(ApiServer(lists=[status, status]))
    assert name == "tune"
    assert said[0].startswith(str(status))
    assert middleware.trouble == ""


@pytest.mark.parametrize("code", [500, 504, 410])
async def test_a_watch_that_ends_with_an_error_begins_anew_with_a_list(code):
    server = ApiServer(watches=[error(code), error(code)])
    name, said, middleware = await watched_through(server)
    assert (name, server.listed) == ("tune", 3)
    assert said == ([] if code == 410 else [f"{code} InternalError: etcdserver: leader changed"] * 2)
    assert middleware.trouble == ""


async def test_an_event_that_was_cut_is_none():
    server = ApiServer(watches=[b'{"type":"ADDED","object":{"metada'])
    assert (await watched_through(server))[0] == "tune"


def test_the_oldest_kopf_that_is_declared_has_what_we_set():
    """Below 1.45 kopf has no label selectors for watches."""
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert "kopf>=1.45" in str(project)
