"""Whose report it is: by the API server's word and UIDs only."""

from __future__ import annotations

import pytest

from finetune.api.contract import Step
from finetune.controller.cluster.client import ApiError
from finetune.controller.cluster.store import Store
from finetune.controller.serving.senders import ForbiddenError, Senders, UnauthorizedError
from tests.builders import FineTuneJob, Job, Pod


class Api:
    """Knows one token, and the objects it is given."""

    def __init__(self, *items, audiences=("finetune.dev",), extra=None, authenticated=True) -> None:
        self.items = {(item["kind"], item["metadata"]["name"]): item for item in items}
        pod = next(item for item in items if item["kind"] == "Pod")["metadata"]
        self.extra = extra or {
            "authentication.kubernetes.io/pod-name": [pod["name"]],
            "authentication.kubernetes.io/pod-uid": [pod["uid"]],
        }
        self.audiences, self.authenticated, self.reviews = audiences, authenticated, 0

    async def create(self, path, body):
        self.reviews += 1
        assert body["spec"]["audiences"] == ["finetune.dev"]
        user = {"username": "system:serviceaccount:team:default", "extra": self.extra}
        return {"status": {"authenticated": self.authenticated, "audiences": list(self.audiences), "user": user}}

    async def get(self, path):
        kind = {"pods": "Pod", "jobs": "Job", "finetunejobs": "FineTuneJob"}[path.split("/")[-2]]
        try:
            return self.items[kind, path.split("/")[-1]]
        except KeyError:
            raise ApiError(404, "NotFound", "gone") from None


def chain(pod: Pod | None = None, job: Job | None = None, owner: FineTuneJob | None = None):
    return (
        (pod or Pod("train").on("n").running(Step.TRAIN)).build(),
        (job or Job("train")).build(),
        (owner or FineTuneJob()).build(),
    )


async def test_a_token_leads_over_pod_and_job_to_the_finetunejob_and_its_running_step():
    job, step = await Senders(Api(*chain()), Store()).job_of("token")
    assert job["metadata"]["uid"] == "job-1"
    assert step == Step.TRAIN


async def test_a_busy_server_is_no_reason_to_turn_a_pod_away():
    class Busy(Api):
        async def get(self, path):
            raise ApiError(429, "TooManyRequests", "busy", retry_after=1.0)

    with pytest.raises(ApiError, match="429"):
        await Senders(Busy(*chain()), Store()).job_of("token")


async def test_a_review_is_remembered():
    api = Api(*chain())
    senders = Senders(api, Store())
    for _ in range(3):
        await senders.job_of("token")
    assert api.reviews == 1


async def test_a_remembered_review_expires():
    api, now = Api(*chain()), [0.0]
    senders = Senders(api, Store(), clock=lambda: now[0])
    await senders.job_of("token")
    now[0] = 301.0
    await senders.job_of("token")
    assert api.reviews == 2


@pytest.mark.parametrize("options", [{"authenticated": False}, {"audiences": ("api",)}, {"audiences": ()}])
async def test_a_token_that_is_not_for_us_is_unauthorized(options):
    with pytest.raises(UnauthorizedError):
        await Senders(Api(*chain(), **options), Store()).job_of("token")


async def test_a_token_that_is_bound_to_no_pod_is_forbidden():
    with pytest.raises(ForbiddenError):
        await Senders(Api(*chain(), extra={"x": ["y"]}), Store()).job_of("token")


async def test_a_pod_that_has_ended_has_nothing_to_report():
    with pytest.raises(ForbiddenError):
        await Senders(Api(*chain(pod=Pod("train").failed(Step.TRAIN, 1))), Store()).job_of("token")


async def test_a_pod_recreated_under_the_same_name_is_another_one():
    extra = {
        "authentication.kubernetes.io/pod-name": ["tune-train-1-x"],
        "authentication.kubernetes.io/pod-uid": ["old"],
    }
    with pytest.raises(ForbiddenError):
        await Senders(Api(*chain(), extra=extra), Store()).job_of("token")


async def test_a_foreign_pod_that_carries_our_labels_is_forbidden():
    pod = Pod("train").running(Step.TRAIN).build()
    pod["metadata"]["ownerReferences"][0]["kind"] = "ReplicaSet"
    with pytest.raises(ForbiddenError):
        await Senders(Api(pod, *chain()[1:]), Store()).job_of("token")


async def test_a_pod_of_a_copied_job_is_forbidden_although_its_references_are_copied_too():
    pod, job = Pod("train").running(Step.TRAIN).build(), Job("train").copied("debug", owners=True).build()
    pod["metadata"]["ownerReferences"][0] |= {"name": "debug", "uid": job["metadata"]["uid"]}
    with pytest.raises(ForbiddenError):
        await Senders(Api(pod, job, FineTuneJob().build()), Store()).job_of("token")


async def test_a_pod_of_a_former_job_cannot_write_to_its_namesake():
    with pytest.raises(ForbiddenError):
        await Senders(Api(*chain(owner=FineTuneJob(uid="job-2"))), Store()).job_of("token")
