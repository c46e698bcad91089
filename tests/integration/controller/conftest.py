"""One operator and one namespace for each test, side by side with whatever else runs on the cluster."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.cluster.api import Api
from tests.integration.controller.playground import Playground
from tests.integration.controller.process import OperatorProcess, install_crd


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    running = Cluster.current()
    install_crd(running)
    return running


@pytest.fixture
def playground(cluster: Cluster, tmp_path: Path) -> Iterator[Playground]:
    """A namespace with a running operator."""
    name = f"controller-{uuid.uuid4().hex[:6]}"
    api = Api(cluster.layout, timeout=30)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.request("POST", "/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
    operator = OperatorProcess(cluster, name, name, tmp_path / "operator.log")
    operator.progress_at("127.0.0.1")
    operator.start()
    try:
        yield Playground(api, name, operator)
    finally:
        operator.stop()
        api.request("DELETE", f"/api/v1/namespaces/{name}")
