"""The kinds that the controller watches, and where the API server keeps them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune.api import GROUP, KIND, PLURAL, VERSION
from finetune.api.contract import JOB_LABEL, OPERATOR_LABEL


@dataclass(frozen=True)
class Resource:
    """One kind; `selector` limits lists and watches to what belongs to some FineTuneJob."""

    kind: str
    group: str
    version: str
    plural: str
    selector: str = ""

    def path(self, namespace: str | None = None, name: str = "", subresource: str = "") -> str:
        """The URL path of an object, or of a collection; without a namespace, of the whole cluster's."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root, *(["namespaces", namespace] if namespace else []), self.plural, name, subresource]
        return "/".join(part for part in parts if part)


FINETUNEJOBS = Resource(KIND, GROUP, VERSION, PLURAL)
JOBS = Resource("Job", "batch", "v1", "jobs", JOB_LABEL)
PODS = Resource("Pod", "", "v1", "pods", JOB_LABEL)
CLAIMS = Resource("PersistentVolumeClaim", "", "v1", "persistentvolumeclaims", JOB_LABEL)
SERVICES = Resource("Service", "", "v1", "services")
EVENTS = Resource("Event", "", "v1", "events")
LEASES = Resource("Lease", "coordination.k8s.io", "v1", "leases")
SECRETS = Resource("Secret", "", "v1", "secrets")
TOKEN_REVIEWS = Resource("TokenReview", "authentication.k8s.io", "v1", "tokenreviews")

WATCHED = (FINETUNEJOBS, JOBS, PODS, CLAIMS)
BY_KIND = {resource.kind: resource for resource in (*WATCHED, SERVICES)}
"""The kinds that are written; a Service is created with each attempt that needs one, and never looked at again."""


def watched(operator: str) -> tuple[Resource, ...]:
    """The watched kinds, narrowed to the FineTuneJobs (and their children) for the operator of that name."""
    mine = f"{OPERATOR_LABEL}={operator}" if operator else f"!{OPERATOR_LABEL}"
    return tuple(replace(item, selector=",".join(filter(None, (item.selector, mine)))) for item in WATCHED)
