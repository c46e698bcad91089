"""Settings from the environment; Events from transitions; what makes a replica unhealthy."""

from __future__ import annotations

import asyncio

import pytest

from finetune.api.contract import Step
from finetune.api.status import FineTuneJobStatus
from finetune.controller.decision.decide import decide
from finetune.controller.decision.observed import Observed
from finetune.controller.decision.stages.pod import PodSettings
from finetune.controller.decision.transitions import event, transitions
from finetune.controller.serving.health import Health
from finetune.controller.settings import MissingSettingError, Settings
from tests.builders import NOW, Claim, FineTuneJob, Job, Pod

IMAGES = {"FINETUNE_STEPS_IMAGE": "s", "FINETUNE_TRAIN_IMAGE": "t"}
POD_SETTINGS = PodSettings(steps_image="s", train_image="t")


def test_without_images_the_missing_variables_are_named():
    with pytest.raises(MissingSettingError, match="FINETUNE_STEPS_IMAGE and FINETUNE_TRAIN_IMAGE"):
        Settings.from_environment({})


def test_lists_are_comma_separated_and_empty_means_the_whole_cluster():
    assert Settings.from_environment(IMAGES | {"FINETUNE_NAMESPACES": "a, b,"}).namespaces == ("a", "b")
    assert Settings.from_environment(IMAGES | {"FINETUNE_NAMESPACES": ""}).namespaces == ()


def steps_of_a_job():
    """A job's status at the latch, and after its prepare pod succeeded."""
    job = FineTuneJob()
    latched = decide(Observed(job=job.build()), NOW, POD_SETTINGS).status
    job.with_status(latched)
    children = {"jobs": (Job("prepare").build(),), "claims": (Claim().build(),)}
    pods = (Pod("prepare").on("n").running(Step.ADD_TOKENS).build(),)
    running = decide(Observed(job=job.build(), pods=pods, **children), NOW, POD_SETTINGS).status
    return job, latched, running


def test_taking_a_job_up_tells_nothing():
    _, latched, _ = steps_of_a_job()
    empty = Observed(job=FineTuneJob().build()).status
    assert not list(transitions(empty, latched))


def test_a_condition_that_begins_to_hold_is_told_once_and_by_the_same_name():
    job, latched, running = steps_of_a_job()
    told, started = transitions(latched, running)
    assert told.reason == "ModelDownloaded"
    assert (started.reason, started.message) == ("AttemptStarted", "prepare attempt 1 started on node n")
    assert not list(transitions(running, running))
    observed = Observed(job=job.build())
    first, again = (event(observed, told, NOW, replica)["metadata"]["name"] for replica in ("a", "b"))
    assert first == again


def test_the_end_of_an_attempt_is_told_once_whichever_way_it_went():
    job, _, running = steps_of_a_job()
    job.with_status(running)
    children = {"jobs": (Job("prepare").build(),), "claims": (Claim().build(),)}
    ways = {
        "AttemptSucceeded": Pod("prepare").on("n").succeeded(),
        "Crashed": Pod("prepare").on("n").failed(Step.ADD_TOKENS, 1),
    }
    for reason, pod in ways.items():
        ended = {**children, "jobs": (Job("prepare").failed().build(),)} if reason == "Crashed" else children
        after = decide(Observed(job=job.build(), pods=(pod.build(),), **ended), NOW, POD_SETTINGS).status
        told = [item.reason for item in transitions(running, after)]
        assert told.count(reason) == 1
        assert not list(transitions(after, after))


async def test_a_part_that_ended_makes_the_replica_unhealthy():
    ended = asyncio.create_task(asyncio.sleep(0))
    await ended
    assert Health(tasks={"watches": ended}).problems() == ["the task watches has ended"]


async def test_lagging_watches_and_standing_workers_make_the_replica_unhealthy():
    assert Health(watching=lambda: False).problems()
    assert Health(waiting=lambda: 3, last_visit=lambda: float("-inf"), leading=lambda: True).problems()
    assert not Health(waiting=lambda: 0, last_visit=lambda: float("-inf"), leading=lambda: True).problems()


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("NodeLost: pod tune-train-1-x was told to stop", True),
        ("the Job tune-train-1 cannot be created: exceeded quota", True),
        ("the pod cannot be created: forbidden", True),
        ("a pod (there are 1 of 2) cannot be created: forbidden", True),
        ("pod 1 of 2: waits for the claim data, which does not exist", True),
        ("train attempt 2 starts at 12:00:10 UTC (NodeLost: the machine fell silent)", False),
        ("stopping, because the Job tune-train-1 cannot be created: exceeded quota", False),
    ],
)
def test_a_message_that_only_quotes_trouble_is_no_news(message, told):
    before = FineTuneJobStatus()
    assert bool(list(transitions(before, before.model_copy(update={"message": message})))) == told
