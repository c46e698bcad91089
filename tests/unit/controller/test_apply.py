"""What is written, in which order; Events are told in the end, and never hold up a job or the end of the process."""

from __future__ import annotations

import asyncio

import pytest

from finetune.controller.cluster import apply, backoff
from finetune.controller.cluster.apply import Applier
from finetune.controller.cluster.client import ApiError
from finetune.controller.cluster.store import Store
from finetune.controller.decision.decide import Child, Decision
from finetune.controller.decision.observed import Observed
from tests.builders import FineTuneJob, Job, Pod

JOB = Observed(job=FineTuneJob().build())
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


class Recorder:
    """Writes down what it is asked, and says that every child exists."""

    def __init__(self, existing: Job | Pod | None = None) -> None:
        self.existing, self.asked = existing and existing.build(), []

    async def create(self, path, body):
        raise ApiError(409, "AlreadyExists", "there already")

    async def get(self, path):
        return self.existing

    async def merge(self, path, body, manager):
        self.asked.append(("merge", path.partition("/team/")[2], body))
        return self.existing or Job("train").build()

    async def delete(self, path, uid, grace_seconds=None):
        self.asked.append(("delete", path.partition("/team/")[2], grace_seconds))


@pytest.mark.parametrize(("wanted", "mark"), [(True, "true"), (False, None)])
async def test_a_suspension_carries_the_mark_that_it_is_ours(wanted, mark):
    api = Recorder()
    decision = Decision(suspend=((Child("Job", "tune-train-1", "uid"), wanted),))
    await Applier(api, Store()).apply(JOB, decision)
    ((_, _, body),) = api.asked
    assert body == {
        "metadata": {"uid": "uid", "labels": {"finetune.dev/suspended": mark}},
        "spec": {"suspend": wanted},
    }


async def test_a_pod_of_a_lost_machine_is_said_to_have_failed_before_it_is_removed():
    """So the Job controller counts it and takes its finalizer away, as it does after Kubernetes' own PodGC."""
    api = Recorder(Pod("train").unreachable())
    await Applier(api, Store()).apply(JOB, Decision(force=(Child("Pod", "tune-train-1-x", "uid"),)))
    (first, where, body), second = api.asked
    assert (first, where, body["status"]["phase"]) == ("merge", "pods/tune-train-1-x/status", "Failed")
    assert body["metadata"] == {"uid": "uid", "resourceVersion": api.existing["metadata"]["resourceVersion"]}
    *kept, added = body["status"]["conditions"]
    assert [item["type"] for item in kept] == ["ContainersReady", "Ready"]
    assert (added["type"], added["reason"]) == ("DisruptionTarget", "NodeLost")
    assert second == ("delete", "pods/tune-train-1-x", 0)


async def test_a_pod_that_kubernetes_counts_as_disrupted_keeps_its_words():
    api = Recorder(Pod("train").disrupted("DeletionByTaintManager"))
    await Applier(api, Store()).apply(JOB, Decision(force=(Child("Pod", "tune-train-1-x", "uid"),)))
    assert [item["reason"] for item in api.asked[0][2]["status"]["conditions"]] == ["DeletionByTaintManager"]


async def test_a_child_that_was_there_already_is_looked_at_because_nothing_more_may_happen_to_it():
    applier = Applier(Recorder(Job("prepare").complete()), Store())
    decision = Decision(create=(Job("prepare").build(),))
    assert (await applier.apply(JOB, decision)).found
    assert not (await applier.apply(JOB, decision)).found
