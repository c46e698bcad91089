"""What a replica that is told to stop leaves behind."""

from __future__ import annotations

import asyncio
import contextlib

from finetune.controller.replica import Replica


async def test_a_standby_that_is_stopped_does_not_win_the_lease_a_moment_later():
    free, won = asyncio.Event(), []

    async def acquire() -> None:
        await free.wait()
        won.append("the lease")

    guard = asyncio.create_task(asyncio.sleep(3600))
    waiting = asyncio.create_task(Replica._unless_ended(acquire(), guard, "the comparison ended"))
    await asyncio.sleep(0)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    free.set()
    for _ in range(5):
        await asyncio.sleep(0)
    guard.cancel()
    assert not won
