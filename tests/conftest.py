"""How tests are shared among workers (`pytest -n 2 --dist loadgroup`)."""

from __future__ import annotations

from pathlib import Path

import pytest

ON_PODS = ("cluster", "e2e")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of a file stay together, for they share what took long to make. Those on real pods all do: they use one
    installation, and some of them take it down for a while."""
    for item in items:
        place = item.path.relative_to(Path(__file__).parent)
        group = "pods" if place.parts[0] in ON_PODS else place.with_suffix("").as_posix()
        item.add_marker(pytest.mark.xdist_group(group))
