"""A real Kubernetes on this machine, without Docker, for tests and demos: `python -m tests.cluster up`.

It belongs to the machine, not to a checkout: binaries, state and images live in the user's cache folder, so clones share it.
"""

from tests.cluster.cluster import Cluster, CommandFailed

__all__ = ["Cluster", "CommandFailed"]
