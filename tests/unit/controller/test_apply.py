"""Events are told in the end, and never hold up a job or the end of the process."""

from __future__ import annotations

import asyncio

import pytest

from finetune.controller.cluster import apply, backoff
from finetune.controller.cluster.apply import Applier
from finetune.controller.cluster.client import ApiError
from finetune.controller.cluster.store import Store

NEWS = {"kind": "Event", "involvedObject": {"name": "tune", "namespace": "team"}}


class Api:
    """Takes an Event after its troubles."""

    def __init__(self, *troubles: Exception) -> None:
        self.troubles, self.created = list(troubles), []

    async def create(self, path, body):
        if self.troubles:
            raise self.troubles.pop(0)
        self.created.append(body)


async def told(api: Api) -> list:
    applier = Applier(api, Store())
    applier.post(NEWS)
    await applier.drain()
    return api.created


@pytest.mark.parametrize("trouble", [ApiError(429, "", "", retry_after=0.01), ApiError(503, "", ""), OSError()])
async def test_an_event_that_was_not_taken_is_posted_again(monkeypatch, trouble):
    monkeypatch.setattr(backoff, "_FIRST_SECONDS", 0.001)
    assert await told(Api(trouble, trouble)) == [NEWS]


async def test_slow_events_take_few_connections_and_news_is_dropped_before_it_piles_up(monkeypatch):
    monkeypatch.setattr(apply, "_EVENTS_WAITING", 10)
    monkeypatch.setattr(apply, "_DRAIN_SECONDS", 0.01)
    under_way = []

    class Slow(Api):
        async def create(self, path, body):
            under_way.append(body)
            await asyncio.sleep(3600)

    applier = Applier(Slow(), Store())
    for number in range(50):
        applier.post(NEWS | {"number": number})
    await asyncio.sleep(0.01)
    assert (len(under_way), len(applier._told)) == (4, 10)
    await applier.drain()


async def test_an_event_that_is_there_already_is_left_alone():
    assert await told(Api(ApiError(409, "AlreadyExists", "told"))) == []


async def test_a_server_that_takes_no_event_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(apply, "_DRAIN_SECONDS", 0.01)
    async with asyncio.timeout(5):
        assert await told(Api(*[OSError() for _ in range(100)])) == []
