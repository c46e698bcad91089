"""A real Kubernetes on this machine, without Docker, for tests and demos: `python -m tests.cluster up`.

It belongs to the machine, not to a checkout: binaries, state and images lie in the user's cache folder, for all clones.
"""

from tests.cluster.cluster import Cluster, CommandFailed

__all__ = ["Cluster", "CommandFailed"]
