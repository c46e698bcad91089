"""The API client: what the server says, and what happens when it says nothing."""

from __future__ import annotations

import json

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from finetune.controller.rest import Api, ApiError, ConfigurationError, Connection, connection


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
        if request.path == "/plain":
            return web.Response(status=502, text="bad gateway")
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
        api = Api(Connection(str(running.make_url("/")).rstrip("/"), True, lambda: "secret"))
        api.calls = calls
        yield api
        await api.close()


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


async def test_apply_names_its_manager_and_takes_its_fields(server):
    await server.apply("/x", {"a": 1}, "me")
    assert server.calls[-1] == ("PATCH", "/x", {"fieldManager": "me", "force": "true"}, '{"a":1}')


async def test_deletion_is_of_that_very_object(server):
    await server.delete("/x", "uid-1")
    assert json.loads(server.calls[-1][3])["preconditions"] == {"uid": "uid-1"}


def test_without_a_way_in_the_message_says_what_to_set(tmp_path):
    with pytest.raises(ConfigurationError, match="set KUBECONFIG"):
        connection({"KUBECONFIG": str(tmp_path / "none")})
