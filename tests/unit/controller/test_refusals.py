"""A job that the server holds up: it costs next to nothing, its message stands, and what may help is tried at once."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta

import pytest

from finetune.api import KIND
from finetune.controller.cluster import reconciler
from finetune.controller.cluster.apply import Applier
from finetune.controller.cluster.client import ApiError
from finetune.controller.cluster.queue import WorkQueue
from finetune.controller.cluster.reconciler import Reconciler
from finetune.controller.cluster.store import Store
from tests.builders import FineTuneJob
from tests.simulation.replica import SETTINGS
from tests.simulation.server import Server

KEY = ("team", "tune")
QUOTA = ApiError(
    403, "Forbidden", 'jobs.batch "tune-prepare-1" is forbidden: exceeded quota: few, used: count/jobs.batch=1'
)
WEBHOOK_DOWN = ApiError(
    500, "InternalError", 'Internal error occurred: failed calling webhook "v.example.com": connection refused'
)
WEBHOOK_DENIES = ApiError(422, "Invalid", 'admission webhook "v.example.com" denied the request: not on Fridays')
POLICY_DENIES = ApiError(422, "Invalid", "ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no")
QUOTA_BUSY = ApiError(409, "Conflict", "Operation cannot be fulfilled on resourcequotas: the object has been modified")


class Desk:
    """One operator before the model server, which refuses Jobs as long as `trouble` says."""

    def __init__(self, trouble: ApiError | None, server: Server | None = None) -> None:
        """On a server that is given, it knows of the job and of nothing else."""
        self.server, self.trouble, self.store = server or Server(), trouble, Store()
        self.posts: list[float] = []
        self.messages: list[str] = []
        self.told: Counter[str] = Counter()
        self.began = self.server.now
        self.store.feed(server.objects[KIND, "tune"] if server else self.server.submit(FineTuneJob()))
        self.reconciler = Reconciler(
            self.store, WorkQueue(), Applier(self, self.store), lambda: SETTINGS, now=lambda: self.server.now
        )

    async def get(self, path):
        return await self.server.get(path)

    async def merge(self, path, body, manager):
        if "status" in body:
            self.messages.append(body["status"].get("message", "as before"))
        return await self.server.merge(path, body, manager)

    async def create(self, path, body):
        if body["kind"] == "Event":
            if body["metadata"]["name"] in self.told:
                raise ApiError(409, "AlreadyExists", "told")
            self.told[body["metadata"]["name"]] += body["type"] == "Warning"
            return body
        if body["kind"] == "Job":
            self.posts.append((self.server.now - self.began).total_seconds())
            if self.trouble:
                raise self.trouble
        return await self.server.create(path, body)

    async def minutes(self, count: float) -> None:
        """Every second somebody looks at the job: there is always news of something."""
        for _ in range(round(60 * count)):
            await self.reconciler.visit(KEY)
            self.server.now += timedelta(seconds=1)
        await self.reconciler.applier.drain()

    @property
    def status(self):
        return self.server.objects[KIND, "tune"]["status"]


@pytest.fixture(autouse=True)
def without_jitter(monkeypatch):
    monkeypatch.setattr("finetune.controller.cluster.backoff.random.uniform", lambda low, high: low)


@pytest.mark.parametrize("trouble", [QUOTA, WEBHOOK_DOWN, WEBHOOK_DENIES, POLICY_DENIES, QUOTA_BUSY], ids=str)
async def test_a_job_that_is_held_up_says_why_once_and_asks_ever_more_rarely(trouble):
    desk = Desk(trouble)
    await desk.minutes(1)
    assert desk.posts == [0, 4, 11, 24, 49]
    said = f"the Job tune-prepare-1 cannot be created: {trouble.message}"
    assert desk.messages == ["", said]
    assert (desk.status["message"], desk.status["phase"]) == (said, "Pending")
    assert list(desk.told.values()) == [1]


async def test_in_the_end_it_is_tried_every_two_minutes():
    desk = Desk(QUOTA)
    await desk.minutes(8)
    assert desk.posts[5:] == [98, 195, 316, 437]
    assert len(desk.messages) == 2


async def test_when_the_refusal_passes_the_job_goes_on_and_the_message_with_it():
    desk = Desk(QUOTA)
    await desk.minutes(0.2)
    desk.trouble = None
    await desk.minutes(0.5)
    assert len(desk.posts) == 4
    assert desk.messages[2:] == [""]
    assert ("Job", "tune-prepare-1") in desk.server.objects


async def test_an_edit_of_the_job_has_it_tried_at_once():
    desk = Desk(QUOTA)
    await desk.minutes(2)
    before = len(desk.posts)
    desk.server.edit("tune", activeDeadlineSeconds=100_000)
    desk.store.feed(desk.server.objects[KIND, "tune"])
    desk.trouble = None
    await desk.reconciler.visit(KEY)
    assert len(desk.posts) == before + 1
    assert desk.status["message"] == ""


async def test_a_job_of_the_same_name_inherits_no_refusal():
    desk = Desk(QUOTA)
    await desk.minutes(2)
    desk.server.remove("tune")
    for _ in range(5):
        desk.server.tick()
    desk.store.remove(KIND, *KEY, uid="job-1")
    for claim, (uid, _) in desk.store.versions("PersistentVolumeClaim").items():
        desk.store.remove("PersistentVolumeClaim", *claim, uid=uid)
    await desk.reconciler.visit(KEY)
    desk.store.feed(desk.server.submit(FineTuneJob(uid="second")))
    desk.trouble = None
    await desk.reconciler.visit(KEY)
    assert ("Job", "tune-prepare-1") in desk.server.objects


async def test_what_the_api_itself_finds_wrong_ends_the_job():
    desk = Desk(ApiError(422, "Invalid", 'Job.batch "tune-prepare-1" is invalid: spec.template: Invalid value'))
    await desk.minutes(0.1)
    assert desk.status["phase"] == "Failed"
    assert desk.posts == [0]


async def test_a_child_that_nobody_told_of_is_gone_on_with():
    """The answer to its creation was lost, it has ended since, and no watch will ever say so again."""
    former = Desk(None)
    await former.reconciler.visit(KEY)
    for _ in range(10):
        former.server.tick()
    assert former.server.succeeded
    desk = Desk(None, former.server)
    await desk.minutes(0.5)  # its pods are waited for: they would have more to say
    assert ("Job", "tune-train-1") in desk.server.objects


async def test_children_that_nobody_told_of_are_all_gone_on_with(monkeypatch):
    """One visit makes few passes; what the last of them found is looked at in another one."""
    monkeypatch.setattr(reconciler, "_PASSES", 1)
    former = Desk(None)
    await former.reconciler.visit(KEY)
    desk = Desk(None, former.server)
    await desk.reconciler.visit(KEY)
    assert len(desk.reconciler.queue) == 1


async def test_a_child_without_its_label_is_named_and_not_posted_again_and_again():
    desk = Desk(None)
    await desk.minutes(0.02)
    job = desk.server.objects["Job", "tune-prepare-1"]
    job["metadata"]["labels"].pop("finetune.dev/job-name")
    desk.server._changed(job)
    desk.store.remove("Job", "team", "tune-prepare-1", job["metadata"]["uid"], int(job["metadata"]["resourceVersion"]))
    await desk.minutes(1)
    assert len(desk.posts) < 8
    assert "has lost its label finetune.dev/job-name=tune: put it back" in desk.status["message"]
