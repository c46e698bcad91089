"""The commands for a cluster's jobs, through the real kubectl, on a private copy of the CRD."""

import json
import threading
import time
import uuid

import pytest
from typer.testing import CliRunner

from finetune.cli.__main__ import app
from tests.integration.bad_specs import GOOD
from tests.integration.crd_server import private_crd
from tests.merge_patch import merged

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def server():
    with private_crd() as server:
        yield server


@pytest.fixture
def finetune(server, monkeypatch):
    """Runs the command as a user of the cluster would."""
    for module in ("kubectl", "control"):
        monkeypatch.setattr(f"finetune.cli.{module}.RESOURCE", server.resource)
    monkeypatch.setenv("KUBECONFIG", str(server.cluster.kubeconfig))
    monkeypatch.setenv("PATH", server.cluster.environment()["PATH"])

    def command(*arguments):
        result = CliRunner().invoke(app, [*arguments, "-n", "default"])
        return result.exit_code, result.output

    return command


@pytest.fixture
def job(server):
    name = f"job-{uuid.uuid4().hex[:8]}"
    assert server.apply(merged(GOOD, {"metadata": {"name": name}})).returncode == 0
    yield name
    server.cluster.kubectl("delete", server.resource, name, "--ignore-not-found", namespace="default")


def condition(kind, status="True", message=""):
    return {
        "type": kind,
        "status": status,
        "reason": "Because",
        "message": message,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }


def write(server, job, **status):
    answer = server.patch(job, {"status": status}, "--subresource=status")
    assert answer.returncode == 0, answer.stderr


def test_status_shows_steps_progress_and_loss(server, finetune, job):
    progress = {"step": "train", "summary": "50% (20/40)", "percent": 50, "loss": 0.75, "remaining": "1m"}
    done = [condition(kind) for kind in ("ModelDownloaded", "TokensAdded", "ModelReloaded", "DatasetLoaded")]
    write(server, job, startTime="2026-01-01T00:00:00Z", phase="Training", conditions=done, progress=progress)
    code, output = finetune("status", job)
    assert code == 0, output
    assert "Training" in output and "20/40, 1m left" in output and "loss 0.75" in output


def test_suspend_and_resume_change_the_one_field(server, finetune, job):
    def suspended():
        stored = server.cluster.kubectl("get", server.resource, job, "-ojson", namespace="default").stdout
        return json.loads(stored)["spec"]["suspend"]

    assert finetune("suspend", job)[0] == 0
    assert suspended() is True
    assert finetune("resume", job)[0] == 0
    assert suspended() is False


def test_each_retry_is_another_word(server, finetune, job):
    def at():
        stored = server.cluster.kubectl("get", server.resource, job, "-ojson", namespace="default").stdout
        return json.loads(stored)["spec"]["retry"]["at"]

    assert finetune("retry", job)[0] == 0
    first = at()
    assert finetune("retry", job)[0] == 0
    assert at() > first


@pytest.mark.parametrize(("kind", "code"), [("Complete", 0), ("Failed", 1)])
def test_watch_ends_with_the_job(server, finetune, job, kind, code):
    def live():
        time.sleep(1)
        for step in (10, 20):
            progress = {"step": "train", "summary": f"({step}/40)", "percent": step, "loss": 1 / step}
            write(server, job, phase="Training", progress=progress)
        write(server, job, phase=kind, message="so it ended", conditions=[condition(kind, message="so it ended")])

    thread = threading.Thread(target=live)
    thread.start()
    ended = finetune("watch", job)
    thread.join()
    assert ended[0] == code, ended[1]
    assert "Training (10/40) loss 0.1" in ended[1]
    assert "so it ended" in ended[1]


def test_watch_notices_a_deletion(server, finetune, job):
    timer = threading.Timer(1, lambda: server.cluster.kubectl("delete", server.resource, job, namespace="default"))
    timer.start()
    code, output = finetune("watch", job)
    assert code == 1
    assert f"{job} was deleted" in output


def test_an_absent_job_is_one_sentence_and_a_hint(finetune):
    code, output = finetune("status", "absent")
    assert code == 1
    assert '"absent" not found' in output and "hint: kubectl get ftj -A" in output


def test_logs_of_a_job_without_pods_say_so(finetune, job):
    code, output = finetune("logs", job, "--step", "train")
    assert code == 1
    assert f"{job} has no pod of the step train" in output
