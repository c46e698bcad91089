"""Leader election, on a clock of our own."""

from __future__ import annotations

import asyncio
import copy

import pytest

from finetune.controller.cluster.client import ApiError
from finetune.controller.cluster.lease import Lease


class Api:
    """One Lease with optimistic locking."""

    def __init__(self) -> None:
        self.lease, self.version, self.broken, self.hanging = None, 0, False, False

    async def _trouble(self) -> None:
        if self.hanging:
            await asyncio.sleep(3600)
        if self.broken:
            raise ApiError(500, "", "down")

    async def get(self, path):
        await self._trouble()
        if self.lease is None:
            raise ApiError(404, "NotFound", "no lease")
        return copy.deepcopy(self.lease)

    async def create(self, path, body):
        await self._trouble()
        if self.lease is not None:
            raise ApiError(409, "AlreadyExists", "there is one")
        return self._keep(body)

    async def replace(self, path, body):
        await self._trouble()
        if body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise ApiError(409, "Conflict", "changed")
        return self._keep(body)

    def _keep(self, body):
        self.version += 1
        self.lease = copy.deepcopy(body)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        return self.lease


class World:
    def __init__(self) -> None:
        self.api, self.time = Api(), 0.0

    def lease(self, identity: str, seconds: float = 15) -> Lease:
        return Lease(self.api, "system", "operator", identity, seconds, clock=lambda: self.time)


@pytest.fixture
def world() -> World:
    return World()


async def test_the_first_one_leads_and_the_second_does_not(world):
    first, second = world.lease("first"), world.lease("second")
    assert await first._try()
    assert not await second._try()
    assert first.leading()
    assert not second.leading()


async def test_a_leader_that_cannot_renew_stops_before_another_may_take_over(world):
    first, second = world.lease("first"), world.lease("second")
    await first._try()
    await second._try()
    world.api.broken = True
    world.time = 11.9
    assert not await first._try()
    assert first.leading()
    world.time = 12.1
    assert not first.leading()
    world.api.broken = False
    world.time = 14.9
    assert not await second._try()
    world.time = 15.1
    assert await second._try()


async def test_a_renewal_that_hangs_ends_by_its_time_limit(world):
    lease = world.lease("first", seconds=0.3)
    await lease._try()
    world.api.hanging = True
    assert not await asyncio.wait_for(lease._try(), 1)


async def test_a_released_lease_is_taken_at_once(world):
    first, second = world.lease("first"), world.lease("second")
    await first._try()
    await first.release()
    assert not first.leading()
    assert await second._try()
    assert world.api.lease["spec"]["leaseTransitions"] == 1


async def test_a_leader_that_was_overtaken_knows(world):
    first, second = world.lease("first"), world.lease("second")
    await first._try()
    await second._try()
    world.time = 16
    assert await second._try()
    assert not await first._try()
    assert not first.leading()


async def test_of_two_that_take_an_expired_lease_at_once_one_wins(world):
    contenders = [world.lease(f"replica-{number}") for number in range(5)]
    assert sum(await asyncio.gather(*(lease._try() for lease in contenders))) == 1
