"""The Kubernetes API as JSON over HTTP: no models, no conversions, a time-out on every call.

The generated client would cost 40 MiB and several milliseconds for each object; the store wants plain JSON anyway.
"""

from __future__ import annotations

import base64
import contextlib
import os
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import yaml

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TOKEN_SECONDS = 60.0


class ApiError(Exception):
    """The server refused, in its own words."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message


class ConfigurationError(ValueError):
    """The operator cannot work as it is set up; the message says what to change."""


@dataclass(frozen=True)
class Connection:
    """Where the API server is and how to be let in."""

    server: str
    ssl: ssl.SSLContext | bool
    token: Callable[[], str]


def connection(environment: Mapping[str, str] = os.environ) -> Connection:
    """From the pod's service account, or else from the kubeconfig file."""
    if "KUBERNETES_SERVICE_HOST" in environment and (_ACCOUNT / "token").exists():
        host, port = environment["KUBERNETES_SERVICE_HOST"], environment.get("KUBERNETES_SERVICE_PORT", "443")
        host = f"[{host}]" if ":" in host else host
        context = ssl.create_default_context(cafile=str(_ACCOUNT / "ca.crt"))
        return Connection(f"https://{host}:{port}", context, _fresh(_ACCOUNT / "token"))
    path = Path(environment.get("KUBECONFIG") or Path.home() / ".kube" / "config")
    if not path.exists():
        raise ConfigurationError(f"not in a pod, and there is no kubeconfig at {path}: set KUBECONFIG")
    return _from_kubeconfig(path)


def _fresh(path: Path) -> Callable[[], str]:
    read_at, token = 0.0, ""

    def read() -> str:
        nonlocal read_at, token
        if not token or time.monotonic() - read_at > _TOKEN_SECONDS:
            read_at, token = time.monotonic(), path.read_text().strip()
        return token

    return read


def _from_kubeconfig(path: Path) -> Connection:
    config = yaml.safe_load(path.read_text())

    def named(kind: str, name: str) -> dict[str, Any]:
        return next(dict(item[kind]) for item in config[f"{kind}s"] if item["name"] == name)

    context = named("context", config["current-context"])
    cluster, user = named("cluster", context["cluster"]), named("user", context["user"])
    if "exec" in user:
        raise ConfigurationError(f"{path} logs in through a program (exec), which the operator does not run")
    with tempfile.TemporaryDirectory() as folder:

        def file(source: dict[str, Any], key: str) -> str | None:
            if data := source.get(f"{key}-data"):
                (Path(folder) / key).write_bytes(base64.b64decode(data))
                return str(Path(folder) / key)
            return str(path.parent / source[key]) if key in source else None

        tls = ssl.create_default_context(cafile=file(cluster, "certificate-authority"))
        if cluster.get("insecure-skip-tls-verify"):
            tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        if certificate := file(user, "client-certificate"):
            tls.load_cert_chain(certificate, file(user, "client-key"))
    if "tokenFile" in user:
        return Connection(cluster["server"], tls, _fresh(path.parent / user["tokenFile"]))
    token = str(user.get("token", ""))
    return Connection(cluster["server"], tls, lambda: token)


class Api:
    """Requests to one API server over a pool of connections; ApiError when it refuses, OSError when it is not there."""

    def __init__(self, where: Connection, *, connections: int = 28, timeout: float = 20.0) -> None:
        self._where = where
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections, ssl=where.ssl))
        self.counted: Callable[[str, str], None] = lambda verb, path: None

    async def close(self) -> None:
        await self._session.close()

    async def get(self, path: str, query: Mapping[str, str] | None = None, accept: str = "") -> dict[str, Any]:
        return await self._request("GET", path, query=query, accept=accept)

    async def create(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return await self._request("POST", path, body=body)

    async def replace(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return await self._request("PUT", path, body=body)

    async def merge(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return await self._request("PATCH", path, body=body, content_type=MERGE)

    async def apply(self, path: str, body: Mapping[str, Any], manager: str) -> dict[str, Any]:
        """Server-side apply: of the manager's fields, exactly those in `body` stay."""
        query = {"fieldManager": manager, "force": "true"}
        return await self._request("PATCH", path, query=query, body=body, content_type=APPLY)

    async def delete(self, path: str, uid: str) -> None:
        """Delete that very object, its children in the background; gone already is as good."""
        options = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        try:
            await self._request("DELETE", path, body=options)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def watch(self, path: str, query: Mapping[str, str]) -> AsyncIterator[dict[str, Any]]:
        """Watch events until the server ends the stream."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=330)
        seconds = {"watch": "true", "timeoutSeconds": "300", "allowWatchBookmarks": "true"}
        async with (
            _reachable(),
            self._session.get(
                self._where.server + path, params={**query, **seconds}, headers=self._headers(), timeout=timeout
            ) as response,
        ):
            if response.status >= 400:
                raise _error(response.status, await response.read())
            parts: list[bytes] = []
            async for chunk in response.content.iter_any():
                *lines, rest = chunk.split(b"\n")
                for line in lines:
                    yield orjson.loads(b"".join((*parts, line)))
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
        headers = self._headers() | {"Accept": accept or "application/json"}
        data = None
        if body is not None:
            headers["Content-Type"] = content_type
            data = orjson.dumps(body)
        if method != "GET":
            self.counted(method, path)
        async with (
            _reachable(),
            self._session.request(
                method, self._where.server + path, params=query, data=data, headers=headers, timeout=self._timeout
            ) as response,
        ):
            answer = await response.read()
            if response.status >= 400:
                raise _error(response.status, answer)
            return dict(orjson.loads(answer))

    def _headers(self) -> dict[str, str]:
        token = self._where.token()
        return {"User-Agent": "finetune-operator"} | ({"Authorization": f"Bearer {token}"} if token else {})


@contextlib.asynccontextmanager
async def _reachable() -> AsyncIterator[None]:
    """What aiohttp says about broken connections, as the OSError that it is."""
    try:
        yield
    except aiohttp.ClientError as error:
        raise ConnectionError(repr(error)) from error


def _error(status: int, answer: bytes) -> ApiError:
    try:
        said = orjson.loads(answer)
        return ApiError(status, str(said.get("reason", "")), str(said.get("message", "")))
    except (orjson.JSONDecodeError, AttributeError):
        return ApiError(status, "", answer.decode(errors="replace")[:1024])
