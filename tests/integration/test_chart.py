"""The chart as helm and a real API server see it. Cluster-scoped objects get a group and a name of their own."""

import json
import os
import subprocess
import time
import uuid
from pathlib import Path

import pytest
import yaml

from finetune.api import GROUP
from finetune.api.crd import crd
from tests.cluster.cluster import Cluster
from tests.integration.bad_specs import GOOD

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/finetune-operator"


@pytest.fixture(scope="module")
def cluster():
    return Cluster.current()


def rendered(cluster, *arguments, release="finetune-operator"):
    text = cluster.helm("template", release, CHART, *arguments, namespace="finetune-system").stdout
    return [document for document in yaml.safe_load_all(text) if document]


def of_kind(documents, kind):
    return [document for document in documents if document["kind"] == kind]


def test_helm_finds_no_fault(cluster):
    assert "0 chart(s) failed" in cluster.helm("lint", "--strict", CHART).stdout


def test_install_yaml_is_what_the_chart_renders(cluster):
    script = subprocess.run(
        [ROOT / "manifests/render.sh"],
        env={**os.environ, "HELM": str(cluster.binaries / "helm")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (ROOT / "manifests/install.yaml").read_text() == script.stdout, "stale: run `make generate`"


EVERYTHING = (
    "--set",
    "replicas=2,namespaces={default},registry=registry.example.com/ml,hfEndpoint=https://hub.example.com",
)


@pytest.mark.parametrize("values", [(), EVERYTHING], ids=["defaults", "everything"])
def test_the_api_server_accepts_every_object_with_no_warning(cluster, values):
    documents = rendered(cluster, *values, release=f"t{uuid.uuid4().hex[:8]}")
    for document in documents:
        if document["metadata"].get("namespace") == "finetune-system":
            document["metadata"]["namespace"] = "default"  # dry runs need a namespace that exists
    text = yaml.safe_dump_all(documents).replace(f"{GROUP}", f"dry.{GROUP}")
    answer = cluster.kubectl("apply", "--dry-run=server", "-f", "-", input=text, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "Warning" not in answer.stderr


def test_what_is_off_by_default_renders_when_asked_for(cluster):
    assert not of_kind(rendered(cluster), "PodMonitor")
    assert not of_kind(rendered(cluster), "PodDisruptionBudget")
    documents = rendered(
        cluster, "--set", "metrics.podMonitor.enabled=true,metrics.podMonitor.labels.team=ml,replicas=3"
    )
    (monitor,) = of_kind(documents, "PodMonitor")
    assert monitor["metadata"]["labels"]["team"] == "ml"
    (budget,) = of_kind(documents, "PodDisruptionBudget")
    (deployment,) = of_kind(documents, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_kustomize_builds(cluster):
    documents = list(yaml.safe_load_all(cluster.kubectl("kustomize", ROOT / "manifests").stdout))
    assert of_kind(documents, "Deployment")


def test_values_that_make_no_sense_are_refused_with_their_name(cluster):
    answer = cluster.helm("template", "x", CHART, "--set", "replica=2", check=False)
    assert answer.returncode != 0
    assert "replica" in answer.stderr


def test_no_right_on_secrets_but_one_in_the_operators_own_namespace(cluster):
    for values in ((), EVERYTHING):
        documents = rendered(cluster, *values)
        secrets = [
            (role["kind"], role["metadata"].get("namespace"), rule)
            for role in [*of_kind(documents, "ClusterRole"), *of_kind(documents, "Role")]
            for rule in role["rules"]
            if "secrets" in rule["resources"] or "*" in rule["resources"] or "*" in rule["verbs"]
        ]
        assert [(kind, namespace) for kind, namespace, _ in secrets] == [("Role", "finetune-system")] * 2
        for _, _, rule in secrets:
            assert rule["verbs"] == ["create"] or rule["resourceNames"] == ["finetune-operator-ca"]


def test_an_operator_of_some_namespaces_has_no_right_on_jobs_elsewhere(cluster):
    documents = rendered(cluster, "--set", "namespaces={team-a,team-b}")
    (mine,) = (role for role in of_kind(documents, "ClusterRole") if role["metadata"]["name"] == "finetune-operator")
    assert not {"batch", "finetune.dev", ""} & {group for rule in mine["rules"] for group in rule["apiGroups"]}
    assert {role["metadata"]["namespace"] for role in of_kind(documents, "Role")} == {
        "finetune-system", "team-a", "team-b",
    }  # fmt: skip


def test_the_variables_are_those_that_the_operator_reads(cluster):
    source = (ROOT / "operator/finetune/controller/settings.py").read_text()
    (deployment,) = of_kind(rendered(cluster), "Deployment")
    variables = [entry["name"] for entry in deployment["spec"]["template"]["spec"]["containers"][0]["env"]]
    assert [name for name in variables if name not in source] == []


def test_the_pod_is_restricted(cluster):
    (deployment,) = of_kind(rendered(cluster), "Deployment")
    namespace = f"restricted-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.kubectl(
        "create", "-f", "-",
        input=json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}}),
    )  # fmt: skip
    try:
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "operator", "namespace": namespace},
            "spec": {**deployment["spec"]["template"]["spec"], "serviceAccountName": "default"},
        }
        answer = poll(
            lambda: cluster.kubectl("create", "--dry-run=server", "-f", "-", input=json.dumps(pod), check=False),
            lambda answer: "serviceaccount" not in answer.stderr,
        )
        assert answer.returncode == 0, answer.stderr
    finally:
        cluster.kubectl("delete", "namespace", namespace, "--wait=false")


def poll(ask, done, seconds=20):
    deadline = time.monotonic() + seconds
    while not done(answer := ask()) and time.monotonic() < deadline:
        time.sleep(0.3)
    return answer


class Policy:
    """The admission policy and the aggregated roles, installed for a private copy of the CRD in a fresh namespace."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.name = f"t{uuid.uuid4().hex[:8]}"
        self.group = f"{self.name}.{GROUP}"
        self.resource = f"finetunejobs.{self.group}"
        policies = ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding", "ClusterRole")
        self.documents = [d for d in rendered(cluster, release=self.name) if d["kind"] in policies]
        self.definition = json.dumps(crd()).replace(GROUP, self.group)

    def up(self):
        self.cluster.kubectl("apply", "-f", "-", input=self.definition)
        self.cluster.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(self.documents).replace(GROUP, self.group))
        self.cluster.kubectl("create", "namespace", self.name)
        self.cluster.until_served(self.resource)
        self.role("jobs-only", "create,get,patch,update,delete", self.resource)
        self.cluster.kubectl("create", "rolebinding", "ed", "--clusterrole=edit", "--user=ed", namespace=self.name)
        self.cluster.kubectl("create", "rolebinding", "vi", "--clusterrole=view", "--user=vi", namespace=self.name)
        # edit and view are aggregated a moment later, and the policy is compiled a moment later
        poll(lambda: self.create("ed", "warm-up"), lambda answer: answer.returncode == 0)
        poll(lambda: self.create("jobs-only", "warm-up"), lambda answer: "may not create pods" in answer.stderr)

    def role(self, user, verbs, resource):
        self.cluster.kubectl("create", "role", user, f"--verb={verbs}", f"--resource={resource}", namespace=self.name)
        self.cluster.kubectl("create", "rolebinding", user, f"--role={user}", f"--user={user}", namespace=self.name)

    def create(self, user, name, *arguments):
        job = json.dumps({**GOOD, "metadata": {"name": name}}).replace(f"{GROUP}/", f"{self.group}/")
        return self.cluster.kubectl(
            "create", "--as", user, "-f", "-", *(arguments or ("--dry-run=server",)),
            input=job, namespace=self.name, check=False,
        )  # fmt: skip

    def patch(self, user, name, body, *arguments):
        return self.cluster.kubectl(
            "patch", self.resource, name, "--as", user, "--type=merge", "--patch", json.dumps(body), *arguments,
            namespace=self.name, check=False,
        )  # fmt: skip

    def down(self):
        kinds = "validatingadmissionpolicybinding,validatingadmissionpolicy,clusterrole"
        self.cluster.kubectl("delete", kinds, "-l", f"app.kubernetes.io/instance={self.name}")
        self.cluster.kubectl("delete", "crd", self.resource, "--wait=false")
        self.cluster.kubectl("delete", "namespace", self.name, "--wait=false")


@pytest.fixture(scope="module")
def policy(cluster):
    policy = Policy(cluster)
    try:
        policy.up()
        yield policy
    finally:
        policy.down()


def test_who_may_not_create_pods_gets_no_job_and_reads_why(policy):
    answer = policy.create("jobs-only", "refused", "--validate=false")
    assert answer.returncode != 0
    assert (
        f"a FineTuneJob runs pods, and jobs-only may not create pods in namespace {policy.name}: "
        "ask for a role there that may, for example edit"
    ) in answer.stderr


def test_who_may_create_pods_gets_a_job_through_the_clusters_own_edit_role(policy):
    answer = policy.create("ed", "accepted", "--validate=true")
    assert answer.returncode == 0, answer.stderr


def test_nobody_else_changes_the_spec_but_labels_are_free(policy):
    assert policy.create("ed", "changed", "--validate=true").returncode == 0
    assert "may not create pods" in policy.patch("jobs-only", "changed", {"spec": {"suspend": True}}).stderr
    assert policy.patch("jobs-only", "changed", {"metadata": {"labels": {"team": "a"}}}).returncode == 0
    assert policy.patch("ed", "changed", {"spec": {"suspend": True}}).returncode == 0


def test_users_read_status_and_cannot_write_it(policy):
    assert policy.create("ed", "told", "--validate=true").returncode == 0
    answer = policy.patch("ed", "told", {"status": {"phase": "Complete"}}, "--subresource=status")
    assert "forbidden" in answer.stderr.lower()
    seen = policy.cluster.kubectl("get", policy.resource, "told", "--as", "vi", namespace=policy.name, check=False)
    assert seen.returncode == 0, seen.stderr


def test_who_may_only_view_cannot_delete(policy):
    answer = policy.cluster.kubectl(
        "delete", policy.resource, "--all", "--as", "vi", namespace=policy.name, check=False
    )
    assert answer.returncode != 0
