"""The CRD on a real API server, under a group of its own so that whatever else runs there is left alone."""

import json
import uuid
from contextlib import contextmanager

from finetune.api import GROUP
from finetune.api.crd import crd
from tests.cluster.cluster import Cluster


class Server:
    """kubectl against the private copy of the CRD."""

    def __init__(self, cluster, group):
        self.cluster, self.group = cluster, group
        self.resource = f"finetunejobs.{group}"

    def apply(self, document, *arguments):
        """The answer of `kubectl apply`, whatever it is."""
        return self.send("apply", document, *arguments)

    def send(self, verb, document, *arguments):
        text = document if isinstance(document, str) else json.dumps(document)
        text = text.replace(f"{GROUP}/", f"{self.group}/")
        return self.cluster.kubectl(verb, "-f", "-", *arguments, input=text, namespace="default", check=False)

    def patch(self, name, body, *arguments):
        return self.cluster.kubectl(
            "patch", self.resource, name, "--type=merge", "--patch", json.dumps(body), *arguments,
            namespace="default", check=False,
        )  # fmt: skip


@contextmanager
def private_crd():
    """A Server for as long as the context lasts."""
    cluster = Cluster.current()
    group = f"t{uuid.uuid4().hex[:8]}.{GROUP}"
    definition = json.dumps(crd()).replace(GROUP, group)
    server = Server(cluster, group)
    cluster.kubectl("apply", "-f", "-", input=definition)
    try:
        cluster.until_served(server.resource)
        yield server
    finally:
        cluster.kubectl("delete", "crd", server.resource, "--wait=false")
