"""How tests are shared among workers (`pytest -n 2`)."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")  # a slow machine is no fault of a test

ON_PODS = ("tests/cluster/", "tests/e2e/")


class ByFile(LoadFileScheduling):
    """The tests of a file stay together, for they share what took long to make. Those on real pods all do: they use one
    installation, and some of them take it down for a while."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "pods" if file.startswith(ON_PODS) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    """In the place of `--dist`'s own."""
    return ByFile(config, log)
