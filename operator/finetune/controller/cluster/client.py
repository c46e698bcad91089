"""The Kubernetes API as plain JSON, carried by the official client: its configuration, connections and low-level call.

No generated models: the store wants plain JSON, and a model of each object would cost milliseconds and tens of MiB.
Watches stand for minutes and so have connections of their own: short requests never wait for one of them to end.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any
from urllib.parse import urlencode

import aiohttp
import orjson
from kubernetes.aio.client import ApiClient

from finetune.controller.cluster import retry_after
from finetune.controller.cluster.access import Access

MERGE = "application/merge-patch+json"
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

_WATCH_SECONDS = 300


class ApiError(Exception):
    """The server refused, in its own words."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after
        """Seconds after which the server wants to be asked again; None when it said nothing about that."""


class Api:
    """Requests to one API server; ApiError when it refuses, OSError or TimeoutError when it is not there."""

    def __init__(self, access: Access, *, connections: int = 28, timeout: float = 20.0) -> None:
        self._server = access.server
        self._requests, self._watches = access.client(connections), access.client(0)
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self.counted: Callable[[str, str], None] = lambda verb, path: None

    async def get(self, path: str, query: Mapping[str, str] | None = None, accept: str = "") -> dict[str, Any]:
        return await self._request("GET", path, query=query, accept=accept)

    async def create(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return await self._request("POST", path, body=body)

    async def replace(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return await self._request("PUT", path, body=body)

    async def merge(self, path: str, body: Mapping[str, Any], manager: str) -> dict[str, Any]:
        """Merge patch: what `body` names becomes as it says, null removes; managedFields say who wrote it."""
        return await self._request("PATCH", path, query={"fieldManager": manager}, body=body, content_type=MERGE)

    async def delete(self, path: str, uid: str, grace_seconds: int | None = None) -> None:
        """Delete that very object, its children in the background; gone already is as good."""
        options: dict[str, Any] = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        try:
            await self._request("DELETE", path, body=options)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def watch(self, path: str, query: Mapping[str, str]) -> AsyncIterator[dict[str, Any]]:
        """Watch events until the server ends the stream."""
        limit = aiohttp.ClientTimeout(total=None, connect=20, sock_connect=10, sock_read=_WATCH_SECONDS + 30)
        query = {**query, "watch": "true", "timeoutSeconds": str(_WATCH_SECONDS), "allowWatchBookmarks": "true"}
        async with self._answer(self._watches, "GET", path, query, limit=limit) as response:
            parts: list[bytes] = []
            async for chunk in response.content.iter_any():
                *lines, rest = chunk.split(b"\n")
                for line in lines:
                    yield _decoded(b"".join((*parts, line)))
                    parts.clear()
                if rest:
                    parts.append(rest)

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        accept: str = "",
    ) -> dict[str, Any]:
        if method != "GET":
            self.counted(method, path)
        headers = {"Accept": accept or "application/json", "Content-Type": content_type}
        async with self._answer(self._requests, method, path, query, headers, body, self._timeout) as response:
            return _decoded(await response.read())

    @contextlib.asynccontextmanager
    async def _answer(
        self,
        client: ApiClient,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        limit: aiohttp.ClientTimeout | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """What the server answers. What aiohttp says about broken connections becomes the OSError that it is."""
        url = self._server + path + (f"?{urlencode(query)}" if query else "")
        sent = {**client.default_headers, **(headers or {})}
        try:
            called = await client.call_api(method, url, sent, body, _request_timeout=limit)
            async with called.response as response:
                if response.status >= 400:
                    raise _error(response, await response.read())
                yield response
        except aiohttp.ClientError as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error


def _decoded(answer: bytes) -> dict[str, Any]:
    """A JSON object; whatever else comes is not the API server's: a proxy's page, an answer that was cut."""
    try:
        found = orjson.loads(answer)
    except orjson.JSONDecodeError as error:
        raise ConnectionError(f"the answer is no JSON: {answer[:80]!r}") from error
    if not isinstance(found, dict):
        raise ConnectionError(f"the answer is no JSON object: {answer[:80]!r}")
    return found


def _error(response: aiohttp.ClientResponse, answer: bytes) -> ApiError:
    after = retry_after.seconds(response.headers.get("Retry-After", ""))
    try:
        said = orjson.loads(answer)
        reason, message = str(said.get("reason", "")), str(said.get("message", ""))
        if after is None:
            after = retry_after.seconds(str((said.get("details") or {}).get("retryAfterSeconds", "")))
    except (orjson.JSONDecodeError, AttributeError):
        reason, message = "", answer.decode(errors="replace")[:1024]
    return ApiError(response.status, reason, message, after)
