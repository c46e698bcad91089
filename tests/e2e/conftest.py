"""One installation for the session, one namespace for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.namespace import Namespace
from tests.installation import Installation, install


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/e2e" in str(item.path):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def installation() -> Installation:
    """The operator and the hub on the local cluster."""
    return install()


@pytest.fixture
def namespace(installation: Installation, request: pytest.FixtureRequest) -> Iterator[Namespace]:
    """A fresh namespace; what the operator said is shown when the test fails."""
    fresh = Namespace.create(installation.cluster, "e2e")
    failures = request.session.testsfailed
    yield fresh
    if request.session.testsfailed > failures:
        print(installation.logs())
    fresh.delete()
