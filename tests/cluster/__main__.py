"""The command line: `python -m tests.cluster up|down|status|env|build-image|load-image|stop-node|remove-node`."""

import argparse
import os
import shlex
import sys

from tests.cluster.cluster import Cluster, CommandFailed
from tests.cluster.console import ClusterError, say
from tests.cluster.layout import Layout


def parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    result = argparse.ArgumentParser(prog="python -m tests.cluster", description="A real Kubernetes on this machine.")
    commands = result.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start it, or do nothing when it runs")
    up.add_argument("--nodes", type=int, default=int(os.environ.get("NODES") or 1), help="at least so many (NODES, 1)")
    commands.add_parser("down", help="end it and clean up; binaries and images stay")
    commands.add_parser("status", help="processes, nodes, versions")
    commands.add_parser("env", help="print what a shell needs: eval $(python -m tests.cluster env)")
    build = commands.add_parser("build-image", help="build an image of ours into the first node, print its name")
    build.add_argument("names", nargs="+", metavar="NAME")
    load = commands.add_parser("load-image", help="copy an image from the first node to another")
    load.add_argument("image")
    load.add_argument("--node", type=int, required=True)
    for name, text in (
        ("stop-node", "end a node as a power cut would"),
        ("remove-node", "end a node and delete its object"),
    ):
        commands.add_parser(name, help=text).add_argument("number", type=int)
    return result


def main() -> int:
    """Runs one command."""
    arguments = parser().parse_args()
    try:
        return run(arguments)
    except (ClusterError, CommandFailed) as error:
        say(f"error: {error}".replace("[", r"\["))
        return 1


def run(arguments: argparse.Namespace) -> int:
    """Carries out one command; returns the exit code."""
    cluster = Cluster(Layout.default())
    match arguments.command:
        case "up":
            cluster.up(arguments.nodes)
        case "down":
            cluster.down()
            for line in cluster.leftovers():
                say(f"left behind: {line}")
        case "status":
            return status(cluster)
        case "env":
            path, binaries = shlex.quote(str(cluster.kubeconfig)), shlex.quote(str(cluster.binaries))
            print(f"export KUBECONFIG={path} PATH={binaries}:$PATH")
        case "build-image":
            cluster = Cluster.current()
            for name in arguments.names:
                print(cluster.build_image(name), flush=True)
        case "load-image":
            Cluster.current().load_image(arguments.image, arguments.node)
        case "stop-node":
            Cluster.current().stop_node(arguments.number)
        case "remove-node":
            Cluster.current().remove_node(arguments.number)
    return 0


def status(cluster: Cluster) -> int:
    """Prints the state of everything; 1 when the cluster does not run."""
    for name, state in cluster.status():
        print(f"{name:26} {state}")
    print(f"{'kubeconfig':26} {cluster.kubeconfig}")
    print(f"{'logs':26} {cluster.layout.logs}")
    if not cluster.running():
        return 1
    print(cluster.kubectl("get", "nodes", "-o", "wide").stdout, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
