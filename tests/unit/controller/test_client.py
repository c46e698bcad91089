"""The API client: what the server says, and what happens when it says nothing."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio.client import Configuration

from finetune.controller.cluster.access import Access
from finetune.controller.cluster.client import Api, ApiError


@pytest.fixture
async def server():
    calls = []

    async def answer(request: web.Request) -> web.StreamResponse:
        calls.append((request.method, request.path, dict(request.query), await request.text()))
        if request.path == "/broken":
            request.transport.close()
            return web.Response()
        if request.path == "/refused":
            return web.json_response({"reason": "Forbidden", "message": "exceeded quota"}, status=403)
        if request.path == "/busy":
            headers = {"Retry-After": request.query["after"]} if "after" in request.query else {}
            body = {"reason": "TooManyRequests", "message": "storage is (re)initializing"}
            return web.json_response(body | {"details": {"retryAfterSeconds": 7}}, status=429, headers=headers)
        if request.path.startswith("/says/"):
            line = "\n" if request.query.get("watch") else ""
            return web.Response(text=request.path.removeprefix("/says/") + line, content_type="text/html")
        if request.path == "/elsewhere":
            raise web.HTTPTemporaryRedirect(request.query["to"])
        if request.path == "/plain":
            return web.Response(status=502, text="bad gateway")
        if request.path == "/standing":
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b'{"type": "BOOKMARK"}\n')
            await asyncio.sleep(3600)
        if request.query.get("watch"):
            response = web.StreamResponse()
            await response.prepare(request)
            line = json.dumps({"type": "ADDED", "object": {"n": "x" * 200}}).encode() + b"\n"
            for part in (line[:7], line[7:] + line, line[:50], line[50:]):
                await response.write(part)
            return response
        return web.json_response({"token": request.headers.get("Authorization")})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    async with TestServer(app) as running:
        host = str(running.make_url("/")).rstrip("/")
        access = Access(Configuration(host=host, api_key={"BearerToken": "Bearer secret"}))
        api = Api(access, connections=1)
        api.calls = calls
        yield api
        await access.close()


async def test_requests_carry_the_token(server):
    assert await server.get("/anything") == {"token": "Bearer secret"}


async def test_a_refusal_has_the_servers_words(server):
    with pytest.raises(ApiError) as refusal:
        await server.create("/refused", {})
    assert (refusal.value.status, refusal.value.reason, refusal.value.message) == (403, "Forbidden", "exceeded quota")
    with pytest.raises(ApiError, match="bad gateway"):
        await server.get("/plain")


async def test_a_broken_connection_is_an_os_error(server):
    with pytest.raises(OSError):
        await server.create("/broken", {})


async def test_a_watch_gives_whole_events_however_they_are_cut(server):
    events = [event async for event in server.watch("/pods", {"resourceVersion": "1"})]
    assert [event["type"] for event in events] == ["ADDED"] * 3


async def test_a_merge_names_its_manager(server):
    await server.merge("/x", {"a": 1}, "me")
    assert server.calls[-1] == ("PATCH", "/x", {"fieldManager": "me"}, '{"a": 1}')


async def test_deletion_is_of_that_very_object(server):
    await server.delete("/x", "uid-1")
    assert json.loads(server.calls[-1][3])["preconditions"] == {"uid": "uid-1"}


@pytest.mark.parametrize(
    ("after", "least", "most"),
    [
        ("3", 3, 3),
        ("0.5", 0.5, 0.5),
        (timedelta(seconds=600), 590, 600),
        (timedelta(seconds=-600), 0, 0),
        ("soon", 7, 7),
        (None, 7, 7),
    ],
)
async def test_when_the_server_wants_to_be_asked_again_is_read_in_every_form(server, after, least, most):
    if isinstance(after, timedelta):
        after = format_datetime(datetime.now(UTC) + after, usegmt=True)
    with pytest.raises(ApiError) as refusal:
        await server.get("/busy", {"after": after} if after else None)
    assert refusal.value.status == 429
    assert least <= refusal.value.retry_after <= most


async def test_watches_that_stand_take_no_connection_from_short_requests(server):
    """The pool of short requests has one connection here, and fifty watches stand."""
    watches = [server.watch("/standing", {}) for _ in range(50)]
    await asyncio.gather(*(anext(watch) for watch in watches))
    async with asyncio.timeout(5):
        assert await server.get("/anything")
    for watch in watches:
        await watch.aclose()


@pytest.mark.parametrize("said", ["<html>", "null", "[1]", "", '{"cut": '])
async def test_an_answer_that_is_no_json_object_is_like_a_connection_that_broke(server, said):
    with pytest.raises(ConnectionError, match="is no JSON"):
        await server.get(f"/says/{said}")
    with pytest.raises(ConnectionError, match="is no JSON"):
        [event async for event in server.watch(f"/says/{said}", {})]


async def test_the_token_goes_to_the_api_server_only(server):
    seen = []

    async def other(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return web.json_response({})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", other)
    async with TestServer(app) as stranger:
        with pytest.raises(ConnectionError, match="redirects to"):
            await server.get("/elsewhere", {"to": str(stranger.make_url("/"))})
    assert seen == []
