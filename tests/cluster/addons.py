"""What every cluster has besides Kubernetes itself: a default storage class, and rights for DNS and the provisioner."""

from typing import Any

from tests.cluster.api import Api
from tests.cluster.provisioner import PROVISIONER, STORAGE_CLASS

RBAC = "/apis/rbac.authorization.k8s.io/v1"


def _role(name: str, user: str, rules: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": name},
        "rules": rules,
    }
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
    }
    return [(f"{RBAC}/clusterroles/{name}", role), (f"{RBAC}/clusterrolebindings/{name}", binding)]


def _rule(group: str, resources: list[str], verbs: list[str]) -> dict[str, Any]:
    return {"apiGroups": [group], "resources": resources, "verbs": verbs}


OBJECTS: list[tuple[str, dict[str, Any]]] = [
    (
        f"/apis/storage.k8s.io/v1/storageclasses/{STORAGE_CLASS}",
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {"name": STORAGE_CLASS, "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
            "provisioner": PROVISIONER,
            "reclaimPolicy": "Delete",
            "volumeBindingMode": "WaitForFirstConsumer",
        },
    ),
    *_role(
        "finetune-cluster:coredns",
        "system:coredns",
        [
            _rule("", ["endpoints", "services", "pods", "namespaces"], ["list", "watch"]),
            _rule("discovery.k8s.io", ["endpointslices"], ["list", "watch"]),
        ],
    ),
    *_role(
        "finetune-cluster:provisioner",
        "finetune-provisioner",
        [
            _rule("", ["persistentvolumeclaims"], ["list", "watch"]),
            _rule("", ["persistentvolumes"], ["list", "watch", "create", "delete"]),
        ],
    ),
]


def apply(api: Api) -> None:
    """Applies all of it; again changes nothing."""
    for path, body in OBJECTS:
        api.apply(path, body)
