"""What is remembered, and who is visited when."""

from __future__ import annotations

import asyncio
import copy
import sys

from finetune.api import KIND
from finetune.api.contract import JOB_LABEL, Step
from finetune.controller.cluster.queue import PATIENCE_SECONDS, WorkQueue
from finetune.controller.cluster.store import Store, slim
from finetune.controller.decision.observed import Warned
from tests.builders import Claim, FineTuneJob, Job, Pod

KEY = ("team", "tune")


def test_a_job_is_observed_with_everything_that_carries_its_name():
    store = Store()
    for item in (FineTuneJob(), Job("prepare"), Pod("prepare"), Claim(), Job("train", job="other")):
        store.feed(item.build())
    observed = store.observe(KEY)
    assert [len(items) for items in (observed.jobs, observed.pods, observed.claims)] == [1, 1, 1]


def test_a_watch_that_lags_does_not_take_back_our_own_writes():
    store = Store()
    old, new = Job("prepare").build(), Job("prepare").suspended().build()
    assert store.feed(new) == KEY
    assert store.feed(old) is None
    assert store.get("Job", "team", "tune-prepare-1")["spec"]["suspend"]


def test_our_own_write_seen_again_is_no_news():
    store, job = Store(), FineTuneJob().build()
    store.feed(job)
    assert store.feed(job) is None


def test_what_was_deleted_does_not_come_back_by_a_late_answer():
    store, job = Store(), Job("prepare").build()
    store.feed(job)
    assert store.remove("Job", "team", "tune-prepare-1", job["metadata"]["uid"]) == KEY
    assert store.feed(job) is None
    assert store.get("Job", "team", "tune-prepare-1") is None


def test_who_lost_a_label_and_gets_it_back_is_seen_again():
    """To a watch with a selector the loss of a label is a deletion."""
    store, job = Store(), Job("prepare").build()
    store.feed(job)
    left, back = (int(Job("prepare").build()["metadata"]["resourceVersion"]) for _ in range(2))
    assert store.remove("Job", "team", "tune-prepare-1", job["metadata"]["uid"], left) == KEY
    assert store.feed(job) is None
    job["metadata"]["resourceVersion"] = str(back)
    assert store.feed(job) == KEY
    assert store.get("Job", "team", "tune-prepare-1") is not None


def test_what_was_deleted_for_certain_stays_so():
    store, job = Store(), FineTuneJob().build()
    store.remove(KIND, *KEY, uid=job["metadata"]["uid"])
    assert store.feed(FineTuneJob().build()) is None


def test_the_late_deletion_of_a_former_object_does_not_remove_its_namesake():
    store = Store()
    store.feed(FineTuneJob(uid="new").build())
    store.remove(KIND, *KEY, uid="old")
    assert store.observe(KEY).uid == "new"


def test_a_warning_reaches_the_job_whose_child_it_is_about():
    store, job = Store(), Job("prepare").build()
    store.feed(FineTuneJob().build())
    store.feed(job)
    warned = Warned("Job", "tune-prepare-1", job["metadata"]["uid"], "FailedCreate", "quota")
    assert store.warn(warned, "team") == KEY
    assert store.warn(warned, "team") is None
    assert store.observe(KEY).warnings == (warned,)


def test_objects_are_kept_slim():
    pod = Pod("prepare").running(Step.RELOAD).build()
    pod["metadata"] |= {"managedFields": ["x" * 1000], "annotations": {"finetune.dev/job": "x" * 1000}}
    pod["spec"] = {"nodeName": "n", "containers": ["x" * 1000]}
    assert "x" * 1000 not in str(slim(pod))
    assert slim(pod)["spec"] == {"nodeName": "n"}
    assert sys.getsizeof(str(slim(pod))) < 3_000


def test_a_child_that_vanishes_after_its_end_is_shown_to_the_next_visit_as_it_ended():
    store = Store()
    for item in (FineTuneJob(), Job("prepare"), Pod("prepare").running(Step.DOWNLOAD)):
        store.feed(item.build())
    job, pod = Job("prepare").complete().build(), Pod("prepare").succeeded().build()
    for last in (job, pod):
        metadata = last["metadata"]
        store.remove(last["kind"], metadata["namespace"], metadata["name"], metadata["uid"], last=last)
    observed = store.observe(KEY)
    assert (observed.jobs, observed.pods) == ((), ())
    assert list(observed.attempts("prepare")) == [1]
    assert [item["status"]["phase"] for item in observed.pods_of("prepare", 1)] == ["Succeeded"]


def test_a_child_that_vanishes_before_its_end_or_with_its_job_is_forgotten():
    store, job, pod = Store(), Job("prepare").build(), Pod("prepare").succeeded().build()
    for item in (FineTuneJob().build(), job, pod):
        store.feed(item)
    store.remove("Job", "team", "tune-prepare-1", job["metadata"]["uid"], last=job)
    store.remove(KIND, *KEY, uid="job-1")
    store.remove("Pod", "team", "tune-prepare-1-x", pod["metadata"]["uid"], last=pod)
    store.feed(FineTuneJob(uid="job-1b").build())
    assert store.observe(KEY).departed == ()


def test_who_suspended_a_job_is_kept_without_the_fields_of_all_managers():
    shown = slim(Job("train").suspended(by="kueue").build())
    assert shown["suspendedBy"] == "kueue"
    assert "managedFields" not in shown["metadata"]


BEGUN = {"startTime": "2026-03-01T12:00:00Z"}


class TestClaims:
    """Jobs that bring the same claim work in it one after the other."""

    @staticmethod
    def using(name: str, status: dict | None = None, **spec) -> FineTuneJob:
        job = FineTuneJob(name, uid=f"uid-{name}").with_spec(workspace={"claimName": "mine"}, **spec)
        return job.with_status(status or {})

    def holder(self, name: str, *others, children=()) -> str:
        store = Store()
        for item in (self.using(name), *others, *children):
            store.feed(item.build())
        return store.observe(("team", name)).claim_held_by

    def test_whoever_began_holds_it(self):
        assert self.holder("a", self.using("b", BEGUN)) == "b"

    def test_of_two_that_have_not_begun_the_first_by_time_and_name_goes_first(self):
        assert self.holder("a", self.using("b")) == ""
        assert self.holder("b", self.using("a")) == "a"

    def test_one_that_has_finished_or_waits_suspended_holds_nothing(self):
        over = BEGUN | {"completionTime": "2026-03-01T13:00:00Z"}
        assert self.holder("b", self.using("a", over), self.using("aa", suspend=True)) == ""

    def test_one_that_has_finished_or_is_gone_holds_it_while_a_pod_of_it_runs(self):
        over = BEGUN | {"completionTime": "2026-03-01T13:00:00Z"}
        pod = Pod("train", job="a", owner="uid-a").on("n").running(Step.TRAIN)
        assert self.holder("b", self.using("a", over), children=(pod,)) == "a"
        store = Store()
        for item in (self.using("a", BEGUN), self.using("b"), pod):
            store.feed(item.build())
        store.remove(KIND, "team", "a", uid="uid-a")
        assert store.observe(("team", "b")).claim_held_by == "a"
        store.remove("Pod", "team", "a-train-1-x", uid="uid-a-a-train-1-x")
        assert store.observe(("team", "b")).claim_held_by == ""

    def test_one_that_names_another_claim_meanwhile_holds_this_one_no_more(self):
        moved = FineTuneJob("a", uid="uid-a").with_spec(workspace={"claimName": "other"})
        assert self.holder("b", self.using("a"), moved) == ""

    def test_jobs_with_claims_of_their_own_or_in_another_namespace_know_nothing_of_each_other(self):
        elsewhere = FineTuneJob("z", uid="z", namespace="other").with_spec(workspace={"claimName": "mine"})
        assert self.holder("a", elsewhere.with_status(BEGUN), FineTuneJob("c", uid="c")) == ""


def test_a_child_relabelled_to_another_job_leaves_nothing_with_the_first():
    store, child = Store(), Job("prepare").build()
    store.feed(FineTuneJob().build())
    store.feed(child)
    moved = copy.deepcopy(child)
    moved["metadata"]["labels"][JOB_LABEL] = "other"
    moved["metadata"]["resourceVersion"] = str(int(child["metadata"]["resourceVersion"]) + 1_000)
    store.feed(moved)
    store.remove("Job", "team", child["metadata"]["name"], child["metadata"]["uid"], last=moved)
    assert store.observe(KEY).jobs == ()


async def test_a_job_is_visited_once_however_often_it_is_added():
    queue, visits = WorkQueue(), []

    async def visit(key):
        visits.append(key)

    for _ in range(5):
        queue.add(KEY)
    worker = asyncio.create_task(queue.work(visit))
    await asyncio.sleep(0.01)
    queue.close()
    await worker
    assert visits == [KEY]


async def test_two_workers_never_visit_the_same_job_and_news_during_a_visit_are_not_lost():
    queue, busy, most, visits = WorkQueue(), 0, 0, 0

    async def visit(key):
        nonlocal busy, most, visits
        busy, visits = busy + 1, visits + 1
        most = max(most, busy)
        if visits == 1:
            queue.add(key)
        await asyncio.sleep(0.01)
        busy -= 1

    workers = [asyncio.create_task(queue.work(visit)) for _ in range(4)]
    queue.add(KEY)
    await asyncio.sleep(0.1)
    queue.close()
    await asyncio.gather(*workers)
    assert (most, visits) == (1, 2)


async def test_a_delayed_visit_happens_when_it_is_due_and_a_new_time_replaces_the_old():
    queue, visits = WorkQueue(), []

    async def visit(key):
        visits.append(key)

    worker = asyncio.create_task(queue.work(visit))
    queue.add_after(KEY, 60)
    queue.add_after(KEY, 0.01)
    await asyncio.sleep(0.1)
    assert visits == [KEY]
    queue.close()
    await worker


async def visited(queue: WorkQueue) -> list[str]:
    """The order in which one worker visits what waits."""
    visits: list[str] = []

    async def visit(key):
        visits.append(key[1])

    worker = asyncio.create_task(queue.work(visit))
    await asyncio.sleep(0.01)
    queue.close()
    await worker
    return visits


async def test_work_goes_before_news():
    queue = WorkQueue()
    queue.add(("team", "news"), news=True)
    queue.add(("team", "work"))
    assert await visited(queue) == ["work", "news"]


async def test_news_that_waited_long_take_turns_with_work():
    now = 0.0
    queue = WorkQueue(clock=lambda: now)
    for number in range(2):
        queue.add(("team", f"news-{number}"), news=True)
    for number in range(3):
        queue.add(("team", f"work-{number}"))
    now = PATIENCE_SECONDS + 1
    assert await visited(queue) == ["news-0", "work-0", "news-1", "work-1", "work-2"]


async def test_a_job_whose_news_wait_is_visited_at_once_when_there_is_work():
    queue = WorkQueue()
    for name in ("first", "second"):
        queue.add(("team", name), news=True)
    queue.add(("team", "second"))
    assert await visited(queue) == ["second", "first"]
    assert not len(queue)


async def test_closing_finishes_the_visit_under_way_and_begins_no_other():
    queue, ended = WorkQueue(), []

    async def visit(key):
        await asyncio.sleep(0.05)
        ended.append(key)

    worker = asyncio.create_task(queue.work(visit))
    queue.add(KEY)
    await asyncio.sleep(0.01)
    queue.add(("team", "other"))
    queue.close()
    await worker
    assert ended == [KEY]
