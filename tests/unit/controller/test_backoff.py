"""How long is waited before the next try, and for what waiting is no use."""

from __future__ import annotations

import itertools

import pytest

from finetune.controller.cluster import backoff
from finetune.controller.cluster.backoff import BackOff, Unending, passing, until_answered
from finetune.controller.cluster.client import ApiError

BUSY = ApiError(429, "TooManyRequests", "storage is (re)initializing", retry_after=3.0)


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    waits: list[float] = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(backoff.asyncio, "sleep", sleep)
    return waits


@pytest.fixture(autouse=True)
def without_jitter(monkeypatch):
    monkeypatch.setattr(backoff.random, "uniform", lambda low, high: low)


def test_the_waits_grow_to_a_limit_and_begin_anew_after_success():
    waits = BackOff(longest=2)
    assert [round(waits.after(OSError()), 3) for _ in range(6)] == [0.2, 0.4, 0.8, 1.6, 2, 2]
    waits.reset()
    assert waits.after(OSError()) == 0.2


@pytest.mark.parametrize(("asked", "waited"), [(3.0, 3.0), (0.0, 0.2), (1e9, 30.0), (float("inf"), 30.0)])
def test_the_server_says_when(asked, waited):
    assert BackOff().after(ApiError(429, "", "", retry_after=asked)) == waited


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        (BUSY, True),
        (ApiError(503, "", ""), True),
        (ApiError(500, "", ""), True),
        (OSError(), True),
        (TimeoutError(), True),
        (ApiError(403, "", ""), False),
        (ApiError(404, "", ""), False),
        (ApiError(409, "", ""), False),
        (ApiError(409, "", "", retry_after=1.0), True),
    ],
)
def test_what_may_pass(error, may_pass):
    assert passing(error) == may_pass


async def test_a_request_is_made_until_it_is_answered(slept):
    troubles = [BUSY, OSError("dropped"), ApiError(503, "", "starting")]

    async def ask() -> str:
        if troubles:
            raise troubles.pop(0)
        return "answer"

    assert await until_answered(ask, "x") == "answer"
    assert slept == [3.0, 0.2, 0.4]


async def test_a_refusal_for_good_is_not_asked_again(slept):
    async def ask() -> None:
        raise ApiError(403, "Forbidden", "no")

    with pytest.raises(ApiError, match="Forbidden"):
        await until_answered(ask, "x")
    assert not slept


def test_kopf_gets_waits_without_end_each_time():
    waits = Unending()
    for _ in range(2):
        assert list(itertools.islice(waits, 12))[-1] == 30.0
