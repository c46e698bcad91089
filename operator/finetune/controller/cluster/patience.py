"""kopf between us and a server in trouble: what would end kopf, and with it the process, becomes a reason to try again.

kopf asks again after a dropped connection, and lists anew after an ERROR of code 410 in a watch. A definition that is
gone for a moment (404), a list that has expired (410), an event that was cut, and all other ERRORs end it for good. So
they come to it as what it knows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson

from finetune.api import PLURAL
from finetune.controller.cluster import retry_after
from finetune.controller.cluster.backoff import BackOff

log = logging.getLogger(__name__)

_ASKED_TO_WAIT = (408, 425, 429)
_LONGEST_WAIT_SECONDS = 30.0
_REFUSED = (403, 404, 410)
_EXPIRED = 410


class Patience:
    """Middleware of the session that kopf makes its requests with."""

    def __init__(self) -> None:
        self.trouble = ""
        """Why FineTuneJobs are not watched right now, in the server's words; empty when all is well."""

        self._waits = BackOff(first=1.0, longest=_LONGEST_WAIT_SECONDS)

    async def __call__(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """The answer, if it is one; else ClientConnectionError, which kopf tries again after. kopf knows a Retry-After
        only as a whole number, and takes it however large: that is waited for here, within reason."""
        response = await handler(request)
        of_jobs = request.url.path.endswith(f"/{PLURAL}")
        if response.status in _ASKED_TO_WAIT:
            after = retry_after.seconds(response.headers.get("Retry-After", ""))
            response.close()
            await asyncio.sleep(min(1.0 if after is None else after, _LONGEST_WAIT_SECONDS))
            raise aiohttp.ClientConnectionError(f"the server answered {response.status}")
        if of_jobs and response.status in _REFUSED:
            said = f"{response.status} {(await response.text())[:256]}"
            response.close()
            self._failed(said)
            raise aiohttp.ClientConnectionError(f"the server answered {said}")
        if of_jobs and response.status == 200:
            if "watch" in request.url.query:
                response.content = _Events(response.content, self)  # type: ignore[assignment]
            else:
                self.trouble = ""
        return response

    def _failed(self, said: str) -> None:
        if said != self.trouble:
            log.warning("FineTuneJobs cannot be watched: %s", said)
        self.trouble = said

    async def begins_anew(self, said: str) -> None:
        """A watch ended with an ERROR; each time in a row it takes longer until the list that follows."""
        self._failed(said)
        await asyncio.sleep(self._waits.after())

    def works(self) -> None:
        """A watch brings what happens."""
        self._waits.reset()


class _Events:
    """The lines of a watch, as kopf reads them: an ERROR of any code says to list anew."""

    def __init__(self, content: aiohttp.StreamReader, patience: Patience) -> None:
        self._content, self._patience = content, patience

    def __getattr__(self, name: str) -> Any:
        """aiohttp, too, knows this as the response's content: all but the lines is as it was."""
        return getattr(self._content, name)

    async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
        """Whole lines; one that was cut is no event."""
        rest = b""
        async for chunk in self._content.iter_chunked(size):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield await self._mended(line) + b"\n"

    async def _mended(self, line: bytes) -> bytes:
        if not line.startswith(b'{"type":"ERROR"'):
            self._patience.works()
            return line
        event = orjson.loads(line)
        status = event["object"]
        if status.get("code") != _EXPIRED:
            await self._patience.begins_anew(f"{status.get('code')} {status.get('reason')}: {status.get('message')}")
            event["object"] = {**status, "code": _EXPIRED}
        return orjson.dumps(event)
