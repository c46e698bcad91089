"""Specs changed in every field, against a real API server: each is refused with words that name the field, or ends in
a condition that explains, or works. What the server accepts goes through the real decisions, child Jobs included."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from finetune.api import API_VERSION, GROUP, KIND
from finetune.controller.decision.decide import decide, document
from finetune.controller.decision.observed import Observed
from finetune.controller.decision.stages.pod import PodSettings
from tests.builders import NOW, stamp
from tests.cluster.layout import CONTROL_PLANE_ADDRESS
from tests.cluster.pki import PORT
from tests.integration.crd_server import Server, private_crd
from tests.integration.mutations import BASES, Mutation, mutations

pytestmark = pytest.mark.cluster

SETTINGS = PodSettings(steps_image="steps:1", train_image="train:1")
_AT_ONCE = 4
_MOST_VISITS = 12
_PATHS = {
    "Job": "/apis/batch/v1/namespaces/default/jobs",
    "PersistentVolumeClaim": "/api/v1/namespaces/default/persistentvolumeclaims",
    "Service": "/api/v1/namespaces/default/services",
}


class DryRun:
    """Creates that the server answers and does not keep; a connection for each thread."""

    def __init__(self, server: Server) -> None:
        pki = server.cluster.layout.pki
        self._group = server.group
        self._context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        self._context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        self._threads = threading.local()

    def job(self, job: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        path = f"/apis/{self._group}/v1alpha1/namespaces/default/finetunejobs"
        return self._create(path, {**job, "apiVersion": job["apiVersion"].replace(GROUP, self._group, 1)})

    def child(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        metadata = {**body["metadata"], "namespace": "default"}
        return self._create(_PATHS[body["kind"]], {**body, "metadata": metadata})

    def _create(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        connection = getattr(self._threads, "connection", None)
        if connection is None:
            connection = http.client.HTTPSConnection(CONTROL_PLANE_ADDRESS, PORT, context=self._context, timeout=60)
            self._threads.connection = connection
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"{path}?dryRun=All&fieldValidation=Strict", json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


@pytest.fixture(scope="module")
def dry_run() -> Iterable[DryRun]:
    with private_crd() as server:
        yield DryRun(server)


def test_every_field_changed_in_every_way_is_refused_or_explained_or_works(dry_run):
    for job in BASES:
        status, answer = dry_run.job(job)
        assert status == 201, answer["message"]
    mutants = mutations()
    assert len(mutants) >= 2_000
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(lambda mutant: _judged(dry_run, mutant), mutants))
    wrong = [problem for _, problem in found if problem]
    assert not wrong, f"{len(wrong)} of {len(mutants)}:\n" + "\n".join(wrong[:40])
    counts = Counter(end for end, _ in found)
    assert min(counts[end] for end in ("refused", "works", "explained")) >= 50, counts


def _judged(dry_run: DryRun, mutant: Mutation) -> tuple[str, str]:
    """How the job ends (refused, explained or works), and what is wrong about that."""
    status, answer = dry_run.job(mutant.job)
    if status != 201:
        words = str(answer.get("message", ""))
        if status not in (400, 422):
            return "refused", f"{mutant.name}: {status} {words[:200]}"
        named = any(_names(words, field) for field in mutant.fields)
        return "refused", "" if named else f"{mutant.name}: the refusal names no such field: {words[:300]}"
    try:
        return _lived(answer, dry_run.child), ""
    except Exception as error:
        return "broken", f"{mutant.name}: {error!r}"


def _names(words: str, field: str) -> bool:
    """Whether the words name the field, or one that it stands in below spec."""
    steps = [step.partition("[")[0] for step in field.split(".")]
    return any(step and step in words for step in (steps[1:] or steps))


def _lived(job: dict[str, Any], create: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]) -> str:
    """The whole life of a job whose pods all do well: how it ends. AssertionError when it does so without a word."""
    metadata = {**job["metadata"], "namespace": "team", "uid": "job-1", "creationTimestamp": stamp(NOW)}
    job = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": job["spec"]}
    children: dict[str, list[dict[str, Any]]] = {"Job": [], "PersistentVolumeClaim": [], "Service": []}
    now, refused = NOW, ""
    for _ in range(_MOST_VISITS):
        now += timedelta(seconds=5)
        observed = Observed(
            job, jobs=tuple(children["Job"]), claims=tuple(children["PersistentVolumeClaim"]), refused=refused
        )
        decision = decide(observed, now, SETTINGS)
        assert decision.again_at is None or decision.again_at >= now, "again_at lies in the past"
        if decision.status is None and not decision.create:
            return _end(job["status"])
        if decision.status is not None:
            job = {**job, "status": json.loads(json.dumps(document(decision.status)))}
        for body in decision.create:
            status, answer = create(body)
            if status != 201:
                assert status in (400, 422), f"{body['kind']}: {status} {answer.get('message')}"
                refused = f"the server does not accept the {body['kind']}: {answer['message']}"
                break
            children[body["kind"]].append(_done({**body, "metadata": {**body["metadata"], "uid": f"{body['kind']}-x"}}))
    raise AssertionError(f"no rest after {_MOST_VISITS} visits: {job['status']}")


def _done(child: dict[str, Any]) -> dict[str, Any]:
    child["metadata"]["creationTimestamp"] = stamp(NOW)
    return {**child, "status": {"conditions": [{"type": "Complete", "status": "True"}], "phase": "Bound"}}


def _end(status: dict[str, Any]) -> str:
    conditions = {item["type"]: item for item in status["conditions"]}
    if conditions["Complete"]["status"] == "True":
        return "works"
    if conditions["Failed"]["status"] == "True":
        assert conditions["Failed"]["message"], "failed without a word"
        return "explained"
    assert conditions["Suspended"]["status"] == "True", f"it stands still without a word: {status}"
    return "explained"
