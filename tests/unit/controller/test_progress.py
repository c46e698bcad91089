"""Writing live progress: the newest report of a job is written in the end, whatever the server says meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from finetune.api.contract import Step
from finetune.api.status import Progress
from finetune.controller.cluster import backoff
from finetune.controller.cluster.apply import write_progress
from finetune.controller.cluster.client import ApiError
from finetune.controller.cluster.store import Store
from finetune.controller.serving.progress import ProgressWriter
from finetune.controller.serving.telemetry import Report
from tests.builders import NOW, FineTuneJob


class Api:
    """Raises its troubles one after the other, then keeps what is written."""

    def __init__(self, *troubles: Exception, newest: FineTuneJob | None = None) -> None:
        self.troubles, self.written = list(troubles), []
        self.newest = (newest or FineTuneJob()).build()

    async def get(self, path):
        return self.newest

    async def merge(self, path, body, manager):
        if self.troubles:
            raise self.troubles.pop(0)
        assert (set(body["status"]), manager) == ({"progress"}, "finetune-progress")
        self.patch = body["status"]["progress"]
        self.written.append(body["status"]["progress"]["percent"])
        return self.newest


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(backoff, "_FIRST_SECONDS", 0.001)


async def written(api: Api, *percents: int) -> list[int]:
    """What is written of reports that come at once."""
    writer = ProgressWriter(api, Store(), between=0.001, now=lambda: NOW)
    for percent in percents:
        writer.put(FineTuneJob().build(), Step.TRAIN, Report(percent=percent))
        await asyncio.sleep(0)
    async with asyncio.timeout(5):
        while writer._tasks:
            await asyncio.gather(*writer._tasks.values())
    return api.written


@pytest.mark.parametrize(
    "trouble",
    [
        ApiError(429, "TooManyRequests", "busy", retry_after=0.001),
        ApiError(503, "", "starting"),
        ConnectionError("dropped"),
        TimeoutError(),
    ],
)
async def test_a_report_that_could_not_be_written_is_written_later(trouble):
    assert await written(Api(trouble, trouble), 43) == [43]


async def test_a_newer_report_takes_the_place_of_one_that_waits():
    assert await written(Api(ApiError(503, "", "starting")), 43, 44) == [44]


async def test_a_status_that_changed_twice_meanwhile_is_tried_again():
    conflict = ApiError(409, "Conflict", "the object has been modified")
    assert await written(Api(conflict, conflict), 43) == [43]


async def test_nothing_is_written_to_another_job_of_the_name():
    conflict = ApiError(409, "Conflict", "the object has been modified")
    assert await written(Api(conflict, newest=FineTuneJob(uid="another")), 43) == []


async def test_a_report_of_a_job_that_is_gone_is_dropped():
    assert await written(Api(ApiError(404, "NotFound", "gone")), 43) == []


async def test_what_is_no_longer_so_is_removed_and_what_a_newer_operator_wrote_stays():
    shown = {"step": "train", "summary": "1%", "percent": 1, "remaining": "5m", "phase": "Training", "newer": 1}
    job = FineTuneJob().with_status({"phase": "Training", "progress": shown}).build()
    api = Api()
    await write_progress(api, job, Progress(step="train", summary="2%", percent=2, newer=1))
    assert api.patch == {"summary": "2%", "percent": 2, "remaining": "", "phase": None}


async def test_what_the_definition_does_not_know_of_progress_is_not_written():
    api = Api()
    progress = Progress(step="train", percent=2, unit="step")

    def storable(status):
        return {"progress": {"percent": status["progress"]["percent"]}} if status else {}

    await write_progress(api, FineTuneJob().build(), progress, storable)
    assert api.patch == {"percent": 2}
