"""Keeps the authority's Secret and this replica's leaf: the leader writes, everybody reads."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from finetune.controller.cluster.backoff import UNREACHABLE, BackOff
from finetune.controller.cluster.client import ApiError
from finetune.controller.cluster.resources import SECRETS
from finetune.controller.serving.certificates import Authority, issue, load_into, renewed

log = logging.getLogger(__name__)

_ROUND_SECONDS = 3600.0
_WAIT_SECONDS = 1.0


class SecretApi(Protocol):
    async def get(self, path: str) -> dict[str, Any]: ...
    async def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]: ...
    async def replace(self, path: str, body: dict[str, Any]) -> dict[str, Any]: ...


class Trust:
    """The TLS context of the progress service, and the bundle that pods trust it by."""

    def __init__(
        self, api: SecretApi, namespace: str, secret: str, hosts: tuple[str, ...], leading: Callable[[], bool]
    ) -> None:
        self._api, self._namespace, self._secret, self._hosts, self._leading = api, namespace, secret, hosts, leading
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.bundle = ""
        self.ready = asyncio.Event()

    async def run(self) -> None:
        """Keep the leaf fresh, for ever. Before the first leader made the authority, replicas wait for it."""
        waits = BackOff()
        while True:
            try:
                authority = await self._authority()
            except UNREACHABLE as error:
                log.warning("the certificate authority could not be read or written: %r", error)
                await asyncio.sleep(waits.after(error))
                continue
            if authority is None:
                await asyncio.sleep(_WAIT_SECONDS)
                continue
            waits.reset()
            load_into(self.context, issue(authority.current, self._hosts, datetime.now(UTC)))
            self.bundle = authority.bundle
            self.ready.set()
            await asyncio.sleep(_ROUND_SECONDS)

    async def _authority(self) -> Authority | None:
        path = SECRETS.path(self._namespace, self._secret)
        secret: dict[str, Any] | None = None
        known: Authority | None = None
        try:
            secret = await self._api.get(path)
            known = Authority.from_secret_data(secret.get("data") or {})
        except ApiError as error:
            if error.status != 404:
                raise
        except (KeyError, ValueError):
            log.warning("the Secret %s holds no authority of ours: it is written anew", self._secret)
        if not self._leading():
            return known
        authority = renewed(known, datetime.now(UTC))
        if authority is known:
            return known
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": self._secret, "namespace": self._namespace},
            "type": "Opaque",
            "data": authority.secret_data(),
        }
        if secret is None:
            await self._api.create(SECRETS.path(self._namespace), body)
        else:
            await self._api.replace(path, {**secret, "data": body["data"]})
        log.info("the certificate authority was written to Secret %s", self._secret)
        return authority
