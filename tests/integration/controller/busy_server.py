"""A busy API server: the real one behind a proxy that refuses many requests, as servers that start or shed load do.

Of the requests of each kind the first three, and then every fourth, meet trouble: 429 with Retry-After, 503, or a
connection that is dropped before an answer.
"""

from __future__ import annotations

import asyncio
import functools
import json
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
from aiohttp import web

from tests.cluster import Cluster
from tests.cluster.layout import CONTROL_PLANE_ADDRESS
from tests.cluster.pki import PORT

_UPSTREAM = f"https://{CONTROL_PLANE_ADDRESS}:{PORT}"
_PASSED_ON = ("Content-Type", "Accept", "User-Agent")


class BusyServer:
    """What it refused, by `VERB kind`; the verb is LIST or WATCH for those."""

    def __init__(self) -> None:
        self.url = ""
        self.refused: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()

    def _trouble(self, request: web.Request) -> web.Response | None:
        which = _which(request)
        self._asked[which] += 1
        count = self._asked[which]
        if count > 3 and count % 4:
            return None
        self.refused[which] += 1
        if self.refused[which] % 3 == 1:
            body = {
                "kind": "Status",
                "code": 429,
                "reason": "TooManyRequests",
                "message": "storage is (re)initializing",
            }
            return web.json_response(body, status=429, headers={"Retry-After": "1"})
        if self.refused[which] % 3 == 2:
            body = {
                "kind": "Status",
                "code": 503,
                "reason": "ServiceUnavailable",
                "message": "apiserver is shutting down",
            }
            return web.json_response(body, status=503)
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    async def _pass_on(self, session: aiohttp.ClientSession, request: web.Request) -> web.StreamResponse:
        if (trouble := self._trouble(request)) is not None:
            return trouble
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        body = await request.read()
        async with session.request(
            request.method, _UPSTREAM + request.path_qs, headers=headers, data=body or None
        ) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            return response

    async def serve(self, context: ssl.SSLContext, started: threading.Event, stop: asyncio.Event) -> None:
        connector = aiohttp.TCPConnector(ssl=context, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
            app = web.Application(client_max_size=2**24)
            app.router.add_route("*", "/{path:.*}", functools.partial(self._pass_on, session))
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            self.url = f"http://127.0.0.1:{port}"
            started.set()
            await stop.wait()
            await runner.cleanup()


def _which(request: web.Request) -> str:
    """`POST jobs`, `PATCH finetunejobs/status`, `LIST pods`, `WATCH pods`, `GET leases`."""
    parts = request.path.strip("/").split("/")
    rest = parts[(2 if parts[0] == "api" else 3) :]
    rest = rest[2:] if rest[:1] == ["namespaces"] else rest
    if request.method == "GET" and len(rest) == 1:
        return f"{'WATCH' if 'watch' in request.query else 'LIST'} {rest[0]}"
    return f"{request.method} {'/'.join([*rest[:1], *rest[2:]]) or 'discovery'}"


@contextmanager
def busy_server(cluster: Cluster, folder: Path) -> Iterator[tuple[BusyServer, Path]]:
    """The proxy, and a kubeconfig that leads to it; whoever asks is the cluster's administrator."""
    server, started = BusyServer(), threading.Event()
    context = ssl.create_default_context(cafile=str(cluster.layout.pki / "ca.crt"))
    context.load_cert_chain(cluster.layout.pki / "admin.crt", cluster.layout.pki / "admin.key")
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(context, started, stop),))
    thread.start()
    try:
        assert started.wait(10)
        kubeconfig = folder / "busy-kubeconfig"
        kubeconfig.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "busy",
                    "clusters": [{"name": "busy", "cluster": {"server": server.url}}],
                    "users": [{"name": "nobody", "user": {}}],
                    "contexts": [{"name": "busy", "context": {"cluster": "busy", "user": "nobody"}}],
                }
            )
        )
        yield server, kubeconfig
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=20)
        loop.close()
