"""The operator may die between any two writes, read late, and meet every fate of pods: jobs end as if nothing were."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from finetune.api import KIND
from finetune.api.contract import Step
from finetune.controller.decision.observed import finished
from tests.builders import NOW, FineTuneJob
from tests.simulation.replica import SETTINGS, Operator, Writes, check, outcome, run
from tests.simulation.server import Server, random_fates


def scripted(fates: dict[tuple[str, int], str]):
    """The n-th end of a step has that fate; all others go well."""
    counts: dict[str, int] = {}

    def fate(pod, step):
        counts[step] = counts.get(step, 0) + 1
        return fates.get((step, counts[step]), "ok")

    return fate


FATES = {
    "undisturbed": {},
    "preempted in mid-training": {(Step.TRAIN, 2): "evict"},
    "crashed twice while training": {(Step.TRAIN, 1): "crash", (Step.TRAIN, 2): "oom"},
    "store unavailable while preparing": {(Step.DOWNLOAD, 1): "unavailable"},
    "bad data": {(Step.LOAD_DATASET, 1): "user-error"},
    "node lost while saving": {(Step.SAVE, 1): "lost"},
}


def two_pods() -> FineTuneJob:
    """A job that two pods train together."""
    return FineTuneJob().training(nodes=2, batchSize=2).with_spec(workspace={"accessModes": ["ReadWriteMany"]})


JOBS = {"one pod": FineTuneJob, "two pods": two_pods}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("name", FATES)
async def test_a_crash_at_any_write_changes_nothing(name, job):
    fates = FATES[name]
    server = Server(scripted(fates))
    server.submit(JOBS[job]())
    writes = Writes(server)
    await run(server, writes)
    expected = outcome(server)
    assert expected["phase"] == ("Failed" if name == "bad data" else "Complete")
    for crash in range(1, writes.count + 1):
        for after in (False, True):
            server = Server(scripted(fates))
            server.submit(JOBS[job]())
            await run(server, Writes(server, crash, after=after))
            assert outcome(server) == expected, f"died {'after' if after else 'before'} write {crash}"


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("seed", range(40))
async def test_whatever_befalls_the_pods_and_however_late_the_watch_is_the_job_completes(seed, job):
    rng = random.Random(seed)
    server = Server(random_fates(rng, bad=0.15))
    server.submit(JOBS[job]().with_spec(retry={"limit": 100}))
    await run(server, Writes(server, rng.randrange(1, 60), after=rng.random() < 0.5), lag=rng)
    status = server.objects[KIND, "tune"]["status"]
    assert status["phase"] == "Complete"
    assert status["training"]["steps"] == 4
    assert status["attempts"]["count"] == len({n.rpartition("-")[0] for _, s, n in server.started if s == "train"})


@pytest.mark.parametrize("workspace", ["the job's own", "the user's"])
@pytest.mark.parametrize("seed", range(15))
async def test_deleted_and_applied_again_under_the_same_name_the_new_job_waits_and_runs_clean(seed, workspace):
    rng = random.Random(seed)
    moment = rng.randrange(1, 18)
    server = Server(random_fates(rng, bad=0.05))
    spec = {"retry": {"limit": 100}}
    if workspace == "the user's":
        spec["workspace"] = {"claimName": "mine"}
        claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "mine", "namespace": "team"}}
        await server.create("", claim)
    server.submit(FineTuneJob(uid="first").with_spec(**spec))

    def script(server: Server, second: int) -> None:
        if second == moment:
            server.remove("tune")
            server.submit(FineTuneJob(uid="second").with_spec(**spec))

    await run(server, lag=rng if seed % 2 else None, script=script, until=lambda server: _complete(server, "second"))
    for _ in range(20):
        server.tick()
    owners = {
        item["metadata"]["ownerReferences"][0]["uid"]
        for item in server.objects.values()
        if item["metadata"].get("ownerReferences") and item["kind"] != "Pod"
    }
    assert owners == {"second"}
    assert [stage for uid, stage in server.succeeded if uid == "second"] == ["prepare", "train", "save"]


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("seed", range(20))
async def test_suspended_and_resumed_at_any_time_the_job_completes(seed, job):
    rng = random.Random(seed)
    first, second = sorted(rng.sample(range(1, 40), 2))
    server = Server()
    server.submit(JOBS[job]())

    def script(server: Server, now: int) -> None:
        if now == first:
            server.edit("tune", suspend=True)
        if now == second:
            server.edit("tune", suspend=False)

    def over(server: Server) -> bool:
        return _complete(server, "job-1")

    await run(server, lag=rng if seed % 2 else None, script=script, until=over)


@pytest.mark.parametrize("job", JOBS)
async def test_while_suspended_nothing_runs_and_the_same_job_goes_on_afterwards(job):
    server = Server()
    server.submit(JOBS[job]())
    await run(server, until=lambda server: any(stage == "train" for _, stage, _ in server.started))
    server.edit("tune", suspend=True)
    await run(server, until=lambda server: server.objects[KIND, "tune"]["status"]["phase"] == "Suspended", seconds=20)
    assert not [pod for pod in server.all("Pod") if pod["status"]["phase"] in ("Pending", "Running")]
    server.edit("tune", suspend=False)
    await run(server)
    assert outcome(server)["attempts"]["count"] == 1
    assert outcome(server)["phase"] == "Complete"


@pytest.mark.parametrize("job", JOBS)
async def test_a_job_deleted_while_the_operator_is_down_leaves_nothing(job):
    server = Server()
    server.submit(JOBS[job]())
    await run(server, until=lambda server: any(stage == "train" for _, stage, _ in server.started))
    server.remove("tune")
    for _ in range(20):
        server.tick()
    assert server.objects == {}


@pytest.mark.parametrize("fate", ["evict", "preempt", "lost"])
async def test_one_pod_that_has_to_go_ends_the_attempt_for_both_and_costs_nothing(fate):
    server = Server(scripted({(Step.TRAIN, 4): fate}))
    server.submit(two_pods().with_spec(retry={"limit": 0}))
    await run(server)
    end = outcome(server)
    assert end["phase"] == "Complete"
    kinds = [kind for stage, _, kind in end["history"] if stage == "train"]
    assert kinds == ["NodeLost" if fate == "lost" else "Preempted", "Succeeded"]
    assert (end["attempts"]["failures"], end["attempts"]["preemptions"]) == (0, 1)
    assert len([1 for _, stage, _ in server.started if stage == "train"]) == 4


async def test_one_pod_whose_end_is_the_users_fault_fails_the_job_with_its_words():
    server = Server(scripted({(Step.TRAIN, 2): "user-error"}))
    server.submit(two_pods())
    await run(server)
    status = server.objects[KIND, "tune"]["status"]
    assert status["phase"] == "Failed"
    (failed,) = [item for item in status["conditions"] if item["type"] == "Failed"]
    assert failed["reason"] == "BadRow"


async def test_the_service_lives_as_long_as_the_job_and_is_made_again_when_somebody_deletes_it():
    server = Server(scripted({(Step.TRAIN, 4): "crash"}))
    server.submit(two_pods())
    await run(server, until=lambda server: any(stage == "train" for _, stage, _ in server.started))
    assert ("Service", "tune-train") in server.objects
    server.objects.pop(("Service", "tune-train"))  # the pods that know each other's address go on
    server.objects["Job", "tune-train-1"]["status"] = {}
    for pod in server.all("Pod"):
        if pod["status"]["phase"] == "Running":
            await server.delete(f"/api/v1/namespaces/team/pods/{pod['metadata']['name']}", pod["metadata"]["uid"])
    await run(server)
    assert outcome(server)["phase"] == "Complete"
    assert ("Service", "tune-train") in server.objects
    server.remove("tune")
    for _ in range(20):
        server.tick()
    assert server.objects == {}


async def test_a_foreign_service_of_that_name_holds_training_up_until_it_is_gone():
    server = Server()
    foreign = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "tune-train", "namespace": "team"}}
    await server.create("", foreign)
    server.submit(two_pods())
    await run(
        server, until=lambda server: "Service" in server.objects[KIND, "tune"].get("status", {}).get("message", "")
    )
    message = server.objects[KIND, "tune"]["status"]["message"]
    assert "waiting for Service tune-train that is not the operator's to be gone" in message
    assert ("Job", "tune-train-1") not in server.objects
    server.objects.pop(("Service", "tune-train"))
    await run(server)
    assert outcome(server)["phase"] == "Complete"


async def test_a_foreign_object_of_the_childs_name_holds_the_job_up_until_it_is_gone():
    server = Server()
    foreign = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "tune-work", "namespace": "team"},
    }
    await server.create("", foreign)
    server.submit(FineTuneJob())
    operator = Operator(server)
    for _ in range(5):
        server.tick()
        operator.watch()
        await operator.visit()
    status = server.objects[KIND, "tune"]["status"]
    assert "waiting for PersistentVolumeClaim tune-work that is not the operator's" in status["message"]
    assert not server.all("Job")
    server.objects.pop(("PersistentVolumeClaim", "tune-work"))
    await run(server)
    assert outcome(server)["phase"] == "Complete"


async def test_a_job_waits_for_the_claim_of_its_cache_and_says_so():
    server = Server()
    server.absent.add("shared")
    server.submit(FineTuneJob().with_spec(cache={"claimName": "shared"}))
    await run(server, until=lambda server: "shared" in server.objects[KIND, "tune"]["status"].get("message", ""))
    message = server.objects[KIND, "tune"]["status"]["message"]
    assert message.startswith("waits for the claim shared, which does not exist: create it and the job goes on")
    assert server.started == []
    server.absent.clear()
    await run(server)
    assert outcome(server)["phase"] == "Complete"


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("seed", range(10))
async def test_what_a_queue_holds_stays_held_and_goes_on_when_the_queue_says_so(seed, job):
    rng = random.Random(seed)
    taken, given = sorted(rng.sample(range(8, 40), 2))
    server = Server()
    server.submit(JOBS[job]())
    held: list[str] = []

    def script(server: Server, now: int) -> None:
        if now == taken:
            held.extend(name for (kind, name), item in server.objects.items() if kind == "Job" and not finished(item))
        for name in held if now in (taken, given) else ():
            server.hold(name, suspend=now == taken)
        if taken < now < given:
            assert all(server.objects["Job", name]["spec"]["suspend"] for name in held)

    await run(server, lag=rng if seed % 2 else None, script=script, until=lambda server: _complete(server, "job-1"))
    attempts = server.objects[KIND, "tune"]["status"]["attempts"]
    assert attempts["failures"] == 0


async def test_a_job_that_is_given_to_another_operator_is_not_trained_twice():
    server = Server()
    server.submit(FineTuneJob().labelled(operator="first"))
    first = Operator(server, name="first")
    while not any(stage == "train" for _, stage, _ in server.started):
        server.tick()
        first.watch()
        await first.visit()
    server.relabel("tune", "second")
    second = Operator(server, name="second")
    for _ in range(60):
        server.tick()
        check(server)
        for operator in (first, second):
            operator.watch()
            await operator.visit()
    assert [stage for _, stage, _ in server.started] == ["prepare"] * 4 + ["train"]
    assert server.objects[KIND, "tune"]["status"]["message"].startswith("held by the operator first")
    server.relabel("tune", "first")
    for _ in range(30):
        server.tick()
        first.watch()
        await first.visit()
    assert outcome(server)["phase"] == "Complete"


@pytest.mark.parametrize("job", JOBS)
async def test_where_everybody_agrees_the_job_goes_on_without_the_machine_that_it_lost(job):
    server = Server()
    wanted = JOBS[job]().training(onNodeLost="ForceDelete").with_spec(retry={"limit": 0})
    server.submit(wanted)
    await run(server, until=lambda server: len(_training(server)) == wanted.build()["spec"]["training"].get("nodes", 1))
    (*_, last) = _training(server)
    server.lose_the_machine_of(last)
    lost_at = server.now
    await run(server, settings=replace(SETTINGS, force_delete=True))
    end = outcome(server)
    assert end["phase"] == "Complete"
    assert [kind for stage, _, kind in end["history"] if stage == "train"] == ["NodeLost", "Succeeded"]
    assert (server.now - lost_at).total_seconds() > 300


async def test_by_default_a_lost_machine_is_waited_for_with_its_name():
    server = Server()
    server.submit(FineTuneJob())
    await run(server, until=lambda server: len(_training(server)) == 1)
    server.lose_the_machine_of(*_training(server))
    await run(
        server,
        settings=replace(SETTINGS, force_delete=True),
        until=lambda server: (server.now - NOW).total_seconds() > 900,
    )
    status = server.objects[KIND, "tune"]["status"]
    assert status["message"].startswith("NodeLost")
    assert status["attempts"]["count"] == 1


def _training(server: Server) -> list[str]:
    return [name for _, stage, name in server.started if stage == "train"]


def _complete(server: Server, uid: str) -> bool:
    job = server.objects.get((KIND, "tune"))
    return bool(job and job["metadata"]["uid"] == uid and job.get("status", {}).get("phase") == "Complete")
