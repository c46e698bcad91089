"""What keeps the store true: lists, watches, and the comparison that heals what they miss."""

from __future__ import annotations

import asyncio

import pytest

from finetune.api import KIND
from finetune.controller.cluster import resync
from finetune.controller.cluster.access import ConfigurationError
from finetune.controller.cluster.client import ApiError
from finetune.controller.cluster.resources import WATCHED
from finetune.controller.cluster.resync import Resync
from finetune.controller.cluster.store import Store
from finetune.controller.cluster.watches import follow
from tests.builders import FineTuneJob, Job, Pod

KINDS = {resource.plural: resource.kind for resource in WATCHED}


class Api:
    """Lists what is in `items`; a watch yields what is in `changes`, then waits."""

    def __init__(self, *items) -> None:
        self.items, self.changes, self.lists = list(items), [], 0

    async def get(self, path, query=None, accept=""):
        self.lists += 1
        name = (query or {}).get("fieldSelector", "").removeprefix("metadata.name=")
        found = [item for item in self.items if item["kind"] == KINDS[path.split("/")[-1]]]
        found = [item for item in found if not name or item["metadata"]["name"] == name]
        return {"metadata": {"resourceVersion": "1000000"}, "items": found}

    async def watch(self, path, query):
        while self.changes:
            yield self.changes.pop(0)
        await asyncio.sleep(3600)


def compared(api: Api, store: Store) -> tuple[Resync, list]:
    told: list = []
    return Resync(api, store, (None,), WATCHED, told.append), told


async def test_lists_are_read_page_by_page():
    class Paged(Api):
        async def get(self, path, query=None, accept=""):
            page = await super().get(path, query, accept)
            start = int((query or {}).get("continue", 0))
            if page["items"][start + 1 :]:
                page["metadata"]["continue"] = str(start + 1)
            return page | {"items": page["items"][start : start + 1]}

    store = Store()
    await compared(Paged(*(FineTuneJob(name, name).build() for name in "abc")), store)[0].fill()
    assert len(store.job_keys()) == 3


async def test_before_the_first_decision_everything_is_listed():
    store = Store()
    await compared(Api(FineTuneJob().build(), Job("prepare").build()), store)[0].fill()
    assert len(store.observe(("team", "tune")).jobs) == 1


async def test_a_missing_definition_is_named_with_its_remedy():
    class Bare(Api):
        async def get(self, path, query=None, accept=""):
            raise ApiError(404, "", "404 page not found")

    with pytest.raises(ConfigurationError, match=r"does not know finetunejobs\.finetune\.dev; apply manifests/crd"):
        await compared(Bare(), Store())[0].fill()


@pytest.fixture
def no_pauses(monkeypatch):
    """Waits take no time; what is waited for else is as it was."""

    async def at_once(_):
        return None

    monkeypatch.setattr("finetune.controller.cluster.backoff.asyncio.sleep", at_once)


@pytest.mark.parametrize(
    "trouble",
    [
        ApiError(429, "TooManyRequests", "storage is (re)initializing", retry_after=1.0),
        ApiError(503, "ServiceUnavailable", "apiserver is shutting down"),
        ConnectionError("the connection was dropped"),
        TimeoutError(),
    ],
)
async def test_a_server_that_is_busy_at_the_start_is_asked_until_it_answers(no_pauses, trouble):
    class Busy(Api):
        async def get(self, path, query=None, accept=""):
            self.asked = getattr(self, "asked", 0) + 1
            if self.asked % 3:
                raise trouble
            return await super().get(path, query, accept)

    store = Store()
    await compared(Busy(FineTuneJob().build(), Job("prepare").build()), store)[0].fill()
    assert len(store.observe(("team", "tune")).jobs) == 1


async def test_a_list_that_the_server_forgot_half_way_is_read_from_its_beginning():
    class Forgetful(Api):
        forgot = False

        async def get(self, path, query=None, accept=""):
            page = await super().get(path, query, accept)
            start = int((query or {}).get("continue", 0))
            if start and not self.forgot:
                self.forgot = True
                raise ApiError(410, "Expired", "the continue token is too old")
            if page["items"][start + 1 :]:
                page["metadata"]["continue"] = str(start + 1)
            return page | {"items": page["items"][start : start + 1]}

    store = Store()
    await compared(Forgetful(*(FineTuneJob(name, name).build() for name in "abc")), store)[0].fill()
    assert len(store.job_keys()) == 3


@pytest.mark.parametrize("trouble", [ApiError(429, "", "busy", retry_after=1.0), ConnectionError("dropped")])
async def test_what_changed_after_the_list_is_read_before_the_first_decision_however_busy_the_server(
    no_pauses, trouble
):
    class Changing(Api):
        async def get(self, path, query=None, accept=""):
            if "fieldSelector" in query:
                self.asked = getattr(self, "asked", 0) + 1
                if self.asked == 1:
                    raise trouble
            page = await super().get(path, query, accept)
            if "fieldSelector" not in query and not accept:
                return page | {"items": []}  # the full list was read just before the job appeared
            return page

    store = Store()
    await compared(Changing(FineTuneJob().build()), store)[0].fill()
    assert store.job_keys() == [("team", "tune")]


async def test_a_comparison_whose_list_the_server_forgot_begins_anew(no_pauses):
    class Forgetful(Api):
        forgot = 0

        async def get(self, path, query=None, accept=""):
            if accept and self.forgot < 2:
                self.forgot += 1
                raise ApiError(410, "Expired", "the continue token is too old")
            return await super().get(path, query, accept)

    store = Store()
    await compared(Forgetful(FineTuneJob().build()), store)[0].fill()
    assert len(store.job_keys()) == 1


async def test_a_server_that_ends_each_watch_at_once_is_not_asked_without_a_pause():
    api, asked = Api(), []

    async def watch(path, query):
        asked.append(path)
        yield {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "5"}}}

    api.watch = watch
    following = asyncio.create_task(follow(api, "/apis/batch/v1/jobs", {}, lambda change, item: None))
    await asyncio.sleep(0.5)
    following.cancel()
    assert 1 <= len(asked) <= 4


@pytest.mark.parametrize(
    ("status", "said"), [(403, "finetunejobs.finetune.dev cannot be listed"), (401, "credentials")]
)
async def test_a_server_that_lets_the_operator_see_nothing_ends_it_in_a_sentence(status, said):
    class Closed(Api):
        async def get(self, path, query=None, accept=""):
            raise ApiError(status, "", "no")

    with pytest.raises(ConfigurationError, match=said):
        await compared(Closed(), Store())[0].fill()


async def test_what_vanished_while_nobody_watched_is_removed_and_its_job_visited():
    store, job, child = Store(), FineTuneJob().build(), Job("prepare").build()
    store.feed(job)
    store.feed(child)
    comparison, told = compared(Api(job), store)
    await comparison.round()
    assert store.get("Job", "team", "tune-prepare-1") is None
    assert told == [("team", "tune")]


async def test_what_was_recreated_meanwhile_is_taken_for_another(monkeypatch):
    monkeypatch.setattr(resync, "_GRACE_SECONDS", 0.0)
    store = Store()
    store.feed(FineTuneJob(uid="old").build())
    await compared(Api(FineTuneJob(uid="new").build()), store)[0].round()
    assert store.get(KIND, "team", "tune")["metadata"]["uid"] == "new"


async def test_what_our_own_write_made_after_the_list_is_kept():
    store, child = Store(), Job("prepare").build()
    child["metadata"]["resourceVersion"] = "1000001"
    store.feed(child)
    await compared(Api(), store)[0].round()
    assert store.get("Job", "team", "tune-prepare-1") is not None


async def test_a_watch_that_stands_still_is_healed_and_counts_as_dead_in_the_end(monkeypatch):
    monkeypatch.setattr(resync, "_GRACE_SECONDS", 0.0)
    store, api = Store(), Api()
    comparison, told = compared(api, store)
    for _ in range(4):
        api.items = [FineTuneJob().build()]
        await comparison.round()
    assert told
    assert store.observe(("team", "tune")) is not None
    assert not comparison.healthy


async def test_a_label_taken_off_and_put_back_is_no_sign_of_a_dead_watch(monkeypatch):
    monkeypatch.setattr(resync, "_GRACE_SECONDS", 0.0)
    store, pod = Store(), Pod("train").build()
    store.feed(pod)
    comparison, _ = compared(api := Api(), store)
    for _ in range(4):
        left, back = Pod("train").build(), Pod("train").build()
        metadata = left["metadata"]
        store.remove("Pod", "team", metadata["name"], metadata["uid"], int(metadata["resourceVersion"]))
        store.feed(back)
        api.items = [back]
        await comparison.round()
        assert store.get("Pod", "team", metadata["name"])
    assert comparison.healthy


async def test_who_leaves_view_time_and_again_is_no_sign_of_a_dead_watch(monkeypatch):
    """The list shows it, the watch has told of its departure since, and reading it finds it labelled or not."""
    monkeypatch.setattr(resync, "_GRACE_SECONDS", 0.0)
    store = Store()
    comparison, _ = compared(api := Api(), store)
    for _ in range(4):
        listed, left = Pod("train").build(), Pod("train").build()
        metadata = left["metadata"]
        store.remove("Pod", "team", metadata["name"], metadata["uid"], int(metadata["resourceVersion"]))
        api.items = [listed]
        await comparison.round()
        assert store.get("Pod", "team", metadata["name"]) is None
    assert comparison.healthy


@pytest.mark.parametrize("status", [403, 404])
async def test_a_comparison_that_is_refused_ends_nothing_and_is_told_until_it_works_again(status):
    answers = [ApiError(status, "", "no")]

    class Closed(Api):
        async def get(self, path, query=None, accept=""):
            if answers:
                raise answers.pop()
            return await super().get(path, query, accept)

    comparison, _ = compared(Closed(), Store())
    told = []
    for _ in range(2):
        await comparison.compare()
        told.append(comparison.refused)
    assert told == [True, False]


async def test_a_single_lag_is_no_reason_to_restart(monkeypatch):
    monkeypatch.setattr(resync, "_GRACE_SECONDS", 0.0)
    comparison, _ = compared(Api(FineTuneJob().build()), Store())
    await comparison.round()
    await comparison.round()
    assert comparison.healthy


@pytest.mark.parametrize("trouble", ["expired", "ended"])
async def test_a_watch_begins_anew_and_says_what_a_new_list_holds(monkeypatch, trouble):
    async def at_once(_):
        return None

    monkeypatch.setattr("finetune.controller.cluster.watches.asyncio.sleep", at_once)
    job = Job("prepare").build()
    api, seen, lists = Api(job), [], []
    version = {"resourceVersion": "5"}
    api.changes = [{"type": "MODIFIED", "object": job}, {"type": "BOOKMARK", "object": {"metadata": version}}]
    if trouble == "expired":
        api.changes.append({"type": "ERROR", "object": {"code": 410, "reason": "Expired"}})

    class Enough(Exception):
        pass

    def relisted(uids, version):
        lists.append(uids)
        if len(lists) == 2:
            raise Enough

    async def watch(path, query):
        if not api.changes:
            raise OSError("the connection broke")
        while api.changes:
            yield api.changes.pop(0)

    api.watch = watch
    with pytest.raises(Enough):
        await follow(api, "/apis/batch/v1/jobs", {}, lambda change, item: seen.append(change), relisted)
    assert seen == ["ADDED", "MODIFIED", "ADDED"]
    assert lists == [{job["metadata"]["uid"]}] * 2
