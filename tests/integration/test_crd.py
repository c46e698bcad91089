"""What a real API server makes of FineTuneJobs."""

import json
import uuid
from pathlib import Path

import pytest
import yaml

from tests.integration.bad_specs import BAD, CLOSE, GOOD
from tests.integration.crd_server import private_crd
from tests.merge_patch import merged

pytestmark = pytest.mark.cluster

EXAMPLES = sorted((Path(__file__).parents[2] / "manifests/examples").rglob("*.yaml"))


@pytest.fixture(scope="module")
def server():
    with private_crd() as server:
        yield server


@pytest.fixture
def job(server):
    """A job that exists and has not started."""
    name = f"job-{uuid.uuid4().hex[:8]}"
    answer = server.apply(merged(GOOD, {"metadata": {"name": name}}))
    assert answer.returncode == 0, answer.stderr
    yield name
    server.cluster.kubectl("delete", server.resource, name, namespace="default")


@pytest.mark.parametrize("spec", [GOOD, *CLOSE.values()], ids=["good", *CLOSE])
def test_good_specs_among_the_bad_ones_are_accepted(server, spec):
    answer = server.apply(spec, "--dry-run=server")
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_a_bad_spec_is_refused_with_a_sentence(server, bad):
    answer = server.apply(bad.job, "--dry-run=server")
    assert answer.returncode != 0
    assert bad.says in answer.stderr


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_accepted(server, example):
    answer = server.apply(example.read_text(), "--dry-run=server")
    assert answer.returncode == 0, answer.stderr
    assert "created (server dry run)" in answer.stdout


def test_as_many_tokens_as_a_spec_may_list_fit_the_servers_budget(server):
    tokens = [{"content": f"<token-{number}>", "init": {"copyOf": "<s>"}} for number in range(2_000)]
    answer = server.send(
        "create", merged(GOOD, {"metadata": {"name": "many"}, "spec": {"tokens": {"add": tokens}}}), "--dry-run=server"
    )
    assert answer.returncode == 0, answer.stderr


def test_defaults_stand_in_the_stored_object(server, job):
    stored = json.loads(server.cluster.kubectl("get", server.resource, job, "-ojson", namespace="default").stdout)
    assert stored["spec"]["training"]["checkpoint"] == {"everySteps": 50, "keep": 2}
    assert stored["spec"]["workspace"] == {
        "size": "20Gi",
        "accessModes": ["ReadWriteOnce"],
        "retain": "OnFailure",
    }
    assert stored["spec"]["retry"] == {"limit": 3}
    assert stored["spec"]["dataset"]["sources"][0]["split"] == "train"


def generation(server, job):
    return server.cluster.kubectl(
        "get", server.resource, job, "-ojsonpath={.metadata.generation}", namespace="default"
    ).stdout


def test_applying_the_same_job_again_changes_nothing_even_after_the_start(server, job):
    document = merged(GOOD, {"metadata": {"name": job}, "spec": {"training": {"learningRate": 1e-5}}})
    server.apply(document)
    start(server, job)
    before = generation(server, job)
    answer = server.apply(document)  # kubectl replaces whole lists here; the server's defaults make them equal again
    assert answer.returncode == 0, answer.stderr
    assert generation(server, job) == before


def start(server, job):
    status = {"status": {"startTime": "2030-01-01T00:00:00Z", "phase": "Downloading"}}
    answer = server.patch(job, status, "--subresource=status")
    assert answer.returncode == 0, answer.stderr


def test_before_the_start_everything_may_change(server, job):
    assert server.patch(job, {"spec": {"model": {"uri": "hf://org/other"}}}).returncode == 0


@pytest.mark.parametrize(
    ("field", "spec"),
    [
        ("model", {"model": {"uri": "hf://org/other"}}),
        ("training.learningRate", {"training": {"learningRate": 0.1}}),
        ("training.seed", {"training": {"seed": 7}}),
        ("training.container", {"training": {"container": {"image": "mine"}}}),
        ("workspace.size", {"workspace": {"size": "40Gi"}}),
        ("tokens", {"tokens": None}),
        ("output", {"output": {"uri": "pvc://models/new"}}),
        ("dataset", {"dataset": {"sources": [{"uri": "hf://datasets/org/other"}]}}),
    ],
)
def test_after_the_start_the_spec_is_frozen(server, job, field, spec):
    start(server, job)
    answer = server.patch(job, {"spec": spec})
    assert answer.returncode != 0
    assert f"spec.{field} cannot change once the job has started" in answer.stderr
    assert "apply it under another name" in answer.stderr


@pytest.mark.parametrize(
    "spec",
    [
        {"suspend": True},
        {"retry": {"limit": 9, "at": "now"}},
        {"activeDeadlineSeconds": 60},
        {"ttlSecondsAfterFailed": 60},
        {"startDeadlineSeconds": 60},
        {"training": {"progressDeadlineSeconds": 60}},
        {"workspace": {"retain": "Always"}},
    ],
    ids=lambda spec: next(iter(spec)),
)
def test_after_the_start_these_may_still_change(server, job, spec):
    start(server, job)
    answer = server.patch(job, {"spec": spec})
    assert answer.returncode == 0, answer.stderr


MENDING = {
    "memory": {"training": {"resources": {"limits": {"memory": "64Gi"}}}},
    "micro batch": {"training": {"microBatchSize": 2, "gradientCheckpointing": "Enabled"}},
    "placement": {"training": {"nodeSelector": {"gpu": "big"}, "tolerations": [{"operator": "Exists"}]}},
    "room": {"training": {"checkpoint": {"keep": 1}}},
    "preparing pods": {"prepare": {"resources": {"limits": {"memory": "8Gi"}}}},
}


@pytest.mark.parametrize("spec", MENDING.values(), ids=MENDING)
@pytest.mark.parametrize("phase", ["Failed", "Suspended"])
def test_what_mends_a_job_may_change_while_nothing_of_it_runs(server, job, spec, phase):
    start(server, job)
    answer = server.patch(job, {"spec": spec})
    assert answer.returncode != 0
    assert "may change only while the job is Failed or Suspended" in answer.stderr
    assert server.patch(job, {"status": {"phase": phase}}, "--subresource=status").returncode == 0
    assert server.patch(job, {"spec": spec}).returncode == 0
    answer = server.patch(job, {"spec": {"training": {"seed": 7}}})
    assert "spec.training.seed cannot change" in answer.stderr


def test_the_image_of_ones_own_trainer_may_be_mended_and_nothing_else_of_it(server):
    name = f"job-{uuid.uuid4().hex[:8]}"
    own = {"training": {"container": {"image": "mine:1", "command": ["train"]}}}
    server.apply(merged(GOOD, {"metadata": {"name": name}, "spec": own}))
    start(server, name)
    server.patch(name, {"status": {"phase": "Failed"}}, "--subresource=status")
    try:
        assert server.patch(name, {"spec": {"training": {"container": {"image": "mine:2"}}}}).returncode == 0
        answer = server.patch(name, {"spec": {"training": {"container": {"command": ["other"]}}}})
        assert "spec.training.container.command cannot change" in answer.stderr
    finally:
        server.cluster.kubectl("delete", server.resource, name, namespace="default")


def test_the_columns_tell_phase_progress_and_loss(server, job):
    progress = {"step": "train", "summary": "21% (120/562)", "remaining": "12m", "loss": 1.25, "percent": 21}
    server.patch(
        job, {"status": {"phase": "Training", "progress": progress, "attempts": {"count": 1}}}, "--subresource=status"
    )
    header, row = server.cluster.kubectl("get", server.resource, job, namespace="default").stdout.splitlines()
    assert header.split() == ["NAME", "PHASE", "PROGRESS", "LOSS", "REMAINING", "ATTEMPT", "AGE"]
    assert row.split()[:7] == [job, "Training", "21%", "(120/562)", "1.25", "12m", "1"]


def test_the_definition_keeps_what_client_side_apply_needs(server):
    stored = server.cluster.kubectl("get", "crd", server.resource, "-oyaml").stdout
    applied = yaml.safe_load(stored)["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"]
    assert len(applied) < 262_144
